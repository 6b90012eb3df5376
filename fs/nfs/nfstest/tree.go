package nfstest

import (
	"context"
	"errors"
	"io"
	"math"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// testTree walks all that there is, and compares what the methods say of it.
func testTree(t *testing.T, fs nfs.FS) {
	t.Helper()
	w := &walk{t, t.Context(), fs, map[uint64]string{}}
	root := fs.Root()
	if root != fs.Root() {
		t.Error("the root changes")
	}
	if up, err := fs.Parent(w.ctx, root); err != nil || up != root {
		t.Errorf("Parent of the root: %v, %v", up, err)
	}
	w.dir(root, "")
	_, err := fs.Lookup(w.ctx, root, "there is no such name")
	if !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Lookup of nothing: %v", err)
	}
	_, err = fs.Attr(w.ctx, nfs.ID{File: math.MaxUint64 - 1, Generation: math.MaxUint64})
	if !errors.Is(err, syscall.ESTALE) {
		t.Errorf("Attr of no ID: %v", err)
	}
	if _, err := fs.Space(w.ctx); err != nil {
		t.Errorf("Space: %v", err)
	}
}

type walk struct {
	t     *testing.T
	ctx   context.Context
	fs    nfs.FS
	files map[uint64]string // File => path
}

func (w *walk) dir(id nfs.ID, path string) {
	w.t.Helper()
	a, err := w.fs.Attr(w.ctx, id)
	if err != nil || a.Kind != nfs.KindDir {
		w.t.Fatalf("%q: %+v, %v", path, a, err)
	}
	names := make(map[string]bool)
	for e, err := range w.fs.ReadDir(w.ctx, id, 0) {
		switch at := path + "/" + e.Name; {
		case err != nil:
			w.t.Fatalf("%q: %v", path, err)
		case e.Name == "" || e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\x00") || names[e.Name]:
			w.t.Errorf("%q is a name in %q", e.Name, path)
		case w.files[e.ID.File] != "":
			w.t.Errorf("%q and %q have the same number", at, w.files[e.ID.File])
		default:
			names[e.Name] = true
			w.files[e.ID.File] = at
			w.entry(id, e, at)
		}
	}
}

func (w *walk) entry(dir nfs.ID, e nfs.Entry, path string) {
	w.t.Helper()
	id, err := w.fs.Lookup(w.ctx, dir, e.Name)
	if err != nil || id != e.ID {
		w.t.Errorf("Lookup of %q: %v, %v; listed as %v", path, id, err, e.ID)
		return
	}
	a, err := w.fs.Attr(w.ctx, id)
	if err != nil {
		w.t.Errorf("Attr of %q: %v", path, err)
		return
	}
	if a.Mode&^0o7777 != 0 || a.Links == 0 || a.Size < 0 || a.Used < 0 {
		w.t.Errorf("Attr of %q: %+v", path, a)
	}
	switch a.Kind {
	case nfs.KindDir:
		if up, err := w.fs.Parent(w.ctx, id); err != nil || up != dir {
			w.t.Errorf("Parent of %q: %v, %v", path, up, err)
		}
		w.dir(id, path)
	case nfs.KindLink:
		if target, err := w.fs.Readlink(w.ctx, id); err != nil || target == "" {
			w.t.Errorf("Readlink of %q: %q, %v", path, target, err)
		}
	case nfs.KindFile:
		w.ends(id, a.Size, path)
	default:
		w.t.Errorf("%q is of kind %d", path, a.Kind)
	}
}

// ends reads at the end of a file.
func (w *walk) ends(id nfs.ID, size int64, path string) {
	w.t.Helper()
	p := make([]byte, 100)
	off := max(size-10, 0)
	for range 2 {
		n, err := w.fs.ReadAt(w.ctx, id, p, off)
		if int64(n) != size-off || err != io.EOF {
			w.t.Errorf("ReadAt %d of %q, of %d bytes: %d, %v", off, path, size, n, err)
		}
		off = size
	}
	if size > 0 {
		if n, err := w.fs.ReadAt(w.ctx, id, p[:1], size-1); n != 1 || err != nil && err != io.EOF {
			w.t.Errorf("ReadAt of the last byte of %q: %d, %v", path, n, err)
		}
	}
}
