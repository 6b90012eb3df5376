// Package overlay is a writable disk over an image that never changes: what is written goes
// to a directory of its own, the rest is read from the image.
//
//	d, err := overlay.Create(dir, image, overlay.Options{Base: "id of the image"})
//	…
//	d.WriteAt(p, off)
//	d.Flush()      // what was written before is durable now
//	d.Close()
//	d, err = overlay.Open(dir, image, overlay.Options{Base: "id of the image"})
//
// The directory has five files:
//
//	data    sparse; a block of the disk, 4096 bytes, lies at its own offset
//	map     which blocks are in data, see below
//	head    size of the disk and which image it is over, twice
//	live    which blocks are in data and not in the map yet
//	log     what few blocks held when they were flushed
//
// A block of which the map says that it is in data and that is a hole there reads as zeros: that is
// what Zero and Trim leave.
//
// # map
//
// Sectors of 512 bytes, little-endian. Sector n is about blocks n·4032 to n·4032+4031:
//
//	+---------------------+------------------+--------------------+
//	| CRC-32C u32         | 0 u32            | 4032 bits, 504 B   |
//	+---------------------+------------------+--------------------+
//
// The CRC covers the number of the sector, u64, and bytes 4 to 511. A sector that is all zero, or past
// the end of the file, is about blocks none of which is in data. Bits are only ever set,
// but by a Resize to less, so a write that a power cut leaves half done is no harm: a disk writes a sector whole or not.
//
// # head
//
// Two copies of 4096 bytes, at 0 and 4096, of which the valid one with the higher sequence number counts:
//
//	+---------+-------------+---------+---------+---------+-------------+--------------+
//	| "HFOV1" | sequence    | size    | limit   | id      | length u16, | CRC-32C u32  |
//	| 8 bytes | u64         | u64     | u64     | 16      | base        | at 4092      |
//	+---------+-------------+---------+---------+---------+-------------+--------------+
//
// limit is up to where the image is still to be seen: what a Resize to less once cut off reads as
// zeros when the disk grows again.
//
// # live
//
// A guest goes on when the process that serves its disk is killed, and has it back from another one. So a
// write that was answered must not be lost then, flushed or not. The data are in the page cache, which outlives the process;
// their bits must not be written to the map before the data are on the disk. They are written to live, never synced:
//
//	+-------------+-------------------+----------+----------------------------------+
//	| "HFLIVE1" 8 | boot id           | zeros to | at (n+1)·512: 8 zeros and the    |
//	|             | of the system, 37 | byte 512 | bits of sector n of the map      |
//	+-------------+-------------------+----------+----------------------------------+
//
// It counts while the operating system is the one that it was written under, by its boot id
// (/proc/sys/kernel/random/boot_id). After a restart of the system it is ignored: what it says may not be so.
//
// # log
//
// To sync data takes a commit of the file system's journal where blocks are new in it, and then the map wants a sync of its own. A Flush of at most 64
// blocks writes them to log instead, 4 MiB that lie ready on the disk since the first such Flush, and syncs that: durable writes of a block
// by NFS, one at a time, came from 0.4 of nfs-ganesha's rate to 1.1 to 2.1 (ext4, 2026-11-22). When log is full, or more was written, or something zeroed, data and the map are synced, and
// log begins anew with another epoch.
//
//	+-------------+-----------+-------------+--------------+------------------------------------+
//	| "HFOLOG1" 8 | epoch u64 | zeros       | CRC-32C u32  | marks, to byte 4096; then records  |
//	|             |           |             | at 508       |                                    |
//	+-------------+-----------+-------------+--------------+------------------------------------+
//
// A record begins at a multiple of 4096. The CRC covers it from byte 8 on:
//
//	+--------+-------------+-----------+------------------+-------+-------+---------------+----------+------------+
//	| "HFOR" | CRC-32C u32 | epoch u64 | records before   | n u32 | 0 u32 | n numbers of  | zeros to | n blocks,  |
//	| 4      |             |           | in the epoch u64 |       |       | blocks u64    | 4096     | 4096 each  |
//	+--------+-------------+-----------+------------------+-------+-------+---------------+----------+------------+
//
// The first one that is not whole, or of another epoch, ends the log: its flush did not return. Open writes the blocks of the log to data.
// Those that were written again since, and not flushed, must be left out when only the process died: then data has what was answered. Their bits are set in the
// marks, bit n for block n after byte 4096, which are not synced, and count as long as live does.
//
// # What it promises
//
// Flush makes everything durable that was written, zeroed or trimmed before it was called: by the log, or first
// data is synced, then the sectors of the map that changed are written and synced. So a block is never taken
// from data before it is there. What was answered is there after the death of the process. What was not flushed may be
// there or not after a power cut, block by block, as on any disk. A write to a block that is in data already goes in place, as on any disk, too.
//
// No lock is held across I/O that moves data, but that the first write to a block excludes other first
// writes to the same block. First writes take turns at a write of at most 504 bytes to live, which is not synced; Resize and
// Close wait for what is at work. All methods are safe for concurrent use. A block is read from the image, or it is an error;
// damage never becomes zeros.
//
// Memory: 260 KiB for the log, 512 bytes for each 15.75 MiB of the disk that has blocks in data, and 8 for each
// that has not.
package overlay
