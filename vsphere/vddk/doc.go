// Package vddk reads and writes disks of VMware vSphere through VMware's own library, VDDK. That library is not
// ours to give away and cannot be linked: nbdkit's vddk plugin loads it, in a process of its own, and serves one disk to
// us over NBD. The user installs nbdkit with that plugin and VDDK.
//
//	d, err := vddk.Open(ctx, vddk.Options{Server: "vc.example", User: u, Password: pw, Thumbprint: sha1, VM: "vm-16",
//		Snapshot: "snapshot-17", File: "[store1] web01/web01.vmdk"})
//	defer d.Close()
//	n, err := d.ReadAt(p, off)
//
// What it promises:
//   - The password is in no argument, no environment variable and no file: nbdkit gets it through a pipe.
//   - When nbdkit or its connection ends, a disk that is only read starts nbdkit again and repeats the read. A disk that is
//     written does not: what was written since the last Flush may be lost, and every later call says so.
//   - nbdkit does not outlive its Disk, nor the process, even one that is killed.
//
// It is tested with nbdkit 1.32 and other plugins in the place of the vddk one, and once by hand with that one and the stand-in for
// VDDK of nbdkit's own tests. It has not run with VDDK itself.
package vddk
