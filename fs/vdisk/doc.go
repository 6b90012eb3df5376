// Package vdisk knows virtual disk file formats: it reads raw, qcow2, VMDK,
// VHDX and VHD files, and computes VHDX, VHD, VMDK and qcow2 files over any disk without
// storing them.
//
// A computed file is a pure function of a [Source] and an [Identity]: the same
// disk gives the same bytes after every restart, at every offset, in any order.
// Restoring a disk as VHDX is copying the computed file; exporting it is
// serving its ReadAt.
//
//	f, err := vdisk.VHDX(disk, id) // walks disk.Allocated once, reads no data
//	…
//	n, err := f.ReadAt(p, off)     // safe for concurrent use, allocates nothing
//
//	img, err := vdisk.OpenChain("/images/vm.vmdk", vdisk.Policy{})
//	defer img.Close()              // img is a Source: any format, with extents, backing files and parents
//
// A streamOptimized VMDK that comes over a connection is read as it comes, by [ReadStreamVMDK].
//
// What it promises: a read error of the disk is returned, never papered over
// with zeros or short data; a damaged image is [ErrCorrupt] with the file and
// the offset; nothing an image says makes it allocate more than its caches hold.
//
// What it does not do: write or repair images (but for the compressed VMDK of
// [WriteStreamOptimized]), replay the journal of a seSparse disk (the log of a VHDX is
// replayed, in memory), decrypt, follow qcow2 external data files, read physical disks through
// a VMDK, or show internal snapshots.
package vdisk
