package whole

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// server is a running `holdfast serve`.
type server struct {
	*process
	addr string
}

// serve starts one, on the address given or any.
func (r *repository) serve(t *testing.T, addr string) *server {
	t.Helper()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	s := &server{process: r.start(t, "serve", "--listen", addr)}
	until(t, "the server", func() bool {
		_, s.addr, _ = strings.Cut(strings.TrimSpace(s.out.String()), "listening on ")
		if !s.running() {
			t.Fatalf("serve ended:\n%s", s.err.String())
		}
		return s.addr != ""
	})
	return s
}

// token makes a token and gives the file that it is in.
func (r *repository) token(t *testing.T, args ...string) string {
	t.Helper()
	var made struct{ Token string }
	if err := json.Unmarshal([]byte(r.must(t, append([]string{"agent-token", "add", "--json"}, args...)...).out), &made); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(newDir(t), "token")
	if err := os.WriteFile(file, []byte(made.Token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// helper is the program on another host: without password and without the directory.
func helper(addr, token string) *repository {
	return &repository{dir: "tls://" + addr, as: []string{"env", "-u", "HOLDFAST_PASSWORD", "HOLDFAST_TOKEN_FILE=" + token}}
}

// relay passes connections on and counts what clients send.
func relay(t *testing.T, to func() string) (addr string, sent *atomic.Int64) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	sent = new(atomic.Int64)
	go func() {
		for {
			a, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer a.Close()
				b, err := net.Dial("tcp", to())
				if err != nil {
					return
				}
				defer b.Close()
				go io.Copy(a, b)
				io.Copy(io.MultiWriter(b, counter{sent}), a)
			}()
		}
	}()
	return ln.Addr().String(), sent
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) { c.n.Add(int64(len(p))); return len(p), nil }

// TestAgentBackup: a helper adds two points of a qcow2 image; the second sends only what has
// changed; both are restored and compared by qemu-img.
func TestAgentBackup(t *testing.T) {
	needs(t, "qemu-img", "qemu-io")
	t.Parallel()
	r := newRepository(t)
	s := r.serve(t, "")
	addr, sent := relay(t, func() string { return s.addr })
	h := helper(addr, r.token(t, "--label", "hv1"))
	dir := newDir(t)
	raw, image := dir+"/first.raw", dir+"/web.qcow2"
	newRaw(t, raw, 200*mib, piece{5 * mib, 40 * mib}, piece{150*mib + 777, 9 * mib})
	qemuImg := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
		}
	}
	qemuImg("convert", "-O", "qcow2", raw, image)
	first, _ := h.backup(t, image, "--tag", "away")
	all := sent.Swap(0)
	if all < 40*mib || all > 60*mib || first.Stored > all || first.Stored < 40*mib {
		t.Errorf("the first backup sent %d bytes and says %d", all, first.Stored)
	}
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 100M 300k", "-c", "write -z 10M 1M", image).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	qemuImg("convert", "-O", "raw", image, dir+"/second.raw")
	second, _ := h.backup(t, image)
	if again := sent.Swap(0); again > 600<<10 || second.New > 4*128<<10 {
		t.Errorf("the second backup sent %d bytes; it says %d new", again, second.New)
	}
	points := r.points(t)
	if len(points) != 2 || points[0].ID != first.ID || points[1].ID != second.ID || points[0].VM != "web" || points[0].Tags[0] != "away" {
		t.Fatalf("%+v", points)
	}
	if out := r.must(t, "show", first.ID).out; !strings.Contains(out, "a helper with the token ") {
		t.Errorf("show does not say who made the point:\n%s", out)
	}
	for i, file := range []string{raw, dir + "/second.raw"} {
		out := fmt.Sprint(dir, "/out", i)
		r.must(t, "restore", points[i].ID, "--to", out, "--format", "qcow2")
		qemuImg("compare", "-f", "qcow2", "-F", "raw", out+"/disk0.qcow2", file)
	}
	r.must(t, "verify", "--read-data")
	// It can do nothing else, and the server ends cleanly.
	for _, args := range [][]string{{"points"}, {"show", first.ID}, {"restore", first.ID, "--to", dir + "/no"}, {"forget", first.ID}, {"gc"}, {"stats"},
		{"verify"}, {"ls"}, {"key", "list"}, {"agent-token", "add"}, {"repair", "index"}, {"mount", dir}, {"serve", "--listen", "127.0.0.1:0"}, {"copy", "--to", r.dir}} {
		h.wants(t, 12, "a token only adds restore points", args...)
	}
	s.cmd.Process.Signal(os.Interrupt)
	if code := s.code(t); code != 0 {
		t.Errorf("serve ended with %d:\n%s", code, s.err.String())
	}
	h.wants(t, 1, "no holdfast server answers", "backup", image) // by way of the relay, which hangs up
}

// TestAgentLocks: the lock of the server's config, and no other.
func TestAgentLocks(t *testing.T) {
	needs(t)
	t.Parallel()
	r := newRepository(t)
	conf := filepath.Join(newDir(t), "config.yaml")
	if err := os.WriteFile(conf, []byte("backup: {lock_for: 1d}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.as = []string{"env", "HOLDFAST_CONFIG=" + conf}
	s := r.serve(t, "")
	h := helper(s.addr, r.token(t))
	disk := newDir(t) + "/a.raw"
	newRaw(t, disk, mib, piece{0, 1000})
	h.wants(t, 64, "the server decides for how long points are locked", "backup", disk, "--lock-for", "1h")
	p, _ := h.backup(t, disk)
	r.wants(t, 1, "point is locked until", "forget", p.ID, "--force")
}

// TestKillAgents kills servers and helpers at random moments. What was reported is
// there and whole, and then one more backup works.
func TestKillAgents(t *testing.T) {
	needs(t)
	t.Parallel()
	hist := newHistory(t)
	local := hist.repository
	token := local.token(t)
	var s *server
	start := func() {
		s = local.serve(t, "")
	}
	start()
	relayed, _ := relay(t, func() string { return s.addr })
	away := helper(relayed, token)
	for k, n := newKiller(t, 400*time.Millisecond), 0; k.goesOn(t); n++ {
		hist.change(t, k.rnd)
		hist.repository = away
		p := hist.try(t)
		hist.repository = local
		if n%2 == 0 {
			if killed := k.kill(t, p); !killed && p.code(t) != 0 {
				t.Errorf("backup ended with %d:\n%s", p.code(t), p.err.String())
			}
		} else {
			time.Sleep(time.Duration(k.rnd.Int64N(int64(k.most))))
			_ = s.cmd.Process.Kill()
			s.code(t)
			k.kills++
			if code := p.code(t); code != 0 && code != 1 {
				t.Errorf("with a server that was killed backup ends with %d:\n%s", code, p.err.String())
			}
			start()
		}
		hist.look(t, summaryOf(p.out.String()))
		if n%5 == 4 {
			hist.must(t, "gc")
		}
		if n%4 == 3 {
			hist.checkSome(t, k.rnd)
		}
	}
	hist.change(t, rand.New(rand.NewPCG(1, 2)))
	hist.repository = away
	p := hist.try(t)
	hist.repository = local
	if code := p.code(t); code != 0 {
		t.Fatalf("the last backup ended with %d:\n%s", code, p.err.String())
	}
	hist.look(t, summaryOf(p.out.String()))
	hist.checkAll(t)
	// Whoever looks clears away what servers that were killed have left.
	until(t, "the leases to end", func() bool {
		hist.must(t, "gc")
		left, _ := filepath.Glob(hist.dir + "/leases/*")
		return len(left) == 0
	})
}

// TestAgentsAtOnce: helpers, a backup of this host, gc and forget together, all by the real program.
func TestAgentsAtOnce(t *testing.T) {
	needs(t)
	t.Parallel()
	r := newRepository(t)
	s := r.serve(t, "")
	ctx, cancel := context.WithTimeout(t.Context(), hangs)
	defer cancel()
	results := make(chan error, 4)
	kept := make(chan [2]string, 100) // id => content of the disk
	work := func(on *repository, name string) {
		disk := filepath.Join(newDir(t), name+".raw")
		newRaw(t, disk, 24*mib, piece{3 * mib, 12 * mib})
		rnd := rand.New(rand.NewPCG(uint64(len(name)), 9))
		go func() {
			for range 6 {
				f, err := os.OpenFile(disk, os.O_RDWR, 0)
				if err == nil {
					_, err = f.WriteAt(randomBytes(rnd.Uint64(), mib), rnd.Int64N(20*mib))
					f.Close()
				}
				if err != nil {
					results <- err
					return
				}
				out, err := on.command(ctx, "backup", "--json", disk).Output()
				if err != nil {
					results <- fmt.Errorf("%s: %w: %s", name, err, out)
					return
				}
				content, err := os.ReadFile(disk)
				if err != nil {
					results <- err
					return
				}
				for _, p := range summaryOf(string(out)) {
					kept <- [2]string{p.ID, string(content)}
				}
			}
			results <- nil
		}()
	}
	work(helper(s.addr, r.token(t)), "one")
	work(helper(s.addr, r.token(t)), "other")
	work(r, "local")
	for n := 0; n < 3; {
		select {
		case err := <-results:
			if n++; err != nil {
				t.Fatal(err)
			}
		default:
			r.must(t, "forget", "--keep-last", "2")
			r.must(t, "gc", "--repack-below", "80%")
		}
	}
	r.must(t, "verify", "--read-data")
	close(kept)
	content := map[string]string{}
	for k := range kept {
		content[k[0]] = k[1]
	}
	for _, p := range r.points(t) {
		out := filepath.Join(newDir(t), "out")
		r.must(t, "restore", p.ID, "--to", out)
		if got, err := os.ReadFile(out + "/disk0.raw"); err != nil || string(got) != content[p.ID] {
			t.Errorf("%s is not what was backed up: %v", p.path(), err)
		}
	}
}
