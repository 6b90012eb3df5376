package remote_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote"
)

var secret = []byte("secret")

func newDir(t *testing.T) string {
	t.Helper()
	// Deeper than a socket's path may be long.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: secret, ChunkSize: 64 << 10}, time.Now()); err != nil {
		t.Fatal(err)
	}
	return dir
}

func open(dir string) (*store.Repo, error) {
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		return nil, err
	}
	return store.Open(context.Background(), b, remote.Index(dir), store.OpenOptions{
		Passphrase: func() ([]byte, error) { return secret, nil },
	})
}

func mustOpen(t *testing.T, dir string) *store.Repo {
	t.Helper()
	r, err := open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// content is the disk of a VM at a round: some chunks shared with everybody,
// some its own.
func content(vm string, round int) []byte {
	rnd := rand.New(rand.NewPCG(uint64(round), uint64(len(vm))+uint64(vm[0])))
	data := make([]byte, 20*64<<10+777)
	for i := 0; i < len(data); i += 64 << 10 {
		switch (i>>16 + round) % 3 {
		case 0:
			copy(data[i:], fmt.Sprintf("shared by all %d", i))
		case 1:
			for j := i; j < min(i+64<<10, len(data)); j++ {
				data[j] = byte(rnd.Uint32())
			}
		}
	}
	return data
}

// commit stores content as a point, straight through the store's own interface.
func commit(ctx context.Context, r *store.Repo, vm string, round int) (*store.Point, error) {
	data := content(vm, round)
	d, err := r.NewDraft(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	w, err := d.Writer()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	m, err := d.Map(ctx, store.Root{}, int64(len(data)))
	if err != nil {
		return nil, err
	}
	cs := r.ChunkSize()
	padded := append(bytes.Clone(data), make([]byte, cs-len(data)%cs)...)
	n := len(padded) / cs
	ids := make([]store.ID, n)
	if _, err := w.Write(ctx, padded, make([]store.ID, n), ids); err != nil {
		return nil, err
	}
	for i, id := range ids {
		if err := m.Set(ctx, int64(i), id); err != nil {
			return nil, err
		}
	}
	root, err := m.Finish(ctx, int64(len(data)))
	if err != nil {
		return nil, err
	}
	p := &store.Point{VM: store.VM{Name: vm, Source: "test"}, Time: time.Unix(int64(round/3), 0),
		Disks: []store.Disk{{Name: "disk0", Size: root.Size, Root: root.Page[:]}}}
	return p, d.Commit(ctx, p)
}

func check(t *testing.T, r *store.Repo, vm, name string, round int) {
	t.Helper()
	s, err := r.Named(t.Context(), vm, name)
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.Point(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	img, err := r.OpenDisk(p, "disk0")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil || !bytes.Equal(got, content(vm, round)) {
		t.Fatalf("%s/%s: wrong content (%v)", vm, name, err)
	}
}

// TestSharing: what one process commits the other sees at once, both ways, and
// names are not given twice.
func TestSharing(t *testing.T) {
	dir := newDir(t)
	owner, client := mustOpen(t, dir), mustOpen(t, dir)
	p1, err := commit(t.Context(), owner, "web", 0)
	if err != nil {
		t.Fatal(err)
	}
	p2, err := commit(t.Context(), client, "web", 1)
	if err != nil {
		t.Fatal(err)
	}
	if p1.Name == p2.Name {
		t.Fatalf("both points are called %s", p1.Name)
	}
	for _, r := range []*store.Repo{owner, client} {
		check(t, r, "web", p1.Name, 0)
		check(t, r, "web", p2.Name, 1)
	}
	if st, err := os.Stat(filepath.Join(dir, "owner.sock")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}
}

// TestTakeOver: when the owner ends, a client goes on as the owner, and nothing is lost.
func TestTakeOver(t *testing.T) {
	dir := newDir(t)
	owner := mustOpen(t, dir)
	if _, err := commit(t.Context(), owner, "web", 0); err != nil {
		t.Fatal(err)
	}
	a, b := mustOpen(t, dir), mustOpen(t, dir)
	if err := owner.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := commit(t.Context(), a, "web", 1)
	if err != nil {
		t.Fatal(err)
	}
	check(t, b, "web", p.Name, 1)
	a.Close()
	check(t, b, "web", p.Name, 1)
	if list, err := b.Points(t.Context()); err != nil || len(list) != 2 {
		t.Fatalf("%d points, %v", len(list), err)
	}
}

// TestManyProcesses: writers of overlapping data come and go while a reader
// stays; whoever owns the index changes all the time.
func TestManyProcesses(t *testing.T) {
	dir := newDir(t)
	reader := mustOpen(t, dir)
	const rounds = 6
	var wg sync.WaitGroup
	for w := range 4 {
		vm := fmt.Sprint("vm", w)
		wg.Go(func() {
			for round := range rounds {
				r, err := open(dir)
				if err != nil {
					t.Errorf("%s: %v", vm, err)
					return
				}
				if _, err := commit(context.Background(), r, vm, round); err != nil {
					t.Errorf("%s: %v", vm, err)
				}
				if err := r.Close(); err != nil {
					t.Errorf("%s: %v", vm, err)
				}
				if w == 0 && round == 2 {
					reader.Close() // the first owner goes in the middle
				}
			}
		})
	}
	wg.Wait()
	r := mustOpen(t, dir)
	for w := range 4 {
		vm := fmt.Sprint("vm", w)
		list, err := r.PointsOf(t.Context(), vm)
		if err != nil || len(list) != rounds {
			t.Fatalf("%s has %d points, %v", vm, len(list), err)
		}
		for i, s := range list {
			check(t, r, vm, s.Name, i)
		}
	}
	rep, err := r.Verify(t.Context(), store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { t.Error(d) }})
	if err != nil || rep.Points != 4*rounds {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// TestForeignOwner: a client of another protocol or repository is refused, and
// garbage on the socket hurts nobody.
func TestForeignOwner(t *testing.T) {
	dir := newDir(t)
	owner := mustOpen(t, dir)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	hello := func(version uint32, rest []byte) []byte {
		b := binary.LittleEndian.AppendUint32(nil, uint32(9+4+len(rest)))
		b = append(binary.LittleEndian.AppendUint64(b, 0), 1)
		return append(binary.LittleEndian.AppendUint32(b, version), rest...)
	}
	for name, msg := range map[string][]byte{
		"another version":    hello(99, make([]byte, 16)),
		"another repository": hello(1, bytes.Repeat([]byte{9}, 16)),
		"short":              hello(1, nil),
		"garbage":            bytes.Repeat([]byte("garbage"), 100),
		"huge":               {0xff, 0xff, 0xff, 0x7f, 1, 2, 3},
	} {
		c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/owner.sock", d.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write(msg)
		c.(*net.UnixConn).CloseWrite()
		if resp, _ := io.ReadAll(c); len(resp) > 12 && resp[12] == 0 {
			t.Errorf("%s: accepted", name)
		}
		c.Close()
	}
	if _, err := commit(t.Context(), owner, "web", 0); err != nil {
		t.Fatal(err)
	}
}

// TestLeftOverSocket: the socket of an owner that was killed is in nobody's way.
func TestLeftOverSocket(t *testing.T) {
	dir := newDir(t)
	if err := os.WriteFile(filepath.Join(dir, "owner.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, dir)
	if _, err := commit(t.Context(), r, "web", 0); err != nil {
		t.Fatal(err)
	}
}

// TestWrongPassphrase leaves the repository free for the next process.
func TestWrongPassphrase(t *testing.T) {
	dir := newDir(t)
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = store.Open(t.Context(), b, remote.Index(dir), store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("no"), nil }})
	if !errors.Is(err, store.ErrPassphrase) {
		t.Fatalf("got %v", err)
	}
	mustOpen(t, dir)
}
