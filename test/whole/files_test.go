package whole

import (
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestGuestFiles: what the mount shows below files/ is what the kernel's own mount of the same disk shows, in every field
// that there is.
func TestGuestFiles(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "mkfs.xfs", "mount")
	r := newRepository(t)
	kinds := []struct {
		name string
		mkfs []string
		size int64
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-O", "ea_inode"}, 3 << 30},
		{"xfs", []string{"mkfs.xfs", "-q"}, 3 << 30},
	}
	args := []string{"backup", "--vm", "guest"}
	var truths [][]guesttest.Line
	for i, k := range kinds {
		image := filepath.Join(newDir(t), k.name+".img")
		guesttest.SparseAt(t, image, k.size)
		guesttest.Run(t, append(k.mkfs, image)...)
		dir, unmount := guesttest.Mount(t, image, k.name, "rw")
		skipped, err := guesttest.Fill(dir, guesttest.Tree{Seed: uint64(i), Files: 3000, Names: 2000, Big: 16 << 20})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s refuses: %v", k.name, skipped)
		unmount()
		truths = append(truths, guesttest.Truth(t, image, k.name, ""))
		args = append(args, image)
	}
	r.must(t, args...)
	m := r.mount(t)
	for i, k := range kinds {
		got, err := guesttest.Walk(filepath.Join(m.dir, "guest/latest/files", []string{"disk0", "disk1"}[i]))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d things", k.name, len(got))
		guesttest.Same(t, truths[i], got)
	}
}
