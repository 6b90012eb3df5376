// Package xfs reads XFS, versions 4 and 5, as guest.FS.
//
//	fs, err := xfs.Open(dev, guest.Options{})
//
// # What it reads
//
// Inodes of versions 1 to 3 with big times and large extent counts, files in all forms of the extent map (shared ones
// too), directories in all their forms and block sizes, with and without file types, case-insensitive ones, symbolic
// links and extended attributes inside and outside of the inode. Checksums of version 5 are verified on all metadata;
// what does not match is [guest.ErrDamaged], and the rest goes on being readable. A damaged superblock is replaced
// by the copy of another allocation group.
//
// The log is replayed into memory: buffers, inodes and freshly made inodes, with cancelled buffers and sequence numbers
// obeyed. A record at the log's end that was torn ends the log before it, as it does for the kernel. Of what the kernel
// does after that, only changes of a file's mapping that the log announces are carried out. Freeing unlinked
// inodes and extents changes nothing that can be seen. Attributes whose change is announced are [guest.ErrUnsupported]. A
// log that cannot be replayed is a warning in Info, and the disk is shown as it is.
//
// # What it does not read
//
// Files on a real-time device, logs on a device of their own (shown as the disk is, with a warning), metadata
// directories, zoned devices, logs of machines with the other byte order, directories of version 1. Quota is
// ignored, and so are project ids.
//
// # Sources
//
// "XFS Algorithms & Data Structures", 3rd edition (xfs-documentation, design/XFS_Filesystem_Structure), cited as XFSDS
// with the name of the chapter; "XFS Delayed Logging Design" and "XFS Self Describing Metadata" of the same place.
// What those do not say (feature bits newer than they are, how big times are stored, the order in which a transaction's
// items are replayed) was checked against images that Linux 6.18 and xfsprogs 6.1 made.
package xfs
