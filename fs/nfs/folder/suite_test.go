package folder_test

import (
	"testing"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/folder"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

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
