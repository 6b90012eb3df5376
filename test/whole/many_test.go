package whole

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote"
)

// addPoints commits n points of the disk that a VM's last point has, as vms
// VMs had been backed up every hour. It does so directly: n runs of the program take too long.
func (r *repository) addPoints(t *testing.T, from kept, n, vms int) {
	t.Helper()
	b, err := bucket.OpenLocal(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	// A commit looks at all points there are, anew after each: too slow here.
	open := func(ctx context.Context, id [16]byte, check store.IndexCheck) (store.Index, error) {
		x, err := remote.Index(r.dir)(ctx, id, check)
		return frozen{x}, err
	}
	repo, err := store.Open(t.Context(), b, open, store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte(r.password), nil },
		Warn:       func(s string) { t.Error(s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := repo.Close(); err != nil {
			t.Error(err)
		}
	}()
	like, err := repo.Find(t.Context(), from.ID)
	if err != nil {
		t.Fatal(err)
	}
	p, err := repo.Point(t.Context(), like.ID)
	if err != nil {
		t.Fatal(err)
	}
	work := make(chan int)
	go func() {
		defer close(work)
		for i := range n {
			work <- i
		}
	}()
	failed := make(chan error)
	const workers = 16 // each commit waits for fsync
	for range workers {
		go func() {
			var err error
			for i := range work {
				if err == nil {
					err = commitLike(t.Context(), repo, *p, fmt.Sprintf("vm%03d", i%vms), i/vms)
				}
			}
			failed <- err
		}()
	}
	for range workers {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}

// frozen is an index that does not say that points come, so that nobody lists them again.
type frozen struct{ store.Index }

func (frozen) Generation(context.Context) (uint64, error) { return 1, nil }

// commitLike commits a point with p's disks.
func commitLike(ctx context.Context, repo *store.Repo, p store.Point, vm string, hour int) error {
	d, err := repo.NewDraft(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	p.VM.Name, p.Time = vm, time.Date(2025, 1, 1, hour, 0, 0, 0, time.UTC)
	return d.Commit(ctx, &p)
}

// TestManyPoints looks at a repository of 10,000 points: how long until the first
// byte of a mount, and with how much memory. The times are printed and not judged.
func TestManyPoints(t *testing.T) {
	needs(t, "fuse")
	const n, vms = 10_000, 20
	r, k := newKept(t)
	if os.Geteuid() == 0 {
		// Each point made waits for fsync several times, which memory does at once.
		at, _ := kernelMount(t, "-t", "tmpfs", "-o", "mode=755,size=1g", "none")
		tool(t, "cp", "-a", r.dir, at+"/repo")
		r.dir = at + "/repo"
	}
	began := time.Now()
	r.addPoints(t, k, n, vms)
	t.Logf("made %d points in %.1fs", n, time.Since(began).Seconds())
	if t.Failed() {
		return
	}
	listed := r.must(t, "points", "--json")
	if got := strings.Count(listed.out, "\n"); got != n+1 {
		t.Errorf("%d points are listed, want %d", got, n+1)
	}
	again := r.must(t, "points", "vm007")
	t.Logf("points: %.2fs, %d MiB; of one VM: %.2fs", listed.took.Seconds(), listed.rss>>20, again.took.Seconds())

	for _, index := range []string{"as it was closed", "lost"} {
		if index == "lost" {
			r.withoutIndex(t)
		}
		began = time.Now()
		m := r.mount(t)
		mounted := time.Since(began)
		tool(t, "head", "-c", "1", m.dir+"/vm007/latest/disk0.raw")
		first := time.Since(began)
		tool(t, "cmp", k.copy, m.dir+"/vm019/latest/disk0.raw")
		began = time.Now()
		if got := strings.Count(names(t, m.dir+"/vm000"), "Z"); got != n/vms {
			t.Errorf("the VM has %d points, want %d", got, n/vms)
		}
		all, err := filepath.Glob(m.dir + "/vm*/*/disk0.raw")
		if err != nil || len(all) != n+vms { // and latest of each
			t.Errorf("%d disks in the mount, want %d; %v", len(all), n+vms, err)
		}
		rss, err := highWater(m.cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("index %s: mounted after %.3fs, first byte after %.3fs; all %d points looked at in %.2fs; %d MiB",
			index, mounted.Seconds(), first.Seconds(), n, time.Since(began).Seconds(), rss>>20)
		if rss > 300*mib {
			t.Errorf("the mount used %d MiB", rss>>20)
		}
		m.stop(t, terminate)
	}
	p, res := r.backup(t, "--vm", "vm003", k.copy)
	t.Logf("one more backup: %.2fs, %d MiB", res.took.Seconds(), res.rss>>20)
	r.reads(t, kept{p, k.copy})
	r.must(t, "verify")
}
