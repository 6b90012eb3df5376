package ext

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

var trashes = flag.Int("trashes", 8, "how many images TestTrash damages")

// TestTrash damages metadata of a filled image with debugfs' zap_block. All of it has checksums: what is shown without an error is what was there,
// but for the contents of files and long links.
func TestTrash(t *testing.T) {
	if testing.Short() {
		t.Skip("fills an image")
	}
	guesttest.Needs(t, "debugfs")
	v := variant{mkfs: []string{"-b", "1024", "-O", "ea_inode,inline_data", "-N", "3000"}, used: 64 << 20,
		tree: guesttest.Tree{Seed: 12, Files: 60, Names: 600, Big: 128 << 10, Fragments: 20, NoHuge: true}, skips: append([]string{"many xattrs"}, not1K...)}
	image := v.make(t)
	want := guesttest.Truth(t, image, "ext4", "")
	places := metadataOf(t, open(t, image, guest.Options{}), want)
	t.Logf("%d blocks of metadata", len(places))
	damaged := 0
	for seed := range *trashes {
		rng := rand.New(rand.NewPCG(uint64(seed), 3))
		var script strings.Builder
		for range 1 + rng.IntN(40) {
			off := rng.IntN(1024)
			fmt.Fprintf(&script, "zap_block -o %d -l %d -p %d %d\n", off, 1+rng.IntN(1024-off), rng.IntN(256), places[rng.IntN(len(places))])
		}
		copied := guesttest.Copy(t, image)
		guesttest.Input(t, script.String(), "debugfs", "-w", "-n", copied)
		f, err := Open(guesttest.OpenDevice(t, copied), guest.Options{})
		if err != nil {
			continue
		}
		got, err := guesttest.WalkFS(f)
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		for _, lie := range guesttest.Honest(want, got, "sum", "target") {
			t.Errorf("seed %d: %s", seed, lie)
		}
		if slices.ContainsFunc(got, func(l guesttest.Line) bool { return l.Fields["error"] != "" }) {
			damaged++
		}
		os.Remove(copied)
	}
	if t.Logf("%d with damage", damaged); damaged < *trashes/2 {
		t.Error("hardly anything was damaged")
	}
}

// metadataOf gives the blocks in use that no regular file's content is in, and neither the superblock nor the journal.
func metadataOf(t *testing.T, f *FS, all []guesttest.Line) (blocks []int64) {
	t.Helper()
	other := map[int64]bool{}
	note := func(ino guest.Ino) {
		for e, err := range f.Locate(ino) {
			if err != nil {
				t.Fatal(err)
			}
			for b := e.Off; b < e.End(); b += f.blockSize {
				other[b/f.blockSize] = true
			}
		}
	}
	for e, err := range f.Free() {
		if err != nil {
			t.Fatal(err)
		}
		for b := e.Off; b < e.End(); b += f.blockSize {
			other[b/f.blockSize] = true
		}
	}
	note(guest.Ino(f.journalIno))
	for _, l := range all {
		if l.Fields["type"] != "f" {
			continue
		}
		ino, err := guesttest.Find(f, l.Path)
		if err != nil {
			t.Fatal(err)
		}
		note(ino)
	}
	for b := int64(2); b < f.blocks; b++ {
		if !other[b] {
			blocks = append(blocks, b)
		}
	}
	return blocks
}
