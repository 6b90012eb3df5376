package backup_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
)

func leftNames(t *testing.T, j *backup.Journal) []string {
	t.Helper()
	left, err := j.Left(t.Context(), func(backup.Leftover) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left {
		names = append(names, e.Name)
		e.Leave()
	}
	slices.Sort(names)
	return names
}

// TestJournal: what a run holds is not left; what it leaves is, until somebody clears it; what somebody else took up is not given twice.
func TestJournal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "journal")
	j, err := backup.OpenJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	var entries []*backup.JournalEntry
	for _, name := range []string{"a", "b", "c"} {
		e, err := j.Begin(backup.Leftover{Source: "lab", Host: "vc", VM: "vm-1", Name: name, Began: time.Unix(1000, 0).UTC()})
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, e)
	}
	if names := leftNames(t, j); len(names) > 0 {
		t.Fatalf("%q are left while their runs are under way", names)
	}
	if err := entries[0].Clear(); err != nil {
		t.Fatal(err)
	}
	if err := entries[0].Clear(); err != nil {
		t.Fatalf("cleared twice: %v", err)
	}
	entries[1].Leave()
	if names := leftNames(t, j); !slices.Equal(names, []string{"b"}) {
		t.Fatalf("left is %q, want b alone", names)
	}
	left, err := j.Left(t.Context(), func(backup.Leftover) bool { return true })
	if err != nil || len(left) != 1 {
		t.Fatalf("%d entries are left, %v", len(left), err)
	}
	if left[0].Leftover != (backup.Leftover{Source: "lab", Host: "vc", VM: "vm-1", Name: "b", Began: time.Unix(1000, 0).UTC()}) {
		t.Errorf("the entry says %+v", left[0].Leftover)
	}
	if names := leftNames(t, j); len(names) > 0 {
		t.Errorf("%q are given to two at once", names)
	}
	if err := left[0].Clear(); err != nil {
		t.Fatal(err)
	}
	entries[2].Leave()
	if names := leftNames(t, j); !slices.Equal(names, []string{"c"}) {
		t.Errorf("left is %q, want c alone", names)
	}
}

// TestJournalOfKilled: an entry outlives the process that made it, however that ends.
func TestJournalOfKilled(t *testing.T) {
	dir := t.TempDir()
	if at := os.Getenv("HOLDFAST_TEST_JOURNAL"); at != "" {
		j, err := backup.OpenJournal(at)
		if err == nil {
			_, err = j.Begin(backup.Leftover{Name: "killed"})
		}
		if err != nil {
			t.Fatal(err)
		}
		p, _ := os.FindProcess(os.Getpid())
		p.Kill()
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestJournalOfKilled$")
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_JOURNAL="+dir)
	if err := cmd.Run(); err == nil {
		t.Fatal("the process was not killed")
	}
	j, err := backup.OpenJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	if names := leftNames(t, j); !slices.Equal(names, []string{"killed"}) {
		t.Errorf("left is %q", names)
	}
}
