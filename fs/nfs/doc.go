// Package nfs serves file systems to hypervisors and other clients by NFS
// version 3, with the MOUNT protocol and a portmapper.
//
//	s := &nfs.Server{Log: log}
//	err := s.Export(nfs.Export{Path: "/vm", ID: 7, FS: tree, Clients: []netip.Prefix{esx}})
//	err = s.Listen(":2049")
//	err = s.ListenPortmap(":111") // a hint for the user if it is nfs.ErrPortmapInUse
//	err = s.Serve(ctx)            // until ctx ends
//
// What it promises: a write that was answered as stable, and one that was
// followed by a COMMIT with the same verifier, is durable if the FS keeps the
// promise of Sync; file handles are made of the IDs of the export and the file
// alone, so clients go on after a restart; what clients say never makes it hold
// more than its Limits; a client that does not take its replies holds up nobody
// else; a call that panics in an FS is an error to its client and a line of the
// log.
//
// What it does not do: NFS over UDP, versions 2 and 4, locking (NLM), ACLs, hard
// links, making symbolic links and special files, Kerberos. AUTH_SYS believes
// every permitted address who its users are.
package nfs
