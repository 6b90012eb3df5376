// Package machine puts together what the disks of one guest hold: its volumes, the file system of each, and, where the guest
// itself says so (/etc/fstab, or the registry of a Windows), the tree that it sees.
//
//	m := machine.Open(disks, machine.Options{})
//	for _, v := range m.Volumes {
//		f, err := v.FS()
//	}
//	for _, view := range m.Views() { … }
//
// Nothing is read before it is asked for, but for the tables of partitions and volumes. Safe for concurrent use.
package machine
