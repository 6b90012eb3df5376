package xfs

import (
	"fmt"
	"os"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// logRing finds the log of an image.
func logRing(t *testing.T, image string) *ring {
	t.Helper()
	fs := open(t, image, guest.Options{NoReplay: true})
	off, err := fs.sb.offset(fs.sb.journal, 1)
	if err != nil {
		t.Fatal(err)
	}
	return &ring{dev: fs.dev, off: off, size: fs.sb.logLen << fs.sb.blockLog / sector, uuid: fs.sb.uuid}
}

// TestTorn tears records at the head of the log, as a crash does while several of them are being written, and compares with what the
// kernel makes of it.
func TestTorn(t *testing.T) {
	v := variant{"torn", []string{"-l", "size=5m", "-b", "size=1024"}, 600 << 20, tiny}
	image := v.make(t)
	dir, unmount := guesttest.Mount(t, image, "xfs", "rw")
	for round := range 3 {
		if err := guesttest.Burst(dir, uint64(round), 700); err != nil {
			t.Fatal(err)
		}
	}
	image = guesttest.Copy(t, image)
	unmount()
	whole := guesttest.Truth(t, image, "xfs", "nouuid")
	r := logRing(t, image)
	s, err := r.stretch()
	if err != nil {
		t.Fatal(err)
	}
	recs, _, err := r.newest(s.head)
	if err != nil || len(recs) < 6 {
		t.Fatalf("%d records, %v", len(recs), err)
	}
	differ := 0
	for _, back := range []int{0, 3} {
		rec := recs[back]
		old := rec.cycle - 1
		for what, tear := range map[string]func(f *os.File) error{
			"a byte":     func(f *os.File) error { return poke(f, r, rec.at+rec.heads, []byte{0xaa}, 100) },
			"the header": func(f *os.File) error { return poke(f, r, rec.at, be.AppendUint32(nil, old), 0) },
			"the end":    func(f *os.File) error { return poke(f, r, rec.at+rec.sectors()-1, be.AppendUint32(nil, old), 0) },
			"all": func(f *os.File) error {
				for i := range rec.sectors() {
					if err := poke(f, r, rec.at+i, be.AppendUint32(make([]byte, 0, 4), old), 0); err != nil {
						return err
					}
				}
				return nil
			},
		} {
			t.Run(fmt.Sprint(back, " ", what), func(t *testing.T) {
				copied := guesttest.Copy(t, image)
				f, err := os.OpenFile(copied, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := tear(f); err != nil {
					t.Fatal(err)
				}
				want := guesttest.Truth(t, copied, "xfs", "nouuid")
				guesttest.SameFS(t, want, open(t, copied, guest.Options{}))
				if len(guesttest.Diff(whole, want)) > 0 {
					differ++
				}
			})
		}
	}
	if differ < 4 {
		t.Errorf("only %d torn logs showed anything else than the whole one", differ)
	}
}

// poke writes into a sector of the log.
func poke(f *os.File, r *ring, at int64, b []byte, off int64) error {
	_, err := f.WriteAt(b, r.off+at%r.size*sector+off)
	return err
}
