package xfs

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

var trashes = flag.Int("trashes", 12, "how many images TestTrash damages")

// TestTrash reads images of which xfs_db's blocktrash, made to test xfs_repair, damaged metadata. All of that has checksums: what is shown
// without an error is what was there.
func TestTrash(t *testing.T) {
	guesttest.Needs(t, "xfs_db")
	v := variant{mkfs: []string{"-b", "size=1024", "-m", "rmapbt=1,reflink=1", "-n", "size=4096"}, size: 64 << 20,
		tree: guesttest.Tree{Seed: 4, Files: 60, Big: 128 << 10, Names: 600, Fragments: 20, NoHuge: true}}
	image := v.make(t)
	want := guesttest.Truth(t, image, "xfs", "nouuid")
	refused, wrong := 0, 0
	for seed := range *trashes {
		copied := guesttest.Copy(t, image)
		most := []int{1, 7, 1024 * 8}[seed%3] // bits
		guesttest.Run(t, "sh", "-c", fmt.Sprintf("xfs_db -x -c blockget -c 'blocktrash -s %d -n %d -x 1 -y %d -%d' %s >/dev/null 2>&1", seed, 1+seed*7%30, most, seed%4, copied))
		start := time.Now()
		fs, err := Open(guesttest.OpenDevice(t, copied), guest.Options{})
		if err != nil {
			refused++
			continue
		}
		got, err := guesttest.WalkFS(fs)
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		for _, lie := range guesttest.Honest(want, got) {
			t.Errorf("seed %d: %s", seed, lie)
		}
		if n := strings.Count(fmt.Sprint(got), "damaged"); n > 0 {
			wrong++
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("seed %d: %v", seed, d)
		}
		os.Remove(copied)
	}
	t.Logf("%d refused, %d with damage", refused, wrong)
	if wrong < *trashes/4 {
		t.Error("hardly anything was damaged")
	}
}
