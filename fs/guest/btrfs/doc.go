// Package btrfs reads Btrfs, on one device or several, as guest.FS.
//
//	fs, err := btrfs.Open(dev, guest.Options{})
//
// # What it reads
//
// All checksums (CRC-32C, xxHash, SHA-256, BLAKE2b) are verified, on metadata and on data. What does not match is read from the next copy, where
// the profile has one, and is [guest.ErrDamaged] otherwise. Profiles: single, DUP, RAID0, RAID1, RAID1C3, RAID1C4, RAID10, and RAID5 and RAID6 as
// long as no parity is needed. Files: inline, regular and preallocated extents, uncompressed or as zlib, LZO and Zstandard, shared or
// not. The top level is the root; subvolumes and snapshots are folders where they are linked, and [FS.Default] is the one that
// a mount shows which names none.
//
// The log, which holds what was made durable by fsync since the last commit, is replayed into memory. The kernel gives a file that loses one of its
// names by that the time of the replay as its ctime; here it has the one that it had. A log that is damaged is left out, with a warning.
//
// # What it does not read
//
// Zoned file systems, extent trees of version 2, the RAID stripe tree and encrypted files: refused by name. Seed
// devices. The Merkle trees of fs-verity are not verified.
//
// # Sources
//
// "On-disk Format", "Btrees" and "Filesystem limits" of the Btrfs documentation (btrfs.readthedocs.io), cited as BTRFS; "LZO stream
// format as understood by Linux's LZO decompressor" (docs.kernel.org, staging/lzo). What those do not say was seen on images that Linux 6.18 and
// btrfs-progs 6.2 made, with "btrfs inspect-internal dump-tree".
package btrfs
