package boot

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// TestSweep: what is left of sessions that were not made to their end goes; sessions, those that are being made or removed, and other files stay.
func TestSweep(t *testing.T) {
	root := t.TempDir()
	if err := Sweep(filepath.Join(root, "none")); err != nil {
		t.Error(err)
	}
	s := sessionIn(t, root)
	for _, dir := range []string{"deadbeef/folder/data", "0000000a", "nfs", "notasession"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	busy := &State{ID: "0000000a", dir: filepath.Join(root, "0000000a")}
	f, err := busy.lock()
	if err != nil {
		t.Fatal(err)
	}
	lock, err := lockRoot(root)
	if err != nil {
		t.Fatal(err)
	}
	swept := make(chan error, 1)
	go func() { swept <- Sweep(root) }()
	select {
	case err := <-swept:
		t.Errorf("swept while a session is being made: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	lock.Close()
	if err := <-swept; err != nil {
		t.Fatal(err)
	}
	for dir, stays := range map[string]bool{"deadbeef": false, "0000000a": true, "nfs": true, "notasession": true, s.ID: true} {
		if _, err := os.Stat(filepath.Join(root, dir)); (err == nil) != stays {
			t.Errorf("%s: %v", dir, err)
		}
	}
	f.Close()
	if err := Sweep(root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(busy.dir); err == nil {
		t.Error("what nobody removes any more stays")
	}
}

// TestLost: only a session of a directory that can be seen, and is the one of the pin, can be missed.
func TestLost(t *testing.T) {
	root := t.TempDir()
	if err := ensureHomeID(root); err != nil {
		t.Fatal(err)
	}
	home, err := homeID(root)
	if err != nil || len(home) != 32 {
		t.Fatal(home, err)
	}
	s := sessionIn(t, root)
	host, machine := thisComputer()
	if Lost(store.Pin{Host: host + "-2", Machine: machine, Home: home, Place: filepath.Join(root, "deadbeef")}) {
		t.Error("of another computer")
	}
	for name, c := range map[string]struct {
		home, place string
		want        bool
	}{
		"there":                 {home, s.dir, false},
		"gone":                  {home, filepath.Join(root, "deadbeef"), true},
		"of another directory":  {"0" + home[1:], filepath.Join(root, "deadbeef"), false},
		"of an unmounted one":   {home, filepath.Join(root, "none", "deadbeef"), false},
		"that does not say":     {"", "", false},
		"that says half of it":  {home, "", false},
		"a home without a name": {"", filepath.Join(root, "deadbeef"), false},
	} {
		if got := Lost(store.Pin{Host: host, Machine: machine, Home: c.home, Place: c.place}); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
