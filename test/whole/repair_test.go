package whole

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// known gives what `points` says to be damaged: point => "2 chunks of disk0".
func (r *repository) known(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(r.must(t, "points", "--json").out) {
		var p struct {
			point
			Hit []struct {
				Disk   string `json:"disk"`
				Chunks int    `json:"chunks"`
				Pages  int    `json:"pages"`
				Off    int64  `json:"offset"`
			} `json:"damaged_disks"`
		}
		if err := json.Unmarshal([]byte(line), &p); err != nil {
			t.Fatal(err)
		}
		for _, h := range p.Hit {
			all[p.path()] += fmt.Sprintf("%d chunks, %d pages of %s from %d;", h.Chunks, h.Pages, h.Disk, h.Off)
		}
	}
	return all
}

func (r *repository) wantKnown(t *testing.T, want string, points ...kept) {
	t.Helper()
	known := r.known(t)
	for _, k := range points {
		if known[k.path()] != want {
			t.Errorf("%s: known damage %q, want %q", k.path(), known[k.path()], want)
		}
		show := r.must(t, "show", k.ID).out
		if strings.Contains(show, "DAMAGED") != (want != "") {
			t.Errorf("show %s:\n%s", k.path(), show)
		}
		delete(known, k.path())
	}
	for p, d := range known {
		t.Errorf("%s: known damage %q", p, d)
	}
}

// TestDamageIsRemembered: damage that was found once is known until a backup has healed it,
// whatever becomes of the index, and afterwards the damaged copy is never chosen again.
func TestDamageIsRemembered(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newDamaged(t)
	n := 0
	for _, rec := range d.records {
		if !rec.page && n < 2 && rec.end-rec.off > 10000 { // those of the disk
			flip(t, d.pack, rec.body+100)
			n++
		}
	}
	d.wantKnown(t, "")
	found := d.damage(t)
	const want = "2 chunks, 0 pages of disk0 from "
	first := *found[0].Offset
	for _, f := range found {
		first = min(first, *f.Offset)
	}
	text := fmt.Sprint(want, first, ";")
	d.wantKnown(t, text, d.hit, d.also)
	for range 2 {
		d.withoutIndex(t)
		d.wantKnown(t, text, d.hit, d.also)
	}
	d.wants(t, 4, "damage found", "verify")
	d.must(t, "repair", "index")
	d.lost(t, d.hit)

	// The bytes come back with a backup of another VM, which is told to store them.
	p, _ := d.backup(t, "--vm", "healer", d.hit.copy)
	if p.New != 2*smallChunk {
		t.Errorf("%d bytes were stored, want those of two chunks", p.New)
	}
	d.wantKnown(t, "")
	for range 5 {
		d.intact(t, d.hit, d.also, d.other, kept{p, d.hit.copy})
		d.withoutIndex(t)
	}
	d.must(t, "verify")
	if found := d.damage(t); found[0].Point != "" {
		t.Errorf("a point is hit: %+v", found)
	}
	// Their pack is damaged still, and nobody needs what is wrong with it.
	d.must(t, "repair", "packs")
	d.must(t, "verify", "--read-data")
	d.intact(t, d.hit, d.also, d.other, kept{p, d.hit.copy})
}

// TestRepairFrom heals a repository from a copy with chunks of another size and another password.
func TestRepairFrom(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newDamaged(t)
	to, flags := newDestination(t, "--chunk-size", "1M")
	d.must(t, append([]string{"copy"}, flags...)...)
	from := []string{"repair", "--from", to.dir, "--from-password-file", to.dir + ".pw"}
	for i, rec := range d.records {
		if i%3 == 0 || rec.page {
			flip(t, d.pack, rec.body+50)
		}
	}
	d.withoutIndex(t)
	d.damage(t)
	d.lost(t, d.hit)
	d.wants(t, 12, "wrong passphrase", "repair", "--from", to.dir, "--from-password-file", newPassword(t, "no"))
	out := d.must(t, append(from, "--json")...).out
	var rep struct {
		Chunks int `json:"chunks_healed"`
		Pages  int `json:"pages_healed"`
		Left   int `json:"damaged"`
	}
	if err := json.Unmarshal([]byte(out), &rep); err != nil || rep.Chunks == 0 || rep.Pages == 0 || rep.Left != 0 {
		t.Errorf("%s, %v", out, err)
	}
	d.wantKnown(t, "")
	d.intact(t, d.hit, d.also, d.other)
	d.withoutIndex(t)
	d.intact(t, d.hit, d.also, d.other)
	d.must(t, "repair", "packs")
	d.must(t, "verify", "--read-data")
	d.must(t, from...)

	// And the other way: the copy is healed from what it is a copy of.
	packs, err := filepath.Glob(to.dir + "/packs/*")
	if err != nil || len(packs) == 0 {
		t.Fatal(packs, err)
	}
	for _, p := range packs {
		recs, _, _ := readPack(t, p)
		for _, rec := range recs {
			flip(t, p, rec.body+10)
		}
	}
	to.withoutIndex(t)
	to.damage(t)
	to.wants(t, 4, "places stay damaged", "repair", "--from", newRepository(t).dir, "--from-password-file", newPassword(t, "correct horse"))
	to.must(t, "repair", "--from", d.dir, "--from-password-file", newPassword(t, d.password))
	to.withoutIndex(t)
	for _, p := range to.points(t) {
		for _, k := range []kept{d.hit, d.also, d.other} {
			if k.path() == p.path() {
				to.reads(t, kept{p, k.copy})
			}
		}
	}
}

// TestRepairPacks damages a pack in ways that leave most of it, and saves that.
func TestRepairPacks(t *testing.T) {
	needs(t)
	t.Parallel()
	change := func(fn func(d *damaged, b []byte) []byte) func(t *testing.T, d *damaged) {
		return func(t *testing.T, d *damaged) {
			b, err := os.ReadFile(d.pack)
			if err == nil {
				err = os.WriteFile(d.pack, fn(d, b), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	tail := func(d *damaged, b []byte) []byte { return b[:d.table+50] }
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, d *damaged)
		find   bool // by a verification before the repair
		lost   bool
	}{
		{"torn in the table", change(tail), false, false},
		{"torn in the last record", change(func(d *damaged, b []byte) []byte { return b[:d.table-10] }), false, false}, // a page, which the index has
		{"torn in the last record, no index", func(t *testing.T, d *damaged) {
			change(func(d *damaged, b []byte) []byte { return b[:d.table-10] })(t, d)
			d.withoutIndex(t)
		}, false, true},
		{"trailer lost", change(func(d *damaged, b []byte) []byte { clear(b[d.trailer:]); return b }), false, false},
		{"header lost", change(func(_ *damaged, b []byte) []byte { clear(b[:80]); return b }), false, false},
		{"middle zeroed", change(func(d *damaged, b []byte) []byte { clear(b[d.records[3].off+9 : d.records[5].off+9]); return b }), true, true},
		{"unknown, ends lost", func(t *testing.T, d *damaged) {
			change(tail)(t, d)
			change(func(_ *damaged, b []byte) []byte { clear(b[:80]); return b })(t, d)
			d.withoutIndex(t)
		}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := newDamaged(t)
			c.damage(t, d)
			if c.find {
				d.damage(t)
			}
			if c.lost {
				d.wants(t, 4, "damage found", "repair", "packs", "--dry-run")
				res := d.wants(t, 4, "are lost", "repair", "packs")
				for _, k := range []kept{d.hit, d.also} {
					if !strings.Contains(res.out, "damaged: "+k.path()+" ") {
						t.Errorf("%s is not named:\n%s", k.path(), res.out)
					}
				}
				if _, err := os.Stat(d.pack); err == nil {
					t.Error("the damaged pack is there")
				}
				d.reads(t, d.other)
				if len(d.known(t)) != 2 {
					t.Errorf("known damage: %v", d.known(t))
				}
				d.keep(t, "hit", d.file)
			} else {
				if out := d.must(t, "repair", "packs", "--dry-run").out; !strings.Contains(out, "nothing was changed") {
					t.Error(out)
				}
				d.must(t, "repair", "packs")
			}
			d.wantKnown(t, "")
			for range 2 {
				for _, k := range []kept{d.hit, d.also, d.other} {
					d.reads(t, k)
				}
				d.must(t, "verify", "--read-data")
				d.withoutIndex(t)
			}
			d.must(t, "repair", "packs")
			d.must(t, "gc")
		})
	}
}

// passReport is what `verify --json` says of a pass.
type passReport struct {
	Pass struct {
		Packs   int   `json:"packs_checked"`
		Checked int64 `json:"bytes_checked"`
		Total   int64 `json:"bytes_total"`
		Done    bool  `json:"done"`
	} `json:"pass"`
	Read int64 `json:"bytes_read"`
}

func (r *repository) pass(t *testing.T, args ...string) (p passReport) {
	t.Helper()
	out := r.must(t, append([]string{"verify", "--json"}, args...)...).out
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestVerifyKilled: parts of a pass add up to all of it, and a verification that was killed goes on
// where it was.
func TestVerifyKilled(t *testing.T) {
	needs(t)
	t.Parallel()
	r := newRepository(t)
	dir := newDir(t)
	const packs = 24
	for i := range packs {
		file := fmt.Sprintf("%s/%d.raw", dir, i)
		r.backup(t, newText(t, file, uint64(100+i), 1<<20).file)
	}
	last, total := 0, int64(0)
	for part := 0; ; part++ {
		p := r.pass(t, "--read-data-subset", "25%")
		total += p.Read
		if p.Pass.Done || p.Pass.Packs < last { // or another pass has begun in the same run
			if total < p.Pass.Total || part > 3 {
				t.Errorf("%d of %d bytes were read in %d parts", total, p.Pass.Total, part+1)
			}
			total = p.Pass.Total
			break
		}
		if p.Pass.Packs == last || p.Pass.Checked != total {
			t.Fatalf("part %d: %+v after %d packs, %d bytes", part, p, last, total)
		}
		last = p.Pass.Packs
	}

	// All of it at a rate that takes 48 s: killed after 17, and gone on with at full speed.
	killed := r.start(t, "verify", "--read-data", "--limit-rate", fmt.Sprint(total/48))
	saved := filepath.Join(r.dir, "verify", "state")
	before, err := os.Stat(saved)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "progress to be saved", func() bool {
		st, err := os.Stat(saved)
		return err == nil && st.ModTime().After(before.ModTime())
	})
	if err := killed.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-killed.ended
	p := r.pass(t, "--resume")
	if !p.Pass.Done || p.Pass.Packs != packs || p.Read >= total || p.Read <= total/4 {
		t.Errorf("resumed: %+v of %d bytes", p, total)
	}

	// An interrupt says what is left.
	i := r.start(t, "verify", "--read-data", "--limit-rate", fmt.Sprint(total/48))
	time.Sleep(3 * time.Second) // of 48: it is somewhere in the middle, and if not, the test is still right
	if err := i.cmd.Process.Signal(terminate); err != nil {
		t.Fatal(err)
	}
	if code := i.code(t); code != 130 || !strings.Contains(i.err.String(), "go on with 'holdfast verify --resume'") {
		t.Errorf("an interrupt ends with %d:\n%s", code, i.err.String())
	}
}
