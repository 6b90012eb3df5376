package xfs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// dirty are images that were copied while they were mounted, after bursts of changes.
var dirty = []struct {
	variant
	steps  int // of guesttest.Burst
	rounds int // each with a copy
}{
	{variant{"default", nil, 2 << 30, guesttest.Tree{Seed: 3, Files: 3000, Names: 3000}}, 700, 1},
	{variant{"1 KiB blocks", []string{"-b", "size=1024", "-m", "rmapbt=1,reflink=1", "-n", "size=8192"}, 1 << 30, tiny}, 200, 2},
	{variant{"small log", []string{"-l", "size=5m", "-b", "size=1024"}, 1 << 30, tiny}, 700, 3},
	{variant{"log stripes", []string{"-l", "su=32k,size=16m", "-s", "size=4096", "-m", "bigtime=0"}, 1 << 30, tiny}, 300, 2},
	{variant{"large log stripes", []string{"-l", "su=256k,size=32m", "-i", "nrext64=1"}, 1 << 30, tiny}, 50, 2},
}

// tiny leaves the time to the log.
var tiny = guesttest.Tree{Seed: 2, Files: 130, Big: 1 << 20, Names: 300, NoHuge: true}

func TestDirty(t *testing.T) {
	for _, v := range dirty {
		t.Run(strings.ReplaceAll(v.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			image := v.make(t)
			dir, unmount := guesttest.Mount(t, image, "xfs", "rw,logbufs=8")
			defer unmount()
			c := &churn{t: t, dir: dir + "/churn", rng: rand.New(rand.NewPCG(1, 2))}
			for round := range v.rounds {
				if err := guesttest.Burst(dir, uint64(round), v.steps); err != nil {
					t.Fatal(err)
				}
				c.run(100)
				compareReplay(t, guesttest.Copy(t, image))
			}
		})
	}
}

// compareReplay compares what a reader makes of an image with what the kernel does.
func compareReplay(t *testing.T, image string) {
	t.Helper()
	fs := open(t, image, guest.Options{})
	if i := fs.Info(); !i.Replayed || len(i.Warnings) > 0 {
		t.Errorf("%+v", i)
	}
	want := guesttest.Truth(t, image, "xfs", "nouuid")
	guesttest.SameFS(t, want, fs)
	raw := open(t, image, guest.Options{NoReplay: true})
	stale, err := guesttest.WalkFS(raw)
	if err == nil && len(guesttest.Diff(want, stale)) == 0 {
		t.Error("nothing was to be replayed")
	}
	ring := &ring{dev: raw.dev, size: fs.sb.logLen << fs.sb.blockLog / sector, uuid: fs.sb.uuid}
	ring.off, _ = fs.sb.offset(fs.sb.journal, 1)
	s, err := ring.stretch()
	t.Logf("sectors %d to %d of %d, %d blocks replaced; without it %d differences or more (%v)", s.tail, s.head, ring.size,
		fs.dev.(*guest.Overlay).Len(), len(guesttest.Diff(want, stale)), err)
}

// TestGrown replays a log that has the superblock in it: of a file system that has just grown, and whose UUID is not that of its metadata.
func TestGrown(t *testing.T) {
	guesttest.Needs(t, "xfs_growfs", "xfs_admin")
	v := variant{"grown", []string{"-d", "size=400m", "-b", "size=1024"}, 900 << 20, tiny}
	image := v.make(t)
	guesttest.Run(t, "xfs_admin", "-U", "generate", image)
	dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
	defer unmount()
	guesttest.Run(t, "xfs_growfs", dir)
	c := &churn{t: t, dir: dir + "/churn", rng: rand.New(rand.NewPCG(8, 2))}
	for i := range 30 {
		c.must(os.MkdirAll(fmt.Sprint(dir, "/spread ", i), 0o755))
	}
	c.run(150)
	copied := guesttest.Copy(t, image)
	compareReplay(t, copied)
	if size := open(t, copied, guest.Options{}).Info().Size; size != 900<<20 {
		t.Errorf("%d bytes", size)
	}
}
