package xfs

import (
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// dirty are images that were copied while they were mounted, after a burst of changes.
var dirty = []struct {
	variant
	steps int
}{
	{variant{"default", nil, 2 << 30, guesttest.Tree{Seed: 3, Files: 3000, Names: 5000}}, 1500},
	{variant{"1 KiB blocks", []string{"-b", "size=1024", "-m", "rmapbt=1,reflink=1", "-n", "size=8192"}, 1 << 30, small}, 1500},
	{variant{"small log", []string{"-l", "size=5m", "-b", "size=1024"}, 1 << 30, small}, 4000},
	{variant{"log stripes", []string{"-l", "su=32k,size=16m", "-s", "size=4096"}, 1 << 30, small}, 2500},
	{variant{"large log stripes", []string{"-l", "su=256k,size=32m", "-i", "nrext64=1"}, 1 << 30, small}, 600},
}

func TestDirty(t *testing.T) {
	for _, v := range dirty {
		t.Run(strings.ReplaceAll(v.name, " ", "-"), func(t *testing.T) {
			image := v.make(t)
			dir, unmount := guesttest.Mount(t, image, "xfs", "rw,logbufs=8")
			if err := guesttest.Burst(dir, 7, v.steps); err != nil {
				t.Fatal(err)
			}
			copied := guesttest.Copy(t, image)
			unmount()
			fs := open(t, copied, guest.Options{})
			if i := fs.Info(); !i.Replayed || len(i.Warnings) > 0 {
				t.Errorf("%+v", i)
			}
			want := guesttest.Truth(t, copied, "xfs", "nouuid")
			same(t, fs, want)

			stale, err := guesttest.WalkFS(open(t, copied, guest.Options{NoReplay: true}))
			if err == nil && len(guesttest.Diff(want, stale)) == 0 {
				t.Error("nothing was to be replayed")
			}
			t.Logf("%d blocks, without replay %d differences or more", fs.dev.(*guest.Overlay).Len(), len(guesttest.Diff(want, stale)))
		})
	}
}
