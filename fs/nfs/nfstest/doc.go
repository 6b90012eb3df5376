// Package nfstest tests what is served by NFS: TestFS is what every nfs.FS must
// pass, Memory is the smallest one that does, and Client speaks NFS version 3
// call by call, with an encoding of its own.
//
//	nfstest.TestFS(t, func(t *testing.T) nfs.FS { return open(t.TempDir()) })
//
//	c, err := nfstest.Dial(addr, nfstest.Root)
//	root, err := c.Mount("/vm")
//	res, err := c.Read(root, 0, 4096) // err is nfstest.IsDir
package nfstest
