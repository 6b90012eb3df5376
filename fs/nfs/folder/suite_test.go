package folder_test

import (
	"os"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/folder"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// TestExclusiveServed: an exclusive creation through the server that is sent again, by a client that has not heard of it, is the same one.
func TestExclusiveServed(t *testing.T) {
	f, err := folder.Open(t.TempDir(), nil, folder.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	srv := nfs.Server{}
	if err := srv.Export(nfs.Export{Path: "/vm", ID: 1, FS: f, Writable: true, NoRootSquash: true}); err != nil {
		t.Fatal(err)
	}
	if err := srv.Listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	go srv.Serve(t.Context())
	defer srv.Close()
	cred := nfstest.Root
	if os.Geteuid() != 0 {
		t.Skip("files are made for root")
	}
	c, err := nfstest.Dial(srv.Addr().String(), cred)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	root, err := c.Mount("/vm")
	if err != nil {
		t.Fatal(err)
	}
	first, err := c.CreateExclusive(root, ".lck-1", 7)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.CreateExclusive(root, ".lck-1", 7)
	if err != nil || string(again.FH) != string(first.FH) {
		t.Errorf("sent again: %+v, %v, not %+v", again, err, first)
	}
	if _, err := c.CreateExclusive(root, ".lck-1", 8); err == nil {
		t.Error("another creation is taken for the same one")
	}
}

// TestSuite: a folder is what the server of the protocol expects.
func TestSuite(t *testing.T) {
	nfstest.TestFS(t, func(t *testing.T) nfs.FS {
		f, err := folder.Open(t.TempDir(), nil, folder.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	})
}
