package machine

import (
	"errors"
	"iter"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// broken panics wherever it can.
type broken struct{}

func (broken) Info() guest.Info                                 { return guest.Info{} }
func (broken) Root() guest.Ino                                  { return 1 }
func (broken) Stat(guest.Ino) (guest.Stat, error)               { panic("stat") }
func (broken) Lookup(guest.Ino, string) (guest.Ino, error)      { panic("lookup") }
func (broken) Readlink(guest.Ino) (string, error)               { panic("readlink") }
func (broken) Xattrs(guest.Ino) ([]guest.Xattr, error)          { panic("xattrs") }
func (broken) Open(ino guest.Ino) (guest.File, error)           { return brokenFile{}, nil }
func (broken) Streams(guest.Ino) ([]string, error)              { panic("streams") }
func (broken) OpenStream(guest.Ino, string) (guest.File, error) { panic("stream") }
func (broken) Default() (guest.Ino, error)                      { panic("default") }
func (broken) Free() iter.Seq2[extent.Extent, error]            { panic("free") }
func (broken) Locate(guest.Ino) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) { panic("locate") }
}

func (broken) ReadDir(guest.Ino, uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		if yield(guest.Entry{Name: "a"}, nil) {
			panic("list")
		}
	}
}

type brokenFile struct{}

func (brokenFile) Size() int64                       { return 10 }
func (brokenFile) ReadAt([]byte, int64) (int, error) { panic("read") }
func (brokenFile) Allocated(int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) { panic("allocated") }
}

func last[T any](seq iter.Seq2[T, error]) (n int, err error) {
	for _, e := range seq {
		n++
		err = e
	}
	return n, err
}

// TestPanic: a reader that panics is damage, wherever it does; what takes its lists may panic itself.
func TestPanic(t *testing.T) {
	g := guarded{broken{}}
	f, err := g.Open(1)
	if err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"Stat":       func() error { _, err := g.Stat(1); return err },
		"Lookup":     func() error { _, err := g.Lookup(1, "x"); return err },
		"Readlink":   func() error { _, err := g.Readlink(1); return err },
		"Xattrs":     func() error { _, err := g.Xattrs(1); return err },
		"Streams":    func() error { _, err := g.Streams(1); return err },
		"OpenStream": func() error { _, err := g.OpenStream(1, "x"); return err },
		"Default":    func() error { _, err := g.Default(); return err },
		"Free":       func() error { _, err := last(g.Free()); return err },
		"Locate":     func() error { _, err := last(g.Locate(1)); return err },
		"ReadAt":     func() error { _, err := f.ReadAt(make([]byte, 5), 0); return err },
		"Allocated":  func() error { _, err := last(f.Allocated(1)); return err },
		"ReadDir": func() error {
			n, err := last(g.ReadDir(1, 0))
			if n != 2 {
				t.Errorf("ReadDir: %d entries", n)
			}
			return err
		},
	} {
		if err := call(); !errors.Is(err, guest.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range g.ReadDir(1, 0) {
		break
	}
	defer func() {
		if recover() != "mine" {
			t.Error("the panic of a caller was caught")
		}
	}()
	for range g.ReadDir(1, 0) {
		panic("mine")
	}
}

// only is a FS without any optional ability.
type only struct{ guest.FS }

func TestGuardedLacks(t *testing.T) {
	g := guarded{only{broken{}}}
	for name, seq := range map[string]iter.Seq2[extent.Extent, error]{"Free": g.Free(), "Locate": g.Locate(1)} {
		if _, err := last(seq); !errors.Is(err, guest.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if ino, err := g.Default(); ino != 1 || err != nil {
		t.Errorf("Default: %d, %v", ino, err)
	}
	if _, err := g.OpenStream(1, "x"); !errors.Is(err, guest.ErrNotExist) {
		t.Errorf("OpenStream: %v", err)
	}
}
