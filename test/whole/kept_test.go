package whole

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// kept is a restore point and a copy of the disk that it is of.
type kept struct {
	point
	copy string // raw file
}

// keep backs up a raw file as a VM and keeps a copy of it.
func (r *repository) keep(t *testing.T, vm, file string) kept {
	t.Helper()
	k := kept{copy: filepath.Join(newDir(t), "copy.raw")}
	tool(t, "cp", "--sparse=always", file, k.copy)
	k.point, _ = r.backup(t, "--vm", vm, file)
	return k
}

// newKept makes a repository with one point of some compressible data.
func newKept(t *testing.T) (*repository, kept) {
	t.Helper()
	r := newRepository(t)
	return r, r.keep(t, "kept", newText(t, filepath.Join(newDir(t), "kept.raw"), 1, 3<<20+5).file)
}

// intact wants that the repository holds these points and no other, and that
// each restores to its copy.
func (r *repository) intact(t *testing.T, want ...kept) {
	t.Helper()
	var have, should []string
	for _, p := range r.points(t) {
		if p.Damaged != "" {
			t.Errorf("%s is damaged: %s", p.path(), p.Damaged)
		}
		have = append(have, p.ID)
	}
	for _, k := range want {
		should = append(should, k.ID)
		r.reads(t, k)
	}
	slices.Sort(have)
	slices.Sort(should)
	if !slices.Equal(have, should) {
		t.Errorf("points %q, want %q", have, should)
	}
}

// reads wants that a point restores to its copy.
func (r *repository) reads(t *testing.T, k kept) {
	t.Helper()
	out, err := os.MkdirTemp(scratch(), "holdfast-whole-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(out)
	if r.as != nil {
		if err := os.Chmod(out, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	r.must(t, "restore", k.ID, "--to", out)
	tool(t, "cmp", k.copy, filepath.Join(out, "disk0.raw"))
}

// contents lists all below dir, with the times of files, to see that nothing
// changes. The index of a repository is left out: opening it may write to it.
func contents(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		if info.IsDir() && info.Name() == "index" {
			return filepath.SkipDir
		}
		if info.Mode().IsRegular() {
			path += " " + info.ModTime().String()
		}
		list = append(list, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}
