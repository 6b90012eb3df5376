package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
	"github.com/holdfast-backup/holdfast/store/remote"
	"github.com/holdfast-backup/holdfast/store/remote/agent"
)

// serveAgents serves repo on the loopback interface.
func serveAgents(t *testing.T, repo *store.Repo, opt agent.ServerOptions) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	opt.Warn = func(s string) { t.Log("server: ", s) }
	srv, err := agent.NewServer(repo, opt)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

// newAgent makes a token.
func newAgent(t *testing.T, repo *store.Repo, addr string, vms ...string) (agent.Client, store.AgentInfo) {
	t.Helper()
	secret, info, err := repo.AddAgent(t.Context(), store.AgentInfo{VMs: vms}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	token, err := agent.NewToken(repo, info, secret)
	if err != nil {
		t.Fatal(err)
	}
	return agent.Client{Addr: addr, Token: token}, info
}

// TestTargets runs the same backups against every target and reads all points back from the
// repository that they end in.
func TestTargets(t *testing.T) {
	for name, open := range map[string]func(t *testing.T, r *store.Repo) backup.Target{
		"local": func(_ *testing.T, r *store.Repo) backup.Target { return backup.Local(r) },
		"away": func(t *testing.T, r *store.Repo) backup.Target {
			c, _ := newAgent(t, r, serveAgents(t, r, agent.ServerOptions{}))
			return backup.Away(c)
		},
	} {
		for _, opt := range []store.InitOptions{{}, {ChunkSize: 64 << 10, NoEncryption: true}, {ChunkSize: 1 << 20}} {
			t.Run(fmt.Sprintf("%s chunk %d", name, opt.ChunkSize), func(t *testing.T) {
				if testing.Short() && opt.ChunkSize == 1<<20 {
					t.Skip("-short")
				}
				testTarget(t, opt, open)
			})
		}
	}
}

func testTarget(t *testing.T, opt store.InitOptions, open func(t *testing.T, r *store.Repo) backup.Target) {
	b, repo := newRepo(t, opt)
	to := open(t, repo)
	rnd := rand.New(rand.NewPCG(5, uint64(opt.ChunkSize)))
	cs := int64(repo.ChunkSize())
	size := 3*cs + 9<<20 + 513
	if testing.Short() {
		size -= 7 << 20
	}
	snap := &memSnapshot{name: "vm", disks: []*memDisk{
		{key: "a", data: make([]byte, size)}, {key: "b", data: make([]byte, 1)}, {key: "empty"},
	}}
	type kept struct {
		p      *store.Point
		disks  [][]byte
		config []backup.ConfigFile
	}
	var all []kept
	var last *store.Point
	for round := range 12 {
		a := snap.disks[0]
		snap.at = time.Now()
		touched := mutate(rnd, a.data, 1+rnd.IntN(4))
		switch {
		case round == 4: // content that moves, and content that is there twice
			copy(a.data[2*cs:3*cs], a.data[:cs])
			touched = extent.Normalise(append(touched, extent.Extent{Off: 2 * cs, Len: cs}))
		case round == 6:
			a.data = append(a.data, make([]byte, 2*cs+77)...)
		case round == 8:
			a.data = a.data[:int64(len(a.data))/2]
		case round == 10:
			snap.disks[1], snap.disks[2] = snap.disks[2], snap.disks[1]
		}
		resized := last == nil || last.Disks[0].Size != int64(len(a.data))
		old := a.change
		if a.change = fmt.Sprint("change ", round); round%2 == 1 {
			a.changed = map[string][]extent.Extent{old: touched}
		} else {
			a.changed = nil // lost
		}
		snap.config = []backup.ConfigFile{{Name: "vm.xml", Data: fmt.Appendf(nil, "<vm round=%d/>", round)},
			{Name: "nvram/vars", Data: bytes.Repeat([]byte{byte(round)}, round*50_000)}, {Name: "empty"}}
		p, err := backup.RunTo(t.Context(), to, snap, backup.Options{Tags: []string{"x"}, Full: round == 3, Program: "test"})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		want := "changes"
		switch {
		case last == nil:
			want = "full: first backup of this disk"
		case round == 3:
			want = "full: asked for"
		case resized:
			want = "full: the disk was resized"
		case round%2 == 0:
			want = "full: change tracking was lost"
		}
		if p.Disks[0].Read != want {
			t.Errorf("round %d: read %q, want %q", round, p.Disks[0].Read, want)
		}
		if want == "changes" && p.Disks[0].Stats.Read > extent.Total(touched)+int64(2*len(touched))*cs {
			t.Errorf("round %d: %d bytes were read for %v", round, p.Disks[0].Stats.Read, touched)
		}
		k := kept{p: p, config: snap.config}
		for _, d := range snap.disks {
			k.disks = append(k.disks, bytes.Clone(d.data))
		}
		all, last = append(all, k), p
		// The same again: nothing new, whatever is read.
		again, err := backup.RunTo(t.Context(), to, snap, backup.Options{Full: true})
		if err != nil || again.Disks[0].Stats.New != 0 || again.Parent == nil || *again.Parent != p.ID || !bytes.Equal(again.Disks[0].Root, p.Disks[0].Root) {
			t.Fatalf("again: %+v, %v", again, err)
		}
	}
	for name, r := range map[string]*store.Repo{"open": repo, "opened anew": openRepo(t, b)} {
		for _, k := range all {
			p, err := r.Point(t.Context(), k.p.ID)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if p.Path() != k.p.Path() || len(p.Tags) != 1 || p.Consistency != "crash" || p.Program != "test" || p.VM.Source != "test" {
				t.Errorf("%s: %+v", name, p)
			}
			var data int64
			for i := range k.disks {
				wantDisk(t, r, p, fmt.Sprintf("disk%d", i), k.disks[i])
				if p.Disks[i].Key != k.p.Disks[i].Key || p.Disks[i].ChangeID != k.p.Disks[i].ChangeID {
					t.Errorf("%+v", p.Disks[i])
				}
			}
			for off := 0; off < len(k.disks[0]); off += int(cs) {
				if part := k.disks[0][off:min(len(k.disks[0]), off+int(cs))]; len(bytes.Trim(part, "\x00")) > 0 {
					data += cs
				}
			}
			if p.Disks[0].Stats.Data != data {
				t.Errorf("%s: %d bytes of data, want %d", p.Path(), p.Disks[0].Stats.Data, data)
			}
			for _, f := range k.config {
				img, err := r.OpenConfig(p, f.Name)
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(f.Data)+1)
				if n, _ := img.ReadAt(got, 0); n != len(f.Data) || !bytes.Equal(got[:n], f.Data) {
					t.Errorf("%s: %d bytes of %d", f.Name, n, len(f.Data))
				}
			}
		}
	}
	// Errors of the source end the run, and the next one works.
	bad := &memSnapshot{name: "vm", at: time.Now(), disks: []*memDisk{{key: "a", data: make([]byte, 5<<20), bad: extent.Extent{Off: 3 << 20, Len: 1}, err: errors.New("bad sector")}}}
	if _, err := backup.RunTo(t.Context(), to, bad, backup.Options{}); err == nil {
		t.Error("a bad sector went unseen")
	}
	if _, err := backup.RunTo(t.Context(), to, snap, backup.Options{}); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := backup.RunTo(ctx, to, snap, backup.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestAwayDecidesNothing: time, lock and maker of a point come from the server.
func TestAwayDecidesNothing(t *testing.T) {
	_, repo := newRepo(t, store.InitOptions{})
	now := time.Date(2026, 11, 21, 6, 30, 0, 0, time.UTC)
	lock := backup.Duration{Days: 7}
	addr := serveAgents(t, repo, agent.ServerOptions{Now: func() time.Time { return now },
		Lock: func(ctx context.Context, p *store.Point) error { return backup.Lock(ctx, repo, p, lock, now) }})
	c, info := newAgent(t, repo, addr)
	snap := &memSnapshot{name: "vm", at: now.AddDate(50, 0, 0), disks: []*memDisk{{key: "a", data: []byte("a disk")}}}
	p, err := backup.RunTo(t.Context(), backup.Away(c), snap, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !p.Time.Equal(now) || p.Name != "2026-11-21T063000Z" {
		t.Errorf("the client sees %s, %s", p.Name, p.Time)
	}
	p, err = repo.Point(t.Context(), p.ID)
	if err != nil || !p.Time.Equal(now) || p.Agent != info.ID || !p.LockedUntil.Equal(now.AddDate(0, 0, 7)) || p.Stats.Stored == 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := backup.RunTo(t.Context(), backup.Away(c), snap, backup.Options{LockFor: lock}); !errors.Is(err, backup.ErrNoLock) {
		t.Errorf("a lock of the client's own: %v", err)
	}
}

// TestLocalDoesNotBelieveAgents: what a helper says of a disk at a change id is not what
// a backup of this host starts from, and the other way round.
func TestLocalDoesNotBelieveAgents(t *testing.T) {
	_, repo := newRepo(t, store.InitOptions{})
	c, _ := newAgent(t, repo, serveAgents(t, repo, agent.ServerOptions{}), "vm")
	real := &memDisk{key: "a", data: bytes.Repeat([]byte("real"), 100_000), change: "1"}
	bogus := &memDisk{key: "a", data: bytes.Repeat([]byte("fake"), 100_000), change: "1"}
	run := func(to backup.Target, d *memDisk, want string) *store.Point {
		t.Helper()
		p, err := backup.RunTo(t.Context(), to, &memSnapshot{name: "vm", at: time.Now(), disks: []*memDisk{d}}, backup.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if p.Disks[0].Read != want {
			t.Errorf("read %q, want %q", p.Disks[0].Read, want)
		}
		wantDisk(t, repo, mustPoint(t, repo, p.ID), "disk0", d.data)
		return p
	}
	run(backup.Away(c), bogus, "full: first backup of this disk")
	bogus.changed = map[string][]extent.Extent{"1": nil}
	real.changed = bogus.changed // nothing, says the source
	first := run(backup.Local(repo), real, "full: first backup of this disk")
	run(backup.Away(c), bogus, "changes")
	if p := run(backup.Local(repo), real, "changes"); *p.Parent != first.ID {
		t.Error("the parent is another one")
	}
}

func mustPoint(t *testing.T, r *store.Repo, id store.PointID) *store.Point {
	t.Helper()
	p, err := r.Point(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestAgentsBesideAll: two helpers, a backup of this host, forget and gc at once; all that is left reads back.
func TestAgentsBesideAll(t *testing.T) {
	dir := t.TempDir()
	open := func() *store.Repo {
		b, err := bucket.OpenLocal(dir)
		if err != nil {
			t.Fatal(err)
		}
		r, err := store.Open(t.Context(), b, remote.Index(dir), store.OpenOptions{Leases: remote.Leases(dir),
			Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Init(t.Context(), b, store.InitOptions{ChunkSize: 64 << 10, Passphrase: []byte("secret")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo, third, keeper := open(), open(), open() // as three processes would
	addr := serveAgents(t, repo, agent.ServerOptions{})
	var mu sync.Mutex // guards following
	content := map[store.PointID][]byte{}
	var wg sync.WaitGroup
	maker := func(to backup.Target, vm string, seed uint64) {
		defer wg.Done()
		rnd := rand.New(rand.NewPCG(seed, 1))
		d := &memDisk{key: "a", data: make([]byte, 6<<20)}
		for round := range 10 {
			mutate(rnd, d.data, 3)
			copy(d.data[rnd.IntN(5<<20):], bytes.Repeat([]byte{byte(round)}, 300_000)) // what others have, too
			p, err := backup.RunTo(t.Context(), to, &memSnapshot{name: vm, at: time.Now(), disks: []*memDisk{d}}, backup.Options{})
			if err != nil {
				t.Errorf("%s: %v", vm, err)
				return
			}
			mu.Lock()
			content[p.ID] = bytes.Clone(d.data)
			mu.Unlock()
		}
	}
	c1, _ := newAgent(t, repo, addr)
	c2, _ := newAgent(t, repo, addr)
	wg.Add(3)
	go maker(backup.Away(c1), "one", 1)
	go maker(backup.Away(c2), "two", 2)
	go maker(backup.Local(third), "three", 3)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for n := 0; ; n++ {
		select {
		case <-done:
			if _, err := keeper.GC(t.Context(), store.GCOptions{MaxLive: 0.5}); err != nil {
				t.Fatal(err)
			}
			fresh := open()
			left, err := fresh.Points(t.Context())
			if err != nil || len(left) == 0 || len(left) >= len(content) && n > 3 {
				t.Fatalf("%d points are left of %d, %v", len(left), len(content), err)
			}
			for _, s := range left {
				wantDisk(t, fresh, mustPoint(t, fresh, s.ID), "disk0", content[s.ID])
			}
			t.Logf("%d collections, %d points of %d", n, len(left), len(content))
			return
		default:
		}
		for _, vm := range []string{"one", "two", "three"} {
			list, err := keeper.PointsOf(t.Context(), vm)
			if err != nil {
				t.Fatal(err)
			}
			if len(list) > 1 { // the parent of a run at work, too
				if _, err := keeper.Forget(t.Context(), []store.PointID{list[len(list)-1-n%2].ID}, time.Now()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := keeper.GC(t.Context(), store.GCOptions{MaxLive: 0.5}); err != nil {
			t.Fatal(err)
		}
	}
}
