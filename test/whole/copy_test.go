package whole

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// newDestination makes a repository with another password, and gives what r needs
// before a copy's own words to find it.
func newDestination(t *testing.T, args ...string) (to *repository, flags []string) {
	t.Helper()
	to = &repository{dir: filepath.Join(newDir(t), "to"), password: "battery staple"}
	to.must(t, append([]string{"init", to.dir}, args...)...)
	file := to.dir + ".pw"
	if err := os.WriteFile(file, []byte(to.password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return to, []string{"--to", to.dir, "--to-password-file", file}
}

// copied is what `copy --json` says: a point, or the summary.
type copied struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	ID      string `json:"id"`
	From    string `json:"from"`
	Error   string `json:"error"`
	Copied  int    `json:"points_copied"`
	Skipped int    `json:"points_skipped"`
	Failed  int    `json:"points_failed"`
	Read    int64  `json:"bytes_read"`
	New     int64  `json:"bytes_new"`
	Stored  int64  `json:"bytes_stored"`
}

// copyReport reads it, the summary last.
func copyReport(t *testing.T, out string) (all []copied) {
	t.Helper()
	for line := range strings.Lines(out) {
		var c copied
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	if len(all) == 0 || all[len(all)-1].Type != "summary" {
		t.Fatalf("no summary:\n%s", out)
	}
	return all
}

// TestCopy copies two points of a qcow2 chain to a repository of other chunks and
// another password while a mount owns that, and has qemu compare what comes back from there, when
// the source is gone, with the disks that were backed up.
func TestCopy(t *testing.T) {
	needs(t, "fuse", "qemu-img", "qemu-io")
	for name, args := range map[string][]string{
		"smaller chunks": {"--chunk-size", "64K"}, "larger, plain": {"--chunk-size", "1M", "--no-encryption"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := newDir(t)
			src := newChain(t, dir)
			r := newRepository(t)
			first, _ := r.backup(t, src.file, "--vm", "vm", "--tag", "one")
			old := disk{dir + "/old.raw", "raw", src.size}
			tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", src.file, old.file)
			tool(t, "qemu-io", "-f", "qcow2", src.file, "-c", "write -q -P 0x31 70M 3M", "-c", "write -q -z 1M 64k")
			second, _ := r.backup(t, src.file, "--vm", "vm")

			to, flags := newDestination(t, args...)
			m := to.mount(t)
			r.wants(t, 12, "wrong passphrase", "copy", "--to", newEncrypted(t), "--to-password-file", flags[3])
			r.wants(t, 10, "not a holdfast repository", "copy", "--to", dir+"/nowhere", "--to-password-file", flags[3])
			r.wants(t, 10, "not a holdfast repository", "copy", "--to", dir)
			r.wants(t, 64, "same repository", "copy", "--to", r.dir+"/../repo/.")

			report := copyReport(t, r.must(t, append([]string{"copy", "--json"}, flags...)...).out)
			if sum := report[len(report)-1]; len(report) != 3 || sum.Copied != 2 || report[0].From != first.ID || report[1].From != second.ID {
				t.Fatalf("the copy says %+v", report)
			}
			if report[1].Read < 3<<20 || report[1].Read > 8<<20 {
				t.Errorf("3 MiB differ in the second point: %+v", report[1])
			}
			before := contents(t, to.dir+"/packs")
			again := copyReport(t, r.must(t, append([]string{"copy", "vm", "--json"}, flags...)...).out)
			if sum := again[len(again)-1]; sum.Skipped != 2 || sum.Copied+sum.Failed != 0 {
				t.Errorf("the same again says %+v", again)
			}
			if after := contents(t, to.dir+"/packs"); len(after) != len(before) {
				t.Errorf("%d files in packs, then %d", len(before), len(after))
			}
			tool(t, "cmp", old.file, filepath.Join(m.dir, first.path(), "disk0.raw"))
			m.stop(t, terminate)

			if err := os.RemoveAll(r.dir); err != nil {
				t.Fatal(err)
			}
			to.withoutIndex(t)
			to.must(t, "verify", "--read-data")
			for i, want := range []disk{old, src} {
				out := filepath.Join(dir, "out", report[i].ID)
				to.must(t, "restore", report[i].ID, "--to", out, "--format", "qcow2")
				compare(t, want, out+"/disk0.qcow2", "qcow2")
			}
			list := to.points(t)
			if len(list) != 2 || list[0].path() != first.path() || len(list[0].Tags) != 1 || list[1].path() != second.path() {
				t.Errorf("the destination has %+v", list)
			}
		})
	}
}

// newEncrypted makes a repository of which nobody has the password.
func newEncrypted(t *testing.T) string {
	t.Helper()
	r := &repository{dir: filepath.Join(newDir(t), "locked"), password: "lost"}
	r.must(t, "init", r.dir)
	return r.dir
}

// TestCopyDamage: a damaged chunk costs the points that use it, and no others.
func TestCopyDamage(t *testing.T) {
	needs(t)
	t.Parallel()
	d := newDamaged(t)
	var chunk record
	for _, rec := range d.records {
		if !rec.page {
			chunk = rec
			break
		}
	}
	undo := flip(t, d.pack, chunk.body+30)
	to, flags := newDestination(t)
	// Of the points that are damaged alone nothing can be done.
	res := d.wants(t, 4, d.hit.path()+" disk0 at offset", append([]string{"copy", "hit"}, flags...)...)
	if !strings.Contains(res.err, "copy "+d.also.path()+": ") {
		t.Errorf("the second point is not named:\n%s", res.err)
	}
	res = d.wants(t, 3, "2 points are not copied", append([]string{"copy", "--json"}, flags...)...)
	report := copyReport(t, res.out)
	if sum := report[len(report)-1]; sum.Copied != 1 || sum.Failed != 2 || report[0].Status != "failed" ||
		!strings.Contains(report[0].Error, d.hit.path()+" disk0 at offset") || report[2].From != d.other.ID {
		t.Errorf("the copy says %+v", report)
	}
	to.must(t, "verify", "--read-data")
	to.reads(t, kept{point{ID: report[2].ID}, d.other.copy})
	undo()
	report = copyReport(t, d.must(t, append([]string{"copy", "--json"}, flags...)...).out)
	if sum := report[len(report)-1]; sum.Copied != 2 || sum.Skipped != 1 {
		t.Errorf("the copy of what was mended says %+v", report)
	}
	var all []kept
	for _, c := range report[:3] {
		for _, k := range []kept{d.hit, d.also, d.other} {
			if k.ID == c.From {
				all = append(all, kept{point{ID: c.ID}, k.copy})
			}
		}
	}
	to.must(t, "verify", "--read-data")
	to.intact(t, all...)
}

// TestCopyInterrupted: SIGINT ends a copy with 130.
func TestCopyInterrupted(t *testing.T) {
	needs(t)
	t.Parallel()
	r := newRepository(t)
	r.backup(t, newRaw(t, newDir(t)+"/big.raw", 300*mib, piece{0, 300 * mib}).file)
	to, flags := newDestination(t)
	p := r.start(t, append([]string{"copy"}, flags...)...)
	until(t, "the first bytes", func() bool {
		apparent, _ := usage(t, to.dir)
		return apparent > 2*mib
	})
	_ = p.cmd.Process.Signal(os.Interrupt)
	if code := p.code(t); code != 130 || !strings.Contains(p.err.String(), "holdfast: interrupted\n") {
		t.Errorf("exit %d:\n%s", code, p.err.String())
	}
	if n := len(to.points(t)); n != 0 {
		t.Errorf("%d points", n)
	}
	r.must(t, append([]string{"copy"}, flags...)...)
	to.must(t, "verify", "--read-data")
}

// TestKillCopy kills copies; the next one goes on until all is there and right, and
// then a new destination is begun.
func TestKillCopy(t *testing.T) {
	needs(t)
	t.Parallel()
	h := newHistory(t)
	k := newKiller(t, 300*time.Millisecond)
	for range 6 {
		h.change(t, k.rnd)
		p := h.try(t)
		if code := p.code(t); code != 0 {
			t.Fatalf("backup ended with %d:\n%s", code, p.err.String())
		}
		h.look(t, summaryOf(p.out.String()))
	}
	k.end = time.Now().Add(time.Until(k.end) / 2)
	sizes := []string{"64K", "128K", "512K"}
	rounds := 0
	for ; k.goesOn(t); rounds++ {
		to, flags := newDestination(t, "--chunk-size", sizes[rounds%len(sizes)])
		args := append([]string{"copy", "--json"}, flags...)
		ids := map[string]string{} // point of the source => its copy
		for k.goesOn(t) {
			p := h.start(t, args...)
			killed := k.kill(t, p)
			if code := p.code(t); !killed && code != 0 {
				t.Fatalf("the copy ended with %d:\n%s", code, p.err.String())
			}
			for line := range strings.Lines(p.out.String()) {
				var c copied
				if json.Unmarshal([]byte(line), &c) == nil && c.Type == "point" { // the last line may be cut
					if ids[c.From] != "" && ids[c.From] != c.ID {
						t.Errorf("%s was copied as %s, then as %s", c.From, ids[c.From], c.ID)
					}
					ids[c.From] = c.ID
				}
			}
			listed := map[string]bool{}
			for _, q := range to.points(t) {
				listed[q.ID] = q.Damaged == ""
			}
			for _, id := range ids {
				if !listed[id] {
					t.Errorf("the copy %s was reported and is gone", id)
				}
			}
			if !killed {
				break
			}
		}
		report := copyReport(t, h.must(t, args...).out)
		if n := len(to.points(t)); len(report) != 7 || n != 6 {
			t.Errorf("%d points, the last copy says %+v", n, report)
		}
		to.must(t, "verify", "--read-data")
		for _, c := range report[:len(report)-1] {
			out := filepath.Join(to.dir+".out", c.ID)
			to.must(t, "restore", c.ID, "--to", out)
			if sum(t, out+"/disk0.raw") != h.points[c.From] {
				t.Errorf("%s is not what was backed up", c.ID)
			}
		}
		if left, _ := filepath.Glob(to.dir + "/tmp/*"); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
		if err := os.RemoveAll(filepath.Dir(to.dir)); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d destinations", rounds)
}
