package whole

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// namesOf lists the names of the points of a VM, from old to new.
func (r *repository) namesOf(t *testing.T, vm string) (list []string) {
	t.Helper()
	for _, p := range r.points(t) {
		if p.VM == vm {
			list = append(list, p.Name)
		}
	}
	return list
}

// wantNames compares what points lists of a VM, what a mount shows, and what is wanted.
func wantNames(t *testing.T, r *repository, m *mounted, vm string, want ...string) {
	t.Helper()
	if got := r.namesOf(t, vm); !slices.Equal(got, want) {
		t.Errorf("points of %s: %q, want %q", vm, got, want)
	}
	if got := names(t, m.dir+"/"+vm); got != strings.Join(want, " ")+" latest" {
		t.Errorf("the mount has %q, want %q", got, want)
	}
	if to, err := os.Readlink(m.dir + "/" + vm + "/latest"); to != want[len(want)-1] {
		t.Errorf("latest leads to %q, %v", to, err)
	}
}

// TestForget forgets points by rule, by id and by name while a mount owns the
// repository: both processes agree at once, other VMs and points stay whole, and what is
// open goes on reading. Without its index the repository says the same.
func TestForget(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	r.addPoints(t, k, 2*50, 2) // vm000 and vm001, every hour from 2025-01-01 00:00 to 01-03 01:00
	m := r.mount(t)
	if n := len(r.points(t)); n != 101 {
		t.Fatalf("%d points", n)
	}
	all := r.namesOf(t, "vm001")
	lost := all[10]
	open, err := os.Open(filepath.Join(m.dir, "vm000", lost, "disk0.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()

	before := contents(t, r.dir)
	rules := []string{"forget", "vm000", "--keep-last", "2", "--keep-daily", "2", "--keep-monthly", "1"}
	dry := r.must(t, append(rules, "--dry-run")...)
	if !strings.Contains(dry.out, "47 points would be forgotten, 3 stay; nothing was changed") {
		t.Errorf("the dry run says:\n%s", dry.out)
	}
	if after := contents(t, r.dir); !slices.Equal(before, after) {
		t.Error("the dry run changed the repository")
	}
	wantNames(t, r, m, "vm000", all...)

	res := r.must(t, append(rules, "--json")...)
	type line struct {
		Type, Name string
		Keep       any // true or false in a decision, a number in the summary
		Reasons    []string
		Forgotten  int
	}
	var kept []string
	for text := range strings.Lines(res.out) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		if l.Keep == true {
			kept = append(kept, l.Name+": "+strings.Join(l.Reasons, ", "))
		}
		if l.Type == "summary" && l.Forgotten != 47 {
			t.Errorf("%s", text)
		}
	}
	if want := []string{
		"2025-01-02T230000Z: daily 2025-01-02",
		"2025-01-03T000000Z: last 2 #2",
		"2025-01-03T010000Z: last 2 #1, daily 2025-01-03, monthly 2025-01, newest good point of VM vm000",
	}; !slices.Equal(kept, want) {
		t.Errorf("kept %q, want %q", kept, want)
	}
	wantNames(t, r, m, "vm000", "2025-01-02T230000Z", "2025-01-03T000000Z", "2025-01-03T010000Z")
	wantNames(t, r, m, "vm001", all...)
	if _, err := os.Stat(filepath.Join(m.dir, "vm000", lost)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mount still shows a forgotten point: %v", err)
	}
	want, err := os.ReadFile(k.copy)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(open); err != nil || !bytes.Equal(got, want) {
		t.Errorf("a file of a forgotten point that was open reads wrong: %v", err)
	}
	open.Close()
	if again := r.must(t, rules...); !strings.Contains(again.out, "nothing to forget, 3 points stay") {
		t.Errorf("the same rules again:\n%s", again.out)
	}

	// By name and by id; then the newest, which moves latest.
	r.must(t, "forget", "vm000/2025-01-02T230000Z")
	wantNames(t, r, m, "vm000", "2025-01-03T000000Z", "2025-01-03T010000Z")
	r.wants(t, 1, "is the newest good point of VM", "forget", "vm000/2025-01-03T010000Z")
	wantNames(t, r, m, "vm000", "2025-01-03T000000Z", "2025-01-03T010000Z")
	r.must(t, "forget", "--force", "vm000/latest")
	wantNames(t, r, m, "vm000", "2025-01-03T000000Z")
	tool(t, "cmp", k.copy, m.dir+"/vm000/latest/disk0.raw")
	r.must(t, "forget", "--force", "vm000/latest")
	if got := names(t, m.dir); got != "kept vm001" {
		t.Errorf("the mount shows %q", got)
	}
	r.wants(t, 1, "no point", "restore", "vm000/latest", "--to", newDir(t)+"/x")

	m.stop(t, terminate)
	r.must(t, "verify", "--read-data")
	ids := func() (list []string) {
		for _, p := range r.points(t) {
			list = append(list, p.ID)
		}
		return list
	}
	with := ids()
	r.withoutIndex(t)
	if without := ids(); len(with) != 51 || !slices.Equal(with, without) {
		t.Errorf("%d points are listed, without the index %d", len(with), len(without))
	}
	r.reads(t, k)
}

// TestForgetInZone: days are those of the user.
func TestForgetInZone(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/usr/share/zoneinfo/Asia/Kathmandu"); err != nil {
		t.Skip(err)
	}
	r, k := newKept(t)
	r.addPoints(t, k, 30, 1)                    // from 2025-01-01 00:00 to 01-02 05:00 UTC
	r.as = []string{"env", "TZ=Asia/Kathmandu"} // 5:45 ahead
	r.must(t, "forget", "vm000", "--keep-daily", "5", "--keep-hourly", "2")
	if got, want := r.namesOf(t, "vm000"), []string{"2025-01-01T180000Z", "2025-01-02T040000Z", "2025-01-02T050000Z"}; !slices.Equal(got, want) {
		t.Errorf("kept %q, want %q", got, want)
	}
}

// TestForgetBesideDamage: a manifest goes bad on the disk, unknown to the index. It must
// not be the one that stays, nor go unasked.
func TestForgetBesideDamage(t *testing.T) {
	t.Parallel()
	r, k := newKept(t)
	r.addPoints(t, k, 6, 1)
	all := r.points(t)
	list := all[slices.IndexFunc(all, func(p point) bool { return p.VM == "vm000" }):]
	spoil := func(p point) {
		t.Helper()
		name := filepath.Join(r.dir, "points", p.ID)
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spoil(list[1])
	spoil(list[5])
	ids := func() (s []string) {
		for _, p := range r.points(t) {
			if p.VM == "vm000" {
				s = append(s, p.ID)
			}
		}
		return s
	}
	r.wants(t, 1, "is the newest good point of VM", "forget", list[4].ID)
	res := r.wants(t, 4, "1 damaged points stay", "forget", "--keep-last", "1")
	if !strings.Contains(res.out, "keep    damaged") || !strings.Contains(res.out, "last 1 #1, newest good point of VM vm000") {
		t.Errorf("it says:\n%s", res.out)
	}
	if got, want := ids(), []string{list[1].ID, list[4].ID, list[5].ID}; !slices.Equal(got, want) {
		t.Errorf("left %q, want %q", got, want)
	}
	r.reads(t, kept{list[4], k.copy})
	for _, p := range []point{list[1], list[5]} {
		r.wants(t, 4, "nobody knows whether it is locked", "forget", p.ID)
	}
	r.withoutIndex(t) // now the listing knows
	r.wants(t, 4, "nobody knows whether it is locked", "forget", list[1].ID)
	r.must(t, "forget", "--force", list[1].ID, list[5].ID)
	if got, want := ids(), []string{list[4].ID}; !slices.Equal(got, want) {
		t.Errorf("left %q, want %q", got, want)
	}
	r.must(t, "verify")
}

// TestForgetLocked: a second process cannot get round a lock either, while a mount
// owns the repository.
func TestForgetLocked(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	locked, _ := r.backup(t, "--vm", "web", "--lock-for", "1y", k.copy)
	m := r.mount(t)
	open, _ := r.backup(t, "--vm", "web", k.copy)
	for _, args := range [][]string{{locked.ID}, {"--force", locked.path()}, {"--force", open.ID, locked.ID}} {
		r.wants(t, 1, "point is locked until ", append([]string{"forget"}, args...)...)
	}
	r.must(t, "forget", "--keep-last", "1")
	wantNames(t, r, m, "web", locked.Name, open.Name)
	for _, p := range []point{locked, open} {
		tool(t, "cmp", k.copy, filepath.Join(m.dir, p.path(), "disk0.raw"))
	}
	m.stop(t, terminate)
}

// TestForgetOneAfterTheOther: what a rule keeps, another run must not forget before
// the decision is carried out. So the second waits, and decides by what is left then.
func TestForgetOneAfterTheOther(t *testing.T) {
	t.Parallel()
	r, k := newKept(t)
	r.addPoints(t, k, 2, 1)
	b, err := bucket.OpenLocal(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := b.Lock(t.Context(), "forget.lock")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	before := r.namesOf(t, "vm000")
	p := r.start(t, "forget", "vm000", "--keep-last", "1")
	r.must(t, "forget", "vm000", "--keep-last", "1", "--dry-run") // needs no lock
	time.Sleep(300 * time.Millisecond)
	if !p.running() {
		t.Fatal("forget did not wait for another one")
	}
	if got := r.namesOf(t, "vm000"); !slices.Equal(got, before) {
		t.Fatalf("points %q, want %q", got, before)
	}
	unlock()
	if code := p.code(t); code != 0 {
		t.Fatalf("exit code %d: %s", code, p.err.String())
	}
	if got := r.namesOf(t, "vm000"); !slices.Equal(got, before[len(before)-1:]) {
		t.Errorf("points %q", got)
	}
}
