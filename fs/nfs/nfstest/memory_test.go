package nfstest_test

import (
	"testing"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

func TestMemory(t *testing.T) {
	nfstest.TestFS(t, func(*testing.T) nfs.FS { return nfstest.NewMemory() })
}

func TestMemoryReopen(t *testing.T) {
	m := nfstest.NewMemory()
	nfstest.TestReopen(t, m, func() nfs.WritableFS {
		m.Crash()
		return m
	})
}

// TestReadOnly runs what is for an nfs.FS that cannot be changed.
func TestReadOnly(t *testing.T) {
	nfstest.TestFS(t, func(t *testing.T) nfs.FS {
		m := nfstest.NewMemory()
		dir, err := m.Mkdir(t.Context(), m.Root(), "dir", nfs.Change{})
		if err != nil {
			t.Fatal(err)
		}
		id, err := m.Create(t.Context(), dir, "file", nfs.Creation{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.WriteAt(t.Context(), id, make([]byte, 1000), 0); err != nil {
			t.Fatal(err)
		}
		m.AddLink("link", "dir/file")
		return struct{ nfs.FS }{m}
	})
}
