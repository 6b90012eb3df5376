package store

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTablesAreReadAtRandom asks the kernel: proc_pid_smaps(5), flag "rr".
func TestTablesAreReadAtRandom(t *testing.T) {
	dir := t.TempDir()
	x, err := openBadger(dir, [16]byte{1}, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.PutPages(context.Background(), []ID{{1}}, [][]byte{make([]byte, 1000)}); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil { // which writes a table
		t.Fatal(err)
	}
	if x, err = openBadger(dir, [16]byte{1}, false); err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Skipf("no smaps: %v", err)
	}
	tables, ours := 0, false
	for line := range strings.Lines(string(text)) {
		if first, _, _ := strings.Cut(line, " "); !strings.HasSuffix(first, ":") { // the head of a mapping
			ours = strings.Contains(line, real) && strings.HasSuffix(strings.TrimSpace(line), ".sst")
		}
		if ours && strings.HasPrefix(line, "VmFlags:") {
			tables++
			if !strings.Contains(line, " rr") {
				t.Errorf("a table is not read at random: %s", line)
			}
		}
	}
	if tables == 0 {
		t.Error("no table is mapped")
	}
}
