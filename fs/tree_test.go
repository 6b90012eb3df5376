package fs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

func open(t *testing.T, b bucket.Bucket) *store.Repo {
	t.Helper()
	r, err := store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("x"), nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// commit makes a point of one disk whose chunks with data are full of letters,
// and of one configuration file in a folder.
func commit(t *testing.T, r *store.Repo, vm string, at time.Time, size int64, letters map[int64]byte) *store.Point {
	t.Helper()
	ctx := t.Context()
	d, err := r.NewDraft(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	root := func(size int64, chunks map[int64][]byte) store.Root {
		m, err := d.Map(ctx, store.Root{}, size)
		if err != nil {
			t.Fatal(err)
		}
		w, err := d.Writer()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		n := (size + int64(r.ChunkSize()) - 1) / int64(r.ChunkSize())
		for i := range n {
			if data, ok := chunks[i]; ok {
				var id [1]store.ID
				if _, err := w.Write(ctx, append(data, make([]byte, r.ChunkSize()-len(data))...), make([]store.ID, 1), id[:]); err != nil {
					t.Fatal(err)
				}
				if err := m.Set(ctx, i, id[0]); err != nil {
					t.Fatal(err)
				}
			}
		}
		out, err := m.Finish(ctx, size)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	chunks := map[int64][]byte{}
	for i, c := range letters {
		n := min(int64(r.ChunkSize()), size-i*int64(r.ChunkSize()))
		chunks[i] = bytes.Repeat([]byte{c}, int(n))
	}
	disk, conf := root(size, chunks), root(5, map[int64][]byte{0: []byte("hello")})
	p := &store.Point{VM: store.VM{Name: vm, Source: "test"}, Time: at,
		Disks:  []store.Disk{{Name: "disk0", Size: size, Root: disk.Page[:]}},
		Config: []store.ConfigFile{{Name: "sub/vm.vmx", Size: 5, Root: conf.Page[:]}}}
	if disk.Page.IsZero() {
		p.Disks[0].Root = nil
	}
	if err := d.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func names(t *testing.T, tree *fs.Tree, path string) string {
	t.Helper()
	n, err := tree.Walk(t.Context(), path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	es, err := n.(fs.Dir).Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name)
		// What a listing says of an entry is what the entry says of itself.
		child, err := n.(fs.Dir).Lookup(t.Context(), e.Name)
		if err != nil {
			t.Fatalf("%s/%s: %v", path, e.Name, err)
		}
		a, err := child.Attr(t.Context())
		if err != nil || a.Inode != e.Inode || a.Kind != e.Kind {
			t.Errorf("%s/%s: listed as %+v, is %+v (%v)", path, e.Name, e, a, err)
		}
	}
	return strings.Join(out, " ")
}

func content(t *testing.T, tree *fs.Tree, path string) []byte {
	t.Helper()
	n, err := tree.Walk(t.Context(), path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	img, err := n.(fs.File).Image(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTree(t *testing.T) {
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("x")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r := open(t, b)
	tree := fs.New(r)
	if got := names(t, tree, ""); got != "" {
		t.Errorf("an empty repository has %q", got)
	}
	at := time.Date(2026, 11, 20, 6, 30, 0, 0, time.UTC)
	cs := int64(r.ChunkSize())
	p1 := commit(t, r, "web", at, 3*cs+17, map[int64]byte{1: 'a', 3: 'b'})
	commit(t, r, "web", at, 0, nil) // in the same second, with an empty disk
	commit(t, r, "db 1", at.Add(time.Hour), cs, nil)
	if got := names(t, tree, "/"); got != "db 1 web" {
		t.Errorf("root: %q", got)
	}
	if got := names(t, tree, "web"); got != "2026-11-20T063000Z 2026-11-20T063000Z-2 latest" {
		t.Errorf("web: %q", got)
	}
	if got := names(t, tree, "web/2026-11-20T063000Z"); got != "point.json config files disk0.raw disk0.qcow2 disk0.vmdk disk0-flat.vmdk disk0.vhdx" {
		t.Errorf("point: %q", got)
	}
	if got := names(t, tree, "web/latest"); got != "point.json config files disk0.raw disk0.qcow2" {
		t.Errorf("latest, with an empty disk: %q", got)
	}
	if got := names(t, tree, "db 1/2026-11/config/sub"); got != "vm.vmx" {
		t.Errorf("config by the beginning of a date: %q", got)
	}
	if got := content(t, tree, "web/2026-11-20T063000Z/config/sub/vm.vmx"); string(got) != "hello" {
		t.Errorf("config file: %q", got)
	}
	want := bytes.Repeat([]byte{0}, int(3*cs+17))
	copy(want[cs:], bytes.Repeat([]byte("a"), int(cs)))
	copy(want[3*cs:], "bbbbbbbbbbbbbbbbb")
	if got := content(t, tree, "web/2026-11-20T063000Z/disk0.raw"); !bytes.Equal(got, want) {
		t.Error("disk0.raw differs")
	}
	var p store.Point
	if err := json.Unmarshal(content(t, tree, "web/2026-11-20T063000Z/point.json"), &p); err != nil || p.ID != p1.ID || p.Path() != p1.Path() {
		t.Errorf("point.json: %+v, %v", p, err)
	}

	// `latest` moves with a new point, in the same tree.
	commit(t, r, "web", at.Add(time.Minute), cs, nil)
	l, err := tree.Root().Lookup(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	n, err := l.(fs.Dir).Lookup(t.Context(), "latest")
	if err != nil {
		t.Fatal(err)
	}
	if to, err := n.(fs.Link).Target(t.Context()); err != nil || to != "2026-11-20T063100Z" {
		t.Errorf("latest is %q, %v", to, err)
	}

	// Another process sees the same inodes.
	other := fs.New(open(t, b))
	for _, path := range []string{"web", "web/2026-11-20T063000Z", "web/2026-11-20T063000Z/disk0.vhdx", "web/2026-11-20T063000Z/config/sub"} {
		if a, b := inode(t, tree, path), inode(t, other, path); a != b || a < 2 {
			t.Errorf("%s has inodes %d and %d", path, a, b)
		}
	}
	for _, path := range []string{"nobody", "web/2027", "web/latest/disk1.raw", "web/latest/point.json/x", "../web/x"} {
		if _, err := tree.Walk(t.Context(), path); !errors.Is(err, store.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func inode(t *testing.T, tree *fs.Tree, path string) uint64 {
	t.Helper()
	n, err := tree.Walk(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	a, err := n.Attr(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return a.Inode
}

// TestDamagedManifest: a point whose manifest cannot be read is listed, answers
// with damage, and hides nothing else; `latest` passes it over.
func TestDamagedManifest(t *testing.T) {
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("x")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r := open(t, b)
	at := time.Date(2026, 11, 20, 6, 30, 0, 0, time.UTC)
	commit(t, r, "web", at, 1000, nil)
	p2 := commit(t, r, "web", at.Add(time.Minute), 1000, nil)
	name := "points/" + p2.ID.String()
	o, err := b.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, o.Size())
	if _, err := o.ReadAt(raw, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 4
	w, err := b.Create(context.Background(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	tree := fs.New(r) // its index knows the point from before the damage
	if _, err := tree.Walk(t.Context(), p2.Path()+"/disk0.raw"); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("damaged point: %v", err)
	}
	anew := fs.New(open(t, b)) // this one has never seen it whole
	if got := names(t, anew, "web"); got != "2026-11-20T063000Z latest" {
		t.Errorf("web: %q", got)
	}
	if _, err := anew.Walk(t.Context(), "web/latest/disk0.raw"); err != nil {
		t.Error(err)
	}
}
