// Package cluster is what FAT and exFAT have in common: chains of clusters that a file allocation table makes, and directories of slots of
// 32 bytes that lie in them.
//
//	table := &cluster.Table{Dev: dev, Data: dataStart, Size: 4096, Count: clusters, Links: links}
//	err := table.Chain(first).ReadAt(dev, p, off)
//
// A chain is followed to its end before anything behind its first cluster is read, so that one which goes in a circle gives
// [guest.ErrDamaged] and no data twice. One that breaks off can be read up to there. What is kept of a chain is bounded, however many pieces
// it has, and random access costs no more than a bounded number of steps for each of them.
package cluster
