// Package boot runs a restore point as a VM at once: instant recovery.
//
//	s, err := boot.Create(ctx, root, repo, point, boot.Options{Machine: m})
//	…
//	err = s.Run(ctx, qemu.New(), func(boot.State) { /* the VM runs */ })
//
// The disks of the point are given to a Host over NBD, through an overlay that takes what the VM writes:
// the point itself never changes. A session is a directory below a root, with
//
//	boot.json       what it is: State
//	disk0/ …        an overlay per disk
//	nvram           variables of UEFI, where it boots by that
//	serial.log      what the VM printed on its serial line
//	*.sock          nbd; control (this program); and what the host makes: qmp, serial, vnc
//	lock            held by the process that serves the disks
//
// It outlives the process that serves the disks: when that dies the VM waits for its disks, and
// Open and Run give them back to it, from the same overlays under the same names. It ends with Remove.
//
// What it promises: what the guest flushed is there after the death of any process, and after a power cut
// (see package overlay); a chunk that cannot be read is an I/O error in the guest, never zeros. What it does not:
// a VM whose disks are gone waits for a time that the host sets, and sees errors then. A point that is forgotten while no process
// serves a session of it is lost to that session.
package boot
