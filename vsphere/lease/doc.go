// Package lease reads a disk that a vSphere export lease sends: a streamOptimized VMDK that comes once,
// from its beginning to its end, over a connection that cannot seek.
//
//	d := lease.New(lease.Options{Name: "web01 disk0", Size: capacity, Open: get})
//	defer d.Close()
//	for e, err := range d.Extents(ctx) { … } // as the stream comes
//	n, err := d.ReadAt(p, off)               // by others at the same time, about in that order
//
// A window of the stream is held in memory, packed as it came. Who reads unpacks, so several
// readers use several cores. What was read is given up; what is between the grains reads as zeros.
//
// What it promises: no zeros for what did not come or was given up already, but an error; a disk whose extents
// and whose last byte were read without an error is whole: the stream's own tables were held against its grains. A
// lost connection is taken up again, where it ended or, compared with what came before, from the
// beginning. Nobody waits for ever for somebody else who reads the same disk (see Options.Patience).
//
// What it does not do: read at any place, or twice: Extents begins the stream anew.
package lease
