// Package volume finds what may carry a file system on the disks of a virtual machine: partitions, logical volumes,
// RAID arrays and what encryption hides. It only reads.
//
//	volumes, warnings := volume.Scan([]volume.Disk{{Name: "disk0", Device: dev}}, volume.Options{})
//	for _, v := range volumes {
//		fmt.Println(v.Name, v.Kind, v.Signature, v.Detail, v.Err) // disk0/p1 partition ext4 Linux filesystem <nil>
//	}
//
// # What it reads
//
//   - MBR with logical partitions, GPT with its backup, of 512 to 4096 bytes a sector; disks without either.
//   - LVM2: linear, striped, mirror, raid0 to raid10, thin volumes and snapshots, snapshots of the old kind, caches
//     that hold nothing of their own.
//   - Linux md arrays, superblocks 0.90 and 1.x: linear and RAID 0, 1, 4, 5, 6, 10; degraded ones are computed.
//   - LUKS 1 and 2, with a key.
//   - BitLocker of Windows 7 and later, and To Go, with a password, a recovery password, an external key (.BEK file), or
//     nothing while protection is suspended; the layout of Vista as the document has it, never seen in a real volume.
//
// These nest as a guest nests them, to a bounded depth.
//
// # What it does not
//
// What is known but not readable is in the list with the reason: [guest.ErrUnsupported] (Storage Spaces, dynamic disks,
// VDO, an array in the middle of a reshape, BitLocker in the middle of a conversion …), [ErrLocked] (no key fits), [guest.ErrDamaged] (a part is missing).
// Bytes that are not there are never zeros.
//
// # Sources
//
// UEFI Specification 2.10 §5 (GPT, MBR); the LVM documentation of libvslvm ("LVM format specification") and lvm(8); md(4), the Linux RAID
// wiki ("RAID superblock formats"), H. P. Anvin, "The mathematics of RAID-6"; the kernel's
// Documentation/admin-guide/device-mapper; LUKS1 On-Disk Format 1.2.3, LUKS2 On-Disk Format 1.1; J. Metz, "BitLocker
// Drive Encryption (BDE) format specification" 0.0.16 (libbde's documentation), N. Ferguson, "AES-CBC + Elephant diffuser".
package volume
