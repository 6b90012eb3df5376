// Package exfat reads exFAT on a disk that somebody else wrote.
//
//	fsys, err := exfat.Open(dev, guest.Options{})
//
// # What it reads
//
//   - Sectors of 512 to 4096 bytes, clusters up to 32 MiB; the copy of the boot region when the checksum of the first does not match; of two
//     tables and bitmaps (TexFAT) those in use.
//   - Files with and without a chain in the table, zeros behind their valid length, directories up to 256 MiB. The entries of a file are
//     [guest.ErrDamaged] when their checksum does not match; a file with a critical entry that the specification does not know is
//     [guest.ErrUnsupported]. Both are told at the end of a listing, and the others are shown.
//   - Names by the volume's own up-case table: case makes no difference to a look for one. When that table is damaged, there is a warning, and
//     the case of ASCII alone makes none.
//
// # How it shows them
//
// As Linux does with "-t exfat -o iocharset=utf8,time_offset=0" and an umask of 022: everything belongs to root, directories and files have the mode
// 0755, files that may only be read 0555. A file's ctime is its mtime, btime and mtime have 10 ms, atime 2 s; a time without a time zone is taken for
// UTC. The root directory has none. A directory has as many links as there are directories in it, and two. Blocks are those that the size needs.
//
// Unlike Linux 6.1, a file is as long as its data length says, and not its valid length.
//
// The number of an inode is the place of its first entry on the device, in units of 32 bytes, times two, and one more where
// its directory lies in clusters that follow each other without a chain; that of the root is 1.
//
// # What it does not read
//
// Entries of vendors, the parameters of flash memory, access control of TexFAT. A volume that is marked dirty is shown as it is, with a warning. What
// is free is told only of one without warnings whose bitmap has its own structures as used.
//
// # Sources
//
// "exFAT file system specification", revision 1.00 (learn.microsoft.com/windows/win32/fileio/exfat-specification), cited by section; what Linux
// 6.1 shows of the same disk.
package exfat
