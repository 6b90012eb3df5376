package ext

import (
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// dirty is a way to leave changes in a journal.
type dirty struct {
	variant
	options string // of the mount that makes the changes
	steps   int
}

func dirties() []dirty {
	tree := guesttest.Tree{Seed: 20, Files: 300, Names: 300, Big: 1 << 20}
	v := func(name string, mkfs ...string) variant {
		return variant{name: name, mkfs: mkfs, tree: tree, skips: append(append(append([]string{}, noLarge...), noExtents...), not1K...)}
	}
	return []dirty{
		{v("ext3", "-t", "ext3"), "data=ordered", 300},
		{v("ext4"), "data=ordered", 300},
		{v("data in the journal", "-b", "1024"), "data=journal", 200},
		{v("no checksums", "-O", "^metadata_csum"), "data=ordered", 200},
		{v("first checksums", "-O", "^metadata_csum"), "journal_checksum", 200},
		{v("first checksums, async", "-O", "^metadata_csum,^64bit"), "journal_async_commit,data=writeback", 200},
		{v("async", "-b", "1024"), "journal_async_commit,data=writeback", 200},
		{v("32 bits", "-b", "1024", "-O", "^64bit"), "data=ordered", 200},
		{v("fast_commit", "-O", "fast_commit"), "data=ordered", 300},
	}
}

// make makes an image, and a copy of it while changes are in its journal and not yet in their places.
func (d dirty) make(t *testing.T, burst func(dir string) error) string {
	t.Helper()
	image := d.variant.make(t)
	dir, unmount := guesttest.Mount(t, image, "ext4", "rw,commit=1000,"+d.options)
	if err := burst(dir); err != nil {
		t.Fatal(err)
	}
	copied := guesttest.Copy(t, image)
	unmount()
	return copied
}

func TestDirty(t *testing.T) {
	for _, d := range dirties() {
		t.Run(d.name, func(t *testing.T) {
			image := d.make(t, func(dir string) error { return guesttest.Burst(dir, 5, d.steps) })
			want := guesttest.Truth(t, image, "ext4", "")
			f := open(t, image, guest.Options{})
			got, err := guesttest.WalkFS(f)
			if err != nil {
				t.Fatal(err)
			}
			guesttest.Same(t, want, got)
			if i := f.Info(); len(i.Warnings) > 0 || !i.Replayed {
				t.Error(i)
			}
			t.Log(len(want), f.Info(), "blocks replayed: ", f.dev.(*guest.Overlay).Len())
			stale, err := guesttest.WalkFS(open(t, image, guest.Options{NoReplay: true}))
			if n := len(guesttest.Diff(want, stale)); n < 20 && err == nil {
				t.Errorf("without replay, only %d differences", n)
			}
		})
	}
}
