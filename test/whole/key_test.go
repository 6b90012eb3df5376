package whole

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// with is the repository as somebody with another password calls it.
func (r *repository) with(password string) *repository {
	return &repository{dir: r.dir, password: password, as: r.as}
}

// keyID is the id of the key that r's password opens.
func (r *repository) keyID(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(r.must(t, "key", "list", "--json").out) {
		var k struct {
			ID    string `json:"id"`
			InUse bool   `json:"in_use"`
		}
		if err := json.Unmarshal([]byte(line), &k); err != nil {
			t.Fatal(err)
		}
		if k.InUse {
			return k.ID
		}
	}
	t.Fatal("no key is in use")
	return ""
}

// newPassword writes a password file.
func newPassword(t *testing.T, password string) string {
	t.Helper()
	file := write(t, filepath.Join(newDir(t), "new.pw"), password)
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestKeyChanges goes through the life of a repository's passwords, while another process
// owns its index.
func TestKeyChanges(t *testing.T) {
	needs(t, "fuse")
	t.Parallel()
	r, k := newKept(t)
	m := r.mount(t)
	r.must(t, "key", "add", "--new-password-file", newPassword(t, "battery staple"))
	second := r.with("battery staple")
	r.reads(t, k)
	second.reads(t, k)
	secret := strings.TrimSpace(second.must(t, "key", "recovery").out)
	second.must(t, "key", "remove", r.keyID(t))
	r.wants(t, 12, "wrong passphrase", "points")
	tool(t, "cmp", k.copy, m.dir+"/kept/latest/disk0.raw") // what runs goes on
	later := second.keep(t, "kept", newText(t, filepath.Join(newDir(t), "kept.raw"), 2, 3<<20+5).file)
	m.stop(t, terminate)
	for _, typed := range []string{secret, strings.ToLower(strings.ReplaceAll(secret, "-", " ")), strings.ReplaceAll(secret, "-", "")} {
		r.with(typed).intact(t, k, later)
	}
	second.must(t, "key", "change", "--new-password-file", newPassword(t, "correct horse"))
	second.wants(t, 12, "wrong passphrase", "points")
	r.intact(t, k, later)
	r.must(t, "verify", "--read-data")
	r.must(t, "key", "remove", r.with(secret).keyID(t))
	r.with(secret).wants(t, 12, "wrong passphrase", "points")
	// Neither copy of the config alone brings an old one back.
	for _, name := range []string{"config", "config.copy"} {
		file := filepath.Join(r.dir, name)
		good, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		write(t, file, "garbage")
		second.wants(t, 12, "wrong passphrase", "points")
		r.with(secret).wants(t, 12, "wrong passphrase", "points")
		r.must(t, "points")
		write(t, file, string(good))
	}
}

// TestKeysOfManyProcesses: none of what eight processes add at once is lost.
func TestKeysOfManyProcesses(t *testing.T) {
	needs(t)
	t.Parallel()
	r := newRepository(t)
	var all []*process
	var passwords []string
	for i := range 8 {
		p := "password " + string(rune('a'+i))
		passwords = append(passwords, p)
		all = append(all, r.start(t, "key", "add", "--new-password-file", newPassword(t, p)))
	}
	for _, p := range all {
		if code := p.code(t); code != 0 {
			t.Errorf("exit %d: %s", code, p.err.String())
		}
	}
	for _, p := range passwords {
		r.with(p).must(t, "points")
	}
}

// TestKillKeys kills changes of passwords at random moments: the password stays or is changed,
// as the next command finds it, and a reported change is never undone.
func TestKillKeys(t *testing.T) {
	needs(t)
	t.Parallel()
	r, k := newKept(t)
	kill := newKiller(t, 400*time.Millisecond)
	old := r.password
	for n := 0; kill.goesOn(t); n++ {
		next := "password " + strings.Repeat("x", n%7) + string(rune('a'+rand.IntN(26))) + time.Now().String()
		p := r.with(old).start(t, "key", "change", "--new-password-file", newPassword(t, next))
		killed := kill.kill(t, p)
		done := strings.Contains(p.out.String(), "password changed")
		if !killed && !done {
			t.Fatalf("the change failed: %s", p.err.String())
		}
		// Look with both, in either order.
		codes := map[string]int{}
		order := []string{old, next}
		if n%2 == 1 {
			slices.Reverse(order)
		}
		for _, password := range order {
			codes[password] = r.with(password).run(t, "key", "list").code
		}
		switch {
		case codes[next] == 0 && codes[old] == 12:
			old = next
		case codes[next] == 12 && codes[old] == 0 && !done:
		default:
			t.Fatalf("killed %v, reported %v: the old password ends with %d, the new one with %d", killed, done, codes[old], codes[next])
		}
	}
	r.with(old).intact(t, k)
	r.with(old).must(t, "verify", "--read-data")
}
