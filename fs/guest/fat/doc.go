// Package fat reads FAT12, FAT16 and FAT32, with the long names of VFAT, on a disk that somebody else wrote.
//
//	fsys, err := fat.Open(dev, guest.Options{})
//
// # What it reads
//
//   - Sectors of 512 to 4096 bytes, clusters of 1 to 128 sectors; the copy of the boot sector when the first of FAT32 is gone; the table that the
//     flags of FAT32 name as active. A volume whose table has 32-bit numbers is FAT32, however few clusters it has.
//   - Long names, as far as their checksum belongs to the short name behind them; otherwise the short name (code page 437) is shown, in lower case where
//     Windows NT notes that. A short name is found, too, and case makes no difference to a look for a name.
//
// # How it shows them
//
// As Linux does with "-t vfat -o utf8,tz=UTC" and an umask of 022: everything belongs to root, directories and files have the mode 0755, files that may
// only be read 0555. A file's ctime is its mtime, btime has 10 ms, mtime 2 s, atime a day; times of the root directory are those
// of 1970. A directory has as many links as there are directories in it, and two. Blocks are those that the size needs.
//
// The number of an inode is the place of its entry on the device, in units of 32 bytes; that of the root is 1.
//
// Unlike Linux, a directory ends at the first entry that was never used, as the specification has it.
//
// # What it does not read
//
// Extended attributes of OS/2. A volume that was not unmounted is shown as it is, with a warning: there is no journal. What is free is told only of one without
// warnings whose copies of the table agree.
//
// # Sources
//
// Microsoft, "FAT: General Overview of On-Disk Format" 1.03 (fatgen103), below "fatgen"; what Linux 6.1 shows of the same disk.
package fat
