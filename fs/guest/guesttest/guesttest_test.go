package guesttest

import (
	"os"
	"strings"
	"testing"
)

// TestFillAndWalk makes sure that the tree has what it should on a file system that refuses little, that two walks of it are
// alike, and that a changed tree is not.
func TestFillAndWalk(t *testing.T) {
	Needs(t, "mkfs.ext4", "mount")
	image := Sparse(t, 2<<30)
	Run(t, "mkfs.ext4", "-q", "-O", "ea_inode", image)
	dir, unmount := Mount(t, image, "ext4", "rw")
	skipped, err := Fill(dir, Tree{Seed: 1, Files: 2000, Names: 1000})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(skipped)
	want := Truth(t, image, "ext4", "")
	if len(want) < 3700 {
		t.Errorf("only %d lines", len(want))
	}
	for _, l := range want {
		if l.Fields["error"] != "" {
			t.Errorf("%s: %s", Quote(l.Path), l.Fields["error"])
		}
	}
	got, err := Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	Same(t, want, got, "atime", "blocks") // of a tree just read, and of a copy
	if err := os.WriteFile(dir+"/nested/a0/b0/f1", []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err = Walk(dir); err != nil {
		t.Fatal(err)
	}
	diffs := strings.Join(Diff(want, got, "atime", "blocks"), "\n")
	if !strings.Contains(diffs, "nested/a0/b0/f1: sum") || strings.Contains(diffs, "f2:") {
		t.Errorf("a changed file: %s", diffs)
	}
	unmount()
}
