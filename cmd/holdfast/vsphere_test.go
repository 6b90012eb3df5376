package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// platformTest is a vCenter with one VM of one disk, and a repository.
type platformTest struct {
	server *vspheretest.Server
	vm     *vspheretest.VM
	guest  []byte // what the disk holds
	clock  *stillClock
	common []string // arguments of all commands
}

func newPlatformTest(t *testing.T, source string, size int) *platformTest {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("HOLDFAST_STATE", filepath.Join(dir, "state"))
	p := &platformTest{server: vspheretest.New(t, vspheretest.Options{}), guest: make([]byte, size), clock: newStillClock()}
	p.vm = p.server.AddVM(vspheretest.VMSpec{Name: "web", ChangeTracking: true, Disks: []vspheretest.DiskSpec{{Size: int64(size)}}})
	config := filepath.Join(dir, "config.yaml")
	text := fmt.Sprintf("sources:\n  lab: {vsphere: %q, user: %q, password_file: pw, thumbprint: %q%s}\n", p.server.URL(), p.server.User, p.server.Thumbprint(), source)
	for file, text := range map[string]string{config: text, filepath.Join(dir, "pw"): p.server.Password} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	repo := filepath.Join(dir, "repo")
	p.common = []string{"--config", config, "--repo", repo, "--no-progress"}
	p.run(t, "init", "--no-encryption", "--chunk-size", "64K", repo)
	return p
}

// run runs a command, which must end well.
func (p *platformTest) run(t *testing.T, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, said bytes.Buffer
	code := run(t.Context(), env{stdout: &out, stderr: &said, clock: p.clock, commands: commands()}, append(args, p.common...))
	if code != exitOK {
		t.Fatalf("%q: exit %d\n%s", args, code, said.String())
	}
	return out.String(), said.String()
}

// write is a guest that writes random bytes.
func (p *platformTest) write(rnd *rand.ChaCha8, off, n int) {
	_, _ = rnd.Read(p.guest[off:][:n])
	p.vm.WriteAt(0, p.guest[off:][:n], int64(off))
}

// holds reports whether the last point holds what the guest has.
func (p *platformTest) holds(t *testing.T) bool {
	t.Helper()
	dir := t.TempDir()
	p.run(t, "restore", "web/latest", "--to", dir)
	got, err := os.ReadFile(filepath.Join(dir, "disk0.raw"))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(got, p.guest)
}

// TestLiar: a host that leaves changes out, or what is allocated, is found out when a comparison is due, and not before; then the program ends well, names the areas
// and has a right point. A full backup believes the host nothing.
func TestLiar(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	const size, unit = 8 << 20, 64 << 10
	p := newPlatformTest(t, ", verify_changes_every: 7d", size)
	rnd := rand.NewChaCha8([32]byte{1})
	p.write(rnd, 0, 2<<20)
	lie := func(change func(f *vspheretest.Faults)) func() {
		return func() { p.server.Misbehave(change) }
	}
	hide := lie(func(f *vspheretest.Faults) { f.HideChange = true })
	hideAll := lie(func(f *vspheretest.Faults) { f.HideChange, f.HideAllocated = true, true })
	named := func(kind string, off int) string {
		return fmt.Sprintf("disk0: change tracking was wrong: %d bytes %s, at %d+%d;", unit, kind, off, unit)
	}
	const unnamed, unknown = "had changed that the source did not name", "hold data where the source says that nothing is allocated"
	for _, c := range []struct {
		what    string
		days    int // since the last one
		do      func()
		args    []string
		read    int64 // bytes
		how     string
		wrong   bool     // the point is not what the guest has: the host lied, and nobody looked
		warning []string // that it says; nil: nothing
	}{
		{what: "the first one", read: 2 << 20, how: "full: first backup of this disk"},
		{what: "a lie before it is due", days: 6, do: func() { hide(); p.write(rnd, 4<<20, 2*unit) }, read: unit, how: "changes", wrong: true},
		{what: "due", days: 1, do: hideAll, read: size, how: "full: its change tracking was compared with the disk", warning: []string{named(unnamed, 4<<20+unit), named(unknown, 4<<20+unit)}},
		{what: "no longer due", days: 6, read: 0, how: "changes"},
		{what: "zeros before it is due", do: func() {
			hide()
			p.vm.Zero(0, unit, unit)
			clear(p.guest[unit:][:unit])
		}, read: 0, how: "changes", wrong: true},
		{what: "due again, the host is honest about what is allocated", days: 1, do: lie(func(f *vspheretest.Faults) { f.HideAllocated = false }), read: size,
			how: "full: its change tracking was compared with the disk", warning: []string{named(unnamed, unit)}},
		{what: "no longer due again", days: 1, read: 0, how: "changes"},
		{what: "changes before a full one", do: func() { hideAll(); p.write(rnd, 6<<20, 2*unit) }, read: unit, how: "changes", wrong: true},
		{what: "full", args: []string{"--full"}, read: size, how: "full: asked for"},
		{what: "after it", days: 6, read: 0, how: "changes"}, // the full one counts, too
	} {
		p.clock.advance(time.Duration(c.days) * 24 * time.Hour)
		if c.do != nil {
			c.do()
		}
		asked := p.server.Counts().Calls["QueryChangedDiskAreas"]
		out, said := p.run(t, append([]string{"backup", "--source", "lab", "web", "--json"}, c.args...)...)
		var sum struct {
			Points []struct {
				Read     int64    `json:"bytes_read"`
				Warnings []string `json:"warnings"`
			}
		}
		if err := json.Unmarshal([]byte(out), &sum); err != nil || len(sum.Points) != 1 {
			t.Fatalf("%s: %v\n%s", c.what, err, out)
		}
		if got := sum.Points[0]; got.Read != c.read || len(got.Warnings) != len(c.warning) {
			t.Errorf("%s: %d bytes were read, it warns %q", c.what, got.Read, got.Warnings)
		} else {
			for i, w := range c.warning {
				if !strings.HasPrefix(got.Warnings[i], w) || !strings.Contains(said, w) {
					t.Errorf("%s: it warns %q, want %q; it says\n%s", c.what, got.Warnings[i], w, said)
				}
			}
		}
		if show, _ := p.run(t, "show", "web/latest", "--json"); !strings.Contains(show, fmt.Sprintf(`"read":%q`, c.how)) {
			t.Errorf("%s: not read as %q\n%s", c.what, c.how, show)
		}
		if p.holds(t) == c.wrong {
			t.Errorf("%s: that the point is wrong should be %t", c.what, c.wrong)
		}
		if n := p.server.Counts().Calls["QueryChangedDiskAreas"] - asked; len(c.args) > 0 && n > 0 {
			t.Errorf("%s: the host was asked %d times what it tracks", c.what, n)
		}
	}
}

// TestStrays: what was left on a server that has another address now is said once, by its own name, and neither removed nor taken for what was left on
// this one.
func TestStrays(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	p := newPlatformTest(t, "", 1<<20)
	config := p.common[1]
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.TrimPrefix(string(text), "sources:\n")
	if err := os.WriteFile(config, []byte(string(text)+strings.Replace(other, "lab:", "also:", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	journal, err := openJournal()
	if err != nil {
		t.Fatal(err)
	}
	for host, name := range map[string]string{"old.example": "holdfast-0000000000000001", p.server.Host(): "holdfast-0000000000000002"} {
		e, err := journal.Begin(backup.Leftover{Source: "lab", Host: host, VM: p.vm.Ref().Value, Name: name})
		if err != nil {
			t.Fatal(err)
		}
		e.Leave()
	}
	const stray = "an earlier run left snapshot holdfast-0000000000000001 on old.example, which no source in the config names"
	for _, c := range []struct {
		args         []string
		strays, here int
	}{
		{nil, 1, 2}, {[]string{"--source", "lab"}, 1, 1}, {[]string{"--source", "also"}, 0, 1}, {[]string{"--clean"}, 1, 0}, {nil, 1, 0},
	} {
		out, _ := p.run(t, append([]string{"doctor"}, c.args...)...)
		if n, here := strings.Count(out, stray), strings.Count(out, "an earlier run left snapshot holdfast-0000000000000002: "); n != c.strays || here != c.here || strings.Count(out, "which no source") != c.strays {
			t.Errorf("%q says it %d times, and of its own server %d times:\n%s", c.args, n, here, out)
		}
	}
}
