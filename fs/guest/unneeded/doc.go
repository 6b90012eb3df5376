// Package unneeded finds what a backup of a guest's disks need not hold: what it swapped out, and blocks that its file
// systems do not use.
//
//	found := unneeded.Find(disks, unneeded.Options{Swap: true, Free: true, Unit: chunkSize})
//	for e := range found.Ranges(0) { … }
//
// Only what is certain is found: a volume that is not at one place of one disk each, whose file system has no reader, a damaged
// journal or anything else odd about it, is left as it is, and Notes say why. A swap area keeps its first
// 64 KiB, and with them its header and name, so that the guest finds it again; one with a hibernated system in it is needed.
package unneeded
