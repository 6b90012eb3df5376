// Package nbd speaks the Network Block Device protocol, as a server of disks
// and as a client of other servers. It knows nothing of what a disk is made of.
//
//	ln, err := nbd.Listen("unix:/run/disk.sock")
//	s := &nbd.Server{Exports: []nbd.Export{{Name: "disk0", Disk: disk}}, Log: log}
//	err = s.Serve(ctx, ln) // until ctx ends
//
//	c, err := nbd.Dial(ctx, "nbd+unix:///disk0?socket=/run/disk.sock", nbd.ClientOptions{})
//	defer c.Close()
//	n, err := c.ReadAt(p, off)
//
// What it promises: a read that the disk cannot answer is an error at the
// client, never zeros or short data; what the other side says never makes it
// allocate more than the limits it was given; a flush that was answered covers
// every write answered before it on any connection, if the disk's Flush does; a
// panic in a Disk ends the process, as any other would.
//
// What it does not do: oldstyle negotiation, extended headers, resizing, the
// kernel's /dev/nbdN (nbd-client does that with our server), reconnecting.
//
// "proto" in comments is doc/proto.md, "uri" is doc/uri.md of
// github.com/NetworkBlockDevice/nbd.
package nbd
