// Package ntfs reads NTFS 3.x, the file system of Windows, on a disk that somebody else wrote.
//
//	fsys, err := ntfs.Open(dev, guest.Options{})
//
// # What it reads
//
//   - Volumes with sectors of 256 to 4096 bytes and clusters up to 2 MiB, MFT records of 512 bytes to 16 KiB; the boot sector's copy
//     when the first is gone, and $MFTMirr for the first records.
//   - All of a file's attributes, wherever an attribute list spreads them; sparse and fragmented data, what lies behind the
//     valid length (zeros), LZNT1 compression, and what Windows compresses with CompactOS (WOF with XPRESS or LZX).
//   - Alternate data streams, as [FS.Streams] and, where their value is at most 64 KiB, as "user." attributes: both are what ntfs-3g shows.
//   - Symbolic links, junctions, those of WSL, and the special files of Interix, which ntfs-3g writes too.
//   - Security descriptors (of $Secure, or the file's own) and other things of Windows as the "system.ntfs_" attributes of ntfs-3g,
//     which that hides from a listing: ntfs_acl, ntfs_attrib, ntfs_dos_name, ntfs_ea, ntfs_object_id (the
//     16 bytes of the file itself), ntfs_reparse_data, ntfs_times.
//
// # How it shows them
//
// As ntfs-3g(8) does when it is given no options: every file belongs to root and all may do everything with it (mode 0777), except
// where WSL noted an owner and a mode ($LXUID …). The names of system files ($MFT …) and the short names of DOS are found and
// not listed. Names differ by case.
//
// The target of a link has slashes. A relative one is taken from the link's directory, each name as the directory has it when one
// differs by case only. An absolute one names a drive, which no disk tells: when the rest is on this volume, the link leads there, by a relative path;
// otherwise it leads nowhere, to "C:/x", "UNC/server/share" or "Volume{…}".
//
// An inode number is a file reference: the number of the record and, in the upper 16 bits, its sequence number. A reference to a record that was used again is damage.
//
// # What it does not read
//
// Encrypted files (EFS), files of which Windows has the data elsewhere (deduplicated, in the cloud, in a WIM image, on tape) and those that a filter
// of Windows makes up: their content is [guest.ErrUnsupported], never zeros. The journal ($LogFile) is not replayed: [guest.Info] has a warning when it holds changes.
//
// # Sources
//
// R. Russon, Y. Fledel, "NTFS Documentation" (flatcap.github.io/linux-ntfs/ntfs), below "NTFS doc"; [MS-FSCC] for reparse points, attributes
// and extended attributes; [MS-XCA] for LZNT1 and XPRESS; [MS-PATCH] for LZX; [MS-DTYP] for security descriptors; and what ntfs-3g 2022.10.3 shows of the same disk.
package ntfs
