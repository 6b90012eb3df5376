package ext

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestWrittenByDebugfs replays journals that debugfs writes, with every kind of checksum, and compares each block that they touch with what
// the kernel makes of a copy.
func TestWrittenByDebugfs(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "debugfs", "mount")
	const first = 30000
	for _, mkfs := range [][]string{{"-b", "1024"}, {"-b", "1024", "-O", "^64bit"}, {"-b", "4096"}, {"-b", "4096", "-O", "^64bit,^metadata_csum"}} {
		for _, sums := range []string{"", "-c -v 2", "-c -v 3"} {
			if sums != "" && strings.Contains(mkfs[len(mkfs)-1], "^metadata_csum") {
				continue // Linux 6.18 does not mount that
			}
			t.Run(strings.Join(mkfs, " ")+sums, func(t *testing.T) {
				image := guesttest.Sparse(t, 200<<20)
				guesttest.Run(t, append(append([]string{"mkfs.ext4", "-q", "-F"}, mkfs...), image)...)
				bs := open(t, image, guest.Options{}).blockSize
				journalWithDebugfs(t, image, sums, bs)
				replayed := guesttest.Copy(t, image)
				_, unmount := guesttest.Mount(t, replayed, "ext4", "rw")
				unmount()
				f := open(t, image, guest.Options{})
				if i := f.Info(); !i.Replayed || len(i.Warnings) > 0 {
					t.Fatal(i)
				}
				want, got := make([]byte, 16*bs), make([]byte, 16*bs)
				if err := guest.ReadFull(guesttest.OpenDevice(t, replayed), want, first*bs); err != nil {
					t.Fatal(err)
				}
				if err := guest.ReadFull(f.dev, got, first*bs); err != nil {
					t.Fatal(err)
				}
				for i := range int64(16) {
					if !bytes.Equal(want[i*bs:][:bs], got[i*bs:][:bs]) {
						t.Errorf("block %d", i)
					}
				}
				if bytes.Equal(want, make([]byte, len(want))) {
					t.Error("nothing was replayed")
				}
			})
		}
	}
}

// journalWithDebugfs writes blocks, revokes some, and writes some of these again. Some begin with the journal's magic number.
func journalWithDebugfs(t *testing.T, image, sums string, bs int64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(3, 3))
	dir := t.TempDir()
	data := func(name string, blocks int) string {
		b := make([]byte, bs*int64(blocks))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		for i := range blocks {
			if i%3 == 1 {
				copy(b[int64(i)*bs:], "\xc0\x3b\x39\x98")
			}
		}
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	cmds := []string{"jo " + sums,
		"jw -b 30000,30001,30002,30003,30004,30005,30006,30007,30008 " + data("a", 9),
		"jw -r 30000,30001,30002,30003",
		"jw -b 30001,30002,30010 " + data("b", 3),
		"jw -r 30002,30011",
		"jw -b 30008,30011,30012 " + data("c", 3), "jc"}
	script := filepath.Join(dir, "commands")
	if err := os.WriteFile(script, []byte(strings.Join(cmds, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "debugfs", "-w", "-f", script, image)
}

// patch writes into an image.
func patchImage(t *testing.T, image string, off int64, b []byte) {
	t.Helper()
	w, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// logOf lists where the blocks of a kind are in a journal, bytes of the device.
func logOf(t *testing.T, image string, kind uint32) (*journal, []int64) {
	t.Helper()
	f := open(t, image, guest.Options{NoReplay: true})
	j, err := f.openJournal()
	if err != nil {
		t.Fatal(err)
	}
	var list []int64
	at := j.start
	err = j.walk(func(l *logBlock) (bool, error) {
		if l.kind == kind {
			off, err := j.place(at)
			if err != nil {
				return false, err
			}
			list = append(list, off)
		}
		at = j.wrap(at, 1+int64(len(l.tags)))
		return true, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return j, list
}

// TestCut takes away the commit block of a transaction, as a crash before it does: the kernel, and this package, go up to there.
func TestCut(t *testing.T) {
	for i, d := range []dirty{dirties()[1], dirties()[4]} {
		if testing.Short() && i > 0 {
			break
		}
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			d.tree.Files, d.tree.Names = 50, 50
			image := d.make(t, func(dir string) error { return guesttest.Burst(dir, 6, 100) })
			_, commits := logOf(t, image, kindCommit)
			if len(commits) < 20 {
				t.Fatal(len(commits), " transactions")
			}
			var last []guesttest.Line
			for _, i := range []int{len(commits) - 1, len(commits) / 2, 3} {
				patchImage(t, image, commits[i], make([]byte, 512))
				want := guesttest.Truth(t, image, "ext4", "")
				f := open(t, image, guest.Options{})
				got, err := guesttest.WalkFS(f)
				if err != nil || len(f.info.Warnings) > 0 {
					t.Fatal(f.info, err)
				}
				guesttest.Same(t, want, got)
				if len(guesttest.Diff(last, got)) == 0 {
					t.Error("nothing was cut off")
				}
				last = got
			}
		})
	}
}

// TestWrapped replays a log that goes on at the beginning of its ring.
func TestWrapped(t *testing.T) {
	d := dirty{variant{mkfs: []string{"-b", "1024", "-J", "size=1"}, tree: guesttest.Tree{Seed: 4, Files: 20, Names: 20, Big: 1 << 20, Fragments: 5}, skips: slices.Concat(noLarge, not1K)}, "data=journal", 0}
	for seed := uint64(1); ; seed++ {
		image := d.make(t, func(dir string) error { return guesttest.Burst(dir, seed, 60) })
		_, commits := logOf(t, image, kindCommit)
		if len(commits) < 2 || slices.IsSorted(commits) {
			if seed > 20 {
				t.Fatal("no log wraps")
			}
			continue
		}
		want := guesttest.Truth(t, image, "ext4", "")
		f := open(t, image, guest.Options{})
		got, err := guesttest.WalkFS(f)
		if err != nil || len(f.Info().Warnings) > 0 {
			t.Fatal(f.Info(), err)
		}
		guesttest.Same(t, want, got)
		t.Log(seed, len(commits))
		return
	}
}

// TestTorn damages blocks of a journal in ways that the kernel refuses to mount: this package goes on with what is whole, and says so.
func TestTorn(t *testing.T) {
	d := dirties()[1]
	d.tree.Files, d.tree.Names = 50, 50
	image := d.make(t, func(dir string) error { return guesttest.Burst(dir, 6, 50) })
	_, commits := logOf(t, image, kindCommit)
	j, descriptors := logOf(t, image, kindDescriptor)
	super, err := j.place(0)
	if err != nil {
		t.Fatal(err)
	}
	for what, off := range map[string]int64{"commit": commits[10] + 0x40, "descriptor": descriptors[10] + 0x200, "data": descriptors[10] + 4096 + 100, "superblock": super + 0x90} {
		t.Run(what, func(t *testing.T) {
			torn := guesttest.Copy(t, image)
			patchImage(t, torn, off, []byte{0xa5})
			f := open(t, torn, guest.Options{})
			if i := f.Info(); len(i.Warnings) != 1 || f.certain() == nil {
				t.Error(i)
			}
			if _, err := guesttest.WalkFS(f); err != nil {
				t.Error(err)
			}
			t.Log(f.Info().Warnings)
		})
	}
}

// TestTornFastCommit damages the last of several fast commits: what they changed before it stays, as the kernel has it.
func TestTornFastCommit(t *testing.T) {
	image := fastImage(t, func(d string) error {
		for i := range 10 {
			p := fmt.Sprint(d, "/n", i)
			if err := errors.Join(os.WriteFile(p, []byte("x"), 0o600), inFile(p, func(*os.File) error { return nil })); err != nil {
				return err
			}
		}
		return nil
	})
	j, _ := logOf(t, image, kindCommit)
	end, err := j.scan()
	if err != nil {
		t.Fatal(err)
	}
	count := int64(0)
	if err := j.fastCommits(end, 1<<30, func([]record) error { count++; return nil }); err != nil || count < 10 {
		t.Fatal(count, err)
	}
	whole, err := guesttest.WalkFS(open(t, image, guest.Options{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, back := range []int64{2, 5} { // each of these fast commits has one block
		off, err := j.place(j.end + 1 + count - back)
		if err != nil {
			t.Fatal(err)
		}
		patchImage(t, image, off+60, []byte{0x99})
		want := forget(guesttest.Truth(t, image, "ext4", ""))
		got, err := guesttest.WalkFS(open(t, image, guest.Options{}))
		if err != nil {
			t.Fatal(err)
		}
		guesttest.Same(t, want, forget(got))
		if len(got) >= len(whole) {
			t.Error("nothing is missing")
		}
	}
}

// TestMemory makes sure that what a journal needs is bounded.
func TestMemory(t *testing.T) {
	image := fastImage(t, func(string) error { return nil })
	if _, err := Open(guesttest.OpenDevice(t, image), guest.Options{Journal: 1000}); !errors.Is(err, guest.ErrUnsupported) {
		t.Error(err)
	}
}
