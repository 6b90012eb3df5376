package ntfs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

func collect(t *testing.T, src func(func(extent.Extent, error) bool)) (all []extent.Extent) {
	t.Helper()
	for e, err := range src {
		must(t, err)
		if n := len(all); n > 0 && e.Off < all[n-1].End() {
			t.Fatalf("%v behind %v", e, all[n-1])
		}
		all = append(all, e)
	}
	return all
}

// TestFree writes over all that is free, after which ntfs-3g shows the same as before, and compares the sum with ntfsinfo's.
func TestFree(t *testing.T) {
	guesttest.Needs(t, "ntfsinfo", "ntfscluster")
	image := filled(t, small, 600<<20, "compression")
	f := open(t, image)
	free := collect(t, f.Free())
	var clusters int64
	_, err := fmt.Sscanf(regexp.MustCompile(`Free Clusters: \d+`).FindString(guesttest.Run(t, "ntfsinfo", "-m", image)), "Free Clusters: %d", &clusters)
	must(t, err)
	if sum := extent.Total(free); sum != clusters*f.geo.cluster {
		t.Errorf("%d bytes are free; ntfsinfo: %d", sum, clusters*f.geo.cluster)
	}
	want := guesttest.TruthNTFS(t, image, "")
	w, err := os.OpenFile(image, os.O_RDWR, 0)
	must(t, err)
	defer w.Close()
	for _, e := range free {
		for at := e.Off; at < e.End(); at += 64 << 20 { // the first MiB of each 64
			_, err := w.WriteAt(bytes.Repeat([]byte{0xaa}, int(min(1<<20, e.End()-at))), at)
			must(t, err)
		}
	}
	guesttest.Same(t, want, guesttest.TruthNTFS(t, image, ""))
	for _, p := range []string{"sparse/600 extents", "big/large", "big/size 1", "fragmented/0", "sparse/all"} {
		if got, want := collect(t, f.Locate(lookup(t, f, p))), clustersOf(t, image, p); !slices.Equal(extent.Normalise(got), want) {
			t.Errorf("%s: %d %v, ntfscluster: %d %v", p, len(got), got, len(want), want)
		}
	}
}

// clustersOf asks ntfscluster where a file is.
func clustersOf(t *testing.T, image, p string) (all []extent.Extent) {
	t.Helper()
	out := guesttest.Run(t, "ntfscluster", "-v", "-F", "/"+p, image)
	for section := range strings.SplitSeq(out, "    0x") {
		if !strings.HasPrefix(section, "80 -") {
			continue
		}
		for line := range strings.Lines(section) {
			var vcn, lcn, n int64
			if k, _ := fmt.Sscan(line, &vcn, &lcn, &n); k == 3 && lcn >= 0 {
				all = append(all, extent.Extent{Off: lcn * 4096, Len: n * 4096})
			}
		}
	}
	return extent.Normalise(all)
}

// patch makes a copy of an image with other bytes in it.
func patch(t *testing.T, image string, at int64, b []byte) string {
	t.Helper()
	out := guesttest.Copy(t, image)
	w, err := os.OpenFile(out, os.O_RDWR, 0)
	must(t, err)
	defer w.Close()
	_, err = w.WriteAt(b, at)
	must(t, err)
	return out
}

// TestCopies damages what there are copies of.
func TestCopies(t *testing.T) {
	image := volume(t, 64<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	must(t, os.WriteFile(dir+"/file", []byte("content"), 0o644))
	unmount()
	want := guesttest.TruthNTFS(t, image, "")
	f := open(t, image)
	if w := f.Info().Warnings; len(w) > 0 || len(collect(t, f.Free())) == 0 {
		t.Errorf("%q", w)
	}
	if info := f.Info(); !strings.Contains(guesttest.Run(t, "blkid", "-p", "-o", "export", image), "UUID="+info.UUID+"\n") || info.Label != "läbel" {
		t.Errorf("%+v", info)
	}
	mft := f.geo.mft * f.geo.cluster
	for name, v := range map[string]struct {
		at      int64
		b       []byte
		warning string
	}{
		"boot sector":         {3, []byte("XXXX"), "boot sector"},
		"record 0":            {mft, []byte("BAAD"), "record 0"},
		"record 0, torn":      {mft + 510, []byte{0x99, 0x99}, "record 0"},
		"record of $Volume":   {mft + 3<<10, []byte("BAAD"), "record 3"},
		"dirty":               {mft + 3<<10 + dirtyAt(t, f), []byte{1}, "dirty"},
		"$LogFile, in use":    {logAt(t, f), logInUse(), "not shut down cleanly"},
		"$LogFile, destroyed": {logAt(t, f), make([]byte, 32<<10), "$LogFile"},
	} {
		damaged := open(t, patch(t, image, v.at, v.b))
		got, err := guesttest.WalkFS(damaged)
		must(t, err)
		guesttest.Same(t, want, got)
		if w := fmt.Sprint(damaged.Info().Warnings); !strings.Contains(w, v.warning) {
			t.Errorf("%s: %s", name, w)
		}
		for _, err := range damaged.Free() {
			if err == nil {
				t.Errorf("%s: something is free", name)
			}
			break
		}
	}
	if _, err := Open(guesttest.OpenDevice(t, guesttest.Sparse(t, 1<<20)), guest.Options{}); !errors.Is(err, guest.ErrUnknown) {
		t.Error(err)
	}
}

func TestHibernated(t *testing.T) {
	image := volume(t, 64<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	must(t, os.WriteFile(dir+"/hiberfil.sys", []byte("HIBR and more"), 0o644))
	unmount()
	if w := open(t, image).Info().Warnings; len(w) != 1 || !strings.Contains(w[0], "hibernated") {
		t.Errorf("%q", w)
	}
}

// dirtyAt is where in the record of $Volume its flags are.
func dirtyAt(t *testing.T, f *FS) int64 {
	at, h := headerAt(t, f, recordVolume, attrVolInfo)
	return at + int64(le.Uint16(h[0x14:])) + 10
}

// headerAt gives the first attribute of a type, and where in its record it is.
func headerAt(t *testing.T, f *FS, n int64, kind uint32) (at int64, found header) {
	t.Helper()
	r, err := f.record(n)
	must(t, err)
	must(t, r.attributes(func(h header) bool {
		if h.kind() == kind {
			at, found = int64(cap(r)-cap(h)), h
		}
		return found == nil
	}))
	if found == nil {
		t.Fatalf("record %d has no attribute %#x", n, kind)
	}
	return at, found
}

// TestValidLength has a file of which only a part was ever written: behind it are zeros, whatever the clusters have.
func TestValidLength(t *testing.T) {
	image := volume(t, 64<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	for _, p := range []string{"/file", "/secret"} {
		must(t, os.WriteFile(dir+p, bytes.Repeat([]byte("written "), 12500), 0o644))
	}
	unmount()
	f := open(t, image)
	place := func(p string) int64 {
		n := int64(lookup(t, f, p) & refMask)
		at, _ := headerAt(t, f, n, attrData)
		return f.geo.mft*f.geo.cluster + n*f.geo.record + at
	}
	for _, valid := range []uint64{0, 1, 4095, 4096, 50001, 99999} {
		shorter := patch(t, image, place("file")+0x38, le.AppendUint64(nil, valid))
		same(t, shorter, "")
		s := open(t, shorter)
		content, err := s.Open(lookup(t, s, "file"))
		must(t, err)
		if sum := extent.Total(collect(t, content.Allocated(1))); sum != int64(valid) {
			t.Errorf("%d of %d bytes are allocated", sum, valid)
		}
	}
	e := open(t, patch(t, image, place("secret")+0x0c, []byte{0, encrypted >> 8}))
	if _, err := e.Open(lookup(t, e, "secret")); !errors.Is(err, guest.ErrUnsupported) {
		t.Error(err)
	}
	// Another file has the record now.
	if _, err := f.Stat(lookup(t, f, "file") + 1<<48); !errors.Is(err, guest.ErrDamaged) {
		t.Error(err)
	}
}

func logAt(t *testing.T, f *FS) int64 {
	t.Helper()
	for e := range f.Locate(recordLog) {
		return e.Off
	}
	t.Fatal("no log")
	return 0
}

// logInUse is a restart page with a client, made after the NTFS documentation: ntfs-3g leaves none.
func logInUse() []byte {
	b := make([]byte, 4096)
	copy(b, "RSTR")
	le.PutUint32(b[0x10:], 4096)
	le.PutUint32(b[0x14:], 4096)
	le.PutUint16(b[0x18:], 0x30)
	le.PutUint64(b[0x30:], 77)
	le.PutUint16(b[0x38:], 1)
	return b
}

// TestReadDirResumes lists a directory in parts, each from where the one before ended.
func TestReadDirResumes(t *testing.T) {
	image := volume(t, 128<<20)
	dir, unmount := guesttest.MountNTFS(t, image, "")
	rng := rand.New(rand.NewPCG(11, 11))
	names := map[string]bool{}
	for len(names) < 3000 {
		name := fmt.Sprintf("%x %s", rng.IntN(1<<30), strings.Repeat(string(rune('A'+rng.IntN(60))), rng.IntN(60)))
		names[strings.ReplaceAll(name, "/", "")] = true
	}
	for name := range names {
		must(t, os.WriteFile(dir+"/"+name, nil, 0o644))
	}
	unmount()
	f := open(t, image)
	from := uint64(0)
	for {
		n := 0
		for e, err := range f.ReadDir(f.Root(), from) {
			must(t, err)
			if !names[e.Name] {
				t.Fatalf("%q is twice there, or should not be", e.Name)
			}
			delete(names, e.Name)
			if ino, err := f.Lookup(f.Root(), e.Name); err != nil || ino != e.Ino {
				t.Errorf("%q: %d, %v", e.Name, ino, err)
			}
			if _, err := f.Lookup(f.Root(), e.Name+"x"); !errors.Is(err, guest.ErrNotExist) {
				t.Errorf("%q: %v", e.Name+"x", err)
			}
			from = e.Next
			if n++; n == 7 {
				break
			}
		}
		if n == 0 {
			break
		}
	}
	if len(names) > 0 {
		t.Errorf("%d names are missing", len(names))
	}
}

// TestConcurrent reads everything with many goroutines, and a cache that holds next to nothing.
func TestConcurrent(t *testing.T) {
	image := filled(t, small, 600<<20, "compression")
	want := guesttest.TruthNTFS(t, image, "")
	f, err := Open(guesttest.OpenDevice(t, image), guest.Options{Cache: 64 << 10})
	must(t, err)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			got, err := guesttest.WalkFS(f)
			if err != nil {
				t.Error(err)
				return
			}
			guesttest.Same(t, want, got)
		})
	}
	all.Wait()
}
