package xfs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestCrash shuts a file system down while several work in it (XFS_IOC_GOINGDOWN without writing the log), which leaves what a
// crash leaves: transactions that were not yet committed, records in flight, changes that were only announced.
func TestCrash(t *testing.T) {
	guesttest.Needs(t, "xfs_io")
	rounds := 2
	if n, err := strconv.Atoi(os.Getenv("XFS_CRASHES")); err == nil {
		rounds = n
	}
	image := variant{"crash", []string{"-l", "size=6m", "-b", "size=1024", "-m", "rmapbt=1"}, 600 << 20, tiny}.empty(t)
	for round := range uint64(rounds) {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
			var all sync.WaitGroup
			for worker := range uint64(4) {
				c := &churn{t: t, dir: fmt.Sprint(dir, "/", worker), rng: rand.New(rand.NewPCG(round, worker)), crash: true}
				all.Go(func() {
					for start := time.Now(); time.Since(start) < 2*time.Second; {
						c.run(20)
						c.share()
						c.share()
					}
				})
			}
			time.Sleep(time.Second + time.Duration(round*37%800)*time.Millisecond)
			guesttest.Run(t, "xfs_io", "-x", "-c", "shutdown", dir)
			all.Wait()
			unmount()
			fs := open(t, image, guest.Options{})
			for ino, p := range fs.log.patched {
				t.Logf("inode %d: %d blocks more by what was only announced", ino, p.added)
			}
			if w := fs.Info().Warnings; len(w) > 0 {
				t.Error(w)
			}
			guesttest.SameFS(t, guesttest.Truth(t, image, "xfs", "nouuid"), fs)
		})
	}
}
