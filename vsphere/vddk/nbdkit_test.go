//go:build linux

package vddk

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestCall looks at how nbdkit is called: with everything that the plugin is to know, and nothing of the password but a pipe.
func TestCall(t *testing.T) {
	need(t, "nbdkit")
	t.Setenv("SOME_SECRET", secret)
	t.Setenv("HOLDFAST_PASSWORD", "the repository's")
	f := newFake(t, "", "memory", "1M")
	o := f.options()
	o.LibDir, o.Port, o.NFCPort, o.Snapshot, o.Transports, o.Compression = "/opt/vddk dir", 8443, 9902, "snapshot-17", "nbdssl:nbd", "fastlz"
	o.File = "-x [größe=\"1\"] a'b/$(c) \t=d.vmdk"
	o.User = "-U=ünï"
	d := open(t, o)
	fields := strings.Split(strings.TrimSuffix(f.note(1, "cmdline"), "\x00"), "\x00")
	args := fields[2:] // of the shell and the script
	dir := filepath.Dir(args[3])
	want := []string{"--foreground", "--exit-with-parent", "-U", dir + "/socket", "--pidfile", dir + "/pid", "--readonly", "vddk",
		"libdir=/opt/vddk dir", "server=vc.example", "port=8443", "nfchostport=9902", "user=-U=ünï", "password=-3",
		"thumbprint=AB" + strings.Repeat(":AB", 19), "vm=moref=vm-16", "snapshot=snapshot-17",
		"file=-x [größe=\"1\"] a'b/$(c) \t=d.vmdk", "transports=nbdssl:nbd", "compression=fastlz"}
	if !slices.Equal(args, want) {
		t.Errorf("called with\n%q, want\n%q", args, want)
	}
	user := strings.TrimSpace(string(mustRun(t, "id", "-un")))
	if got, want := f.note(1, "mode"), "700 "+user+"\n"; got != want {
		t.Errorf("mode of the folder: %q, want %q", got, want)
	}
	if got := f.note(1, "files"); got != "" {
		t.Errorf("files in the folder: %q", got)
	}
	if f.note(1, "password") != secret {
		t.Errorf("the password is %q", f.note(1, "password"))
	}
	environ := f.note(1, "environ")
	if strings.Contains(environ, secret) || strings.Contains(environ, "HOLDFAST") || !strings.Contains(environ, "PATH=") {
		t.Errorf("environment: %q", environ)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// TestFewOptions: what is not given is not passed on.
func TestFewOptions(t *testing.T) {
	need(t, "nbdkit")
	f := newFake(t, "", "memory", "1M")
	open(t, Options{Nbdkit: f.path, File: "/local.vmdk", Writable: true})
	fields := strings.Split(strings.TrimSuffix(f.note(1, "cmdline"), "\x00"), "\x00")
	if got := fields[8:]; !slices.Equal(got, []string{"vddk", "file=/local.vmdk"}) {
		t.Errorf("called with %q", got)
	}
}

// TestPasswords has nbdkit's own reader of passwords send them to a web server.
func TestPasswords(t *testing.T) {
	need(t, "nbdkit")
	var got string
	var mu sync.Mutex
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, password, ok := r.BasicAuth()
		if !ok {
			w.Header().Set("WWW-Authenticate", "Basic realm=x")
			w.WriteHeader(401)
			return
		}
		mu.Lock()
		got = password
		mu.Unlock()
		http.ServeContent(w, r, "disk", time.Time{}, bytes.NewReader(make([]byte, 4096)))
	}))
	defer web.Close()
	for _, password := range []string{secret, "+x", "-3", " a ", "tab\t", "cr\r", "=", strings.Repeat("long", maxPassword/4)} {
		f := newFake(t, "", "curl", "password=-3", "url="+web.URL, "user=u")
		o := f.options()
		o.Password = password
		d := open(t, o)
		mu.Lock()
		if got != password {
			t.Errorf("nbdkit sends %q, want %q", got, password)
		}
		mu.Unlock()
		d.Close()
	}
	f := newFake(t, "", "memory", "1M")
	for _, password := range []string{"a\nb", "a\x00b", strings.Repeat("x", maxPassword+1)} {
		o := f.options()
		if o.Password = password; f.count(t) != 0 {
			t.Error("nbdkit was started")
		}
		if _, err := Open(context.Background(), o); err == nil {
			t.Errorf("%q is taken for a password", password)
		}
	}
}

// TestStartFails: the error of an nbdkit that does not start says why, and nothing is left of it.
func TestStartFails(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: not running a shell")
	}
	t.Setenv("TMPDIR", t.TempDir())
	for _, c := range []struct{ says, hint string }{
		{"nbdkit: error: cannot open plugin 'vddk': /usr/lib/nbdkit-vddk-plugin.so: cannot open shared object file", "nbdkit-vddk-plugin"},
		{"nbdkit: error: libvixDiskLib.so.7: cannot open shared object file: No such file or directory", "vmware-vix-disklib-distrib"},
		{"nbdkit: error: realpath: /opt/vddk: No such file or directory", "vmware-vix-disklib-distrib"},
		{"nbdkit: debug: VixDiskLibVim: Failed to verify SSL certificate: actual thumbprint=B2 expected=12", "SHA-1"},
		{"nbdkit: vddk[1]: error: Cannot complete login due to an incorrect user name or password.", "password is wrong"},
		{"nbdkit: vddk[1]: error: VixDiskLib_Open: [a] b.vmdk: You do not have access rights to this file (Error 13)", "name the snapshot"},
		{"nbdkit: vddk[1]: error: [NFC ERROR] received NFC error 5 from server: Failed to allocate the requested 2097176 bytes", "short of memory"},
		{"nbdkit: vddk[1]: error: Failed to connect to server esx1:902", "port 902"},
		{"something else", ""},
	} {
		f := newFake(t, "echo \""+c.says+"\" >&2; exit 1")
		_, err := Open(context.Background(), f.options())
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "exit status 1") {
			t.Errorf("the error is %v", err)
			continue
		}
		if hint := hintOf(t, err); hint != c.hint && !strings.Contains(hint, c.hint) || (c.hint == "") != (hint == "") {
			t.Errorf("%s: hint %q", c.says, hint)
		}
		if f.count(t) != 1 {
			t.Errorf("%s: nbdkit was started %d times", c.says, f.count(t))
		}
	}
	if left, _ := filepath.Glob(os.TempDir() + "/holdfast-*"); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestRefusesOptions: what cannot work is said before anything is started.
func TestRefusesOptions(t *testing.T) {
	whole := Options{Nbdkit: "sh", Server: "s", User: "u", Password: "p", Thumbprint: strings.Repeat("0", 40), VM: "v", File: "f"}
	if _, err := whole.complete(); err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func(*Options){
		"file":       func(o *Options) { o.File = "" },
		"user":       func(o *Options) { o.User = "" },
		"password":   func(o *Options) { o.Password = "" },
		"vm":         func(o *Options) { o.VM = "" },
		"thumbprint": func(o *Options) { o.Thumbprint = "" },
		"sha-256":    func(o *Options) { o.Thumbprint = strings.Repeat("0", 64) },
		"hex":        func(o *Options) { o.Thumbprint = strings.Repeat("x", 40) },
		"maxread":    func(o *Options) { o.MaxRead = -1 },
		"nbdkit":     func(o *Options) { o.Nbdkit = "/none/nbdkit" },
	} {
		o := whole
		spoil(&o)
		if _, err := Open(context.Background(), o); err == nil {
			t.Errorf("%s: no error", what)
		} else if (what == "nbdkit") != errors.Is(err, ErrNotInstalled) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestCancel ends the context in the middle of Open and of a read.
func TestCancel(t *testing.T) {
	need(t, "nbdkit")
	t.Setenv("TMPDIR", t.TempDir())
	for _, c := range []struct {
		name   string
		before string
		args   []string
		opens  bool
	}{
		{"before it serves", "exec sleep 60", nil, false},
		{"in the handshake", "", []string{"--filter=delay", "memory", "1M", "delay-open=60"}, false},
		{"in a read", "", []string{"--filter=delay", "memory", "1M", "rdelay=60"}, true},
		{"in an answer about allocation", "", []string{"--filter=delay", "memory", "1M", "delay-extents=60"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t, c.before, c.args...)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if !c.opens {
				time.AfterFunc(500*time.Millisecond, cancel)
			}
			start := time.Now()
			d, err := Open(ctx, f.options())
			if (err == nil) != c.opens {
				t.Fatalf("open: %v", err)
			}
			if err == nil {
				start = time.Now()
				time.AfterFunc(300*time.Millisecond, cancel)
				if strings.Contains(c.name, "allocation") {
					for _, err = range d.Allocated(1) {
					}
				} else {
					_, err = d.ReadAt(make([]byte, 512), 0)
				}
				took := time.Since(start)
				if d.Close(); took > 5*time.Second {
					t.Errorf("the read ended after %v", took)
				}
			}
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the error is %v", err)
			}
			if took := time.Since(start); took > stopTime+5*time.Second {
				t.Errorf("it took %v", took)
			}
			f.allEnd(t)
			if left, _ := filepath.Glob(os.TempDir() + "/holdfast-*"); len(left) != 0 {
				t.Errorf("left over: %v", left)
			}
		})
	}
}

// childOf names the fake to the copy of this program that TestKilled kills.
const childOf = "HOLDFAST_TEST_VDDK_CHILD"

// TestKilled kills a process that has a disk open, and one that opens it: nbdkit ends by itself.
func TestKilled(t *testing.T) {
	if path := os.Getenv(childOf); path != "" {
		f := &fake{path: path}
		open(t, f.options())
		time.Sleep(time.Minute)
		return
	}
	need(t, "nbdkit")
	for _, c := range []struct{ name, before string }{{"open", ""}, {"opening", "exec sleep 60"}} {
		f := newFake(t, c.before, "memory", "1M")
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), childOf+"="+f.path, "TMPDIR="+t.TempDir())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for i := 0; f.note(1, "pid") == "" && i < 500; i++ {
			time.Sleep(20 * time.Millisecond)
		}
		time.Sleep(300 * time.Millisecond)
		pid := f.pid(t, 1)
		if !runs(pid) {
			t.Fatalf("%s: nbdkit does not run", c.name)
		}
		cmd.Process.Kill()
		cmd.Wait()
		ends(t, pid)
	}
}

// TestThreads ends the thread that asks for nbdkit, which would end with the thread that started it: it stays.
func TestThreads(t *testing.T) {
	need(t, "sleep")
	var p *process
	var ask func(done chan error)
	ask = func(done chan error) {
		runtime.LockOSThread()               // and ends with this goroutine,
		if syscall.Gettid() == os.Getpid() { // if it is not the first thread, which Go keeps
			again := make(chan error)
			go ask(again)
			done <- <-again
			return
		}
		var err error
		p, err = startProcess(exec.Command("sleep", "60"))
		done <- err
	}
	done := make(chan error)
	go ask(done)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	select {
	case <-p.ended:
		t.Errorf("it has ended: %v", p.err)
	case <-time.After(300 * time.Millisecond):
	}
}

// TestAvailable asks stand-ins, and the real nbdkit for a plugin that it does not have.
func TestAvailable(t *testing.T) {
	need(t, "nbdkit")
	ctx := context.Background()
	dir := t.TempDir()
	exact := filepath.Join(dir, "libvixDiskLib.so.8.0.2")
	if err := os.WriteFile(exact, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exact, filepath.Join(dir, "libvixDiskLib.so.8")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ says, version, err string }{
		{"echo name=vddk; echo vddk_library_version=8; echo vddk_dll=" + dir + "/libvixDiskLib.so.8", "8.0.2", ""},
		{"echo vddk_library_version=8; echo vddk_dll=/none/libvixDiskLib.so.8", "8", ""},
		{"echo vddk_library_version=7", "7", ""},
		{"echo name=vddk; echo vddk_default_libdir=/usr/lib64/vmware-vix-disklib", "", "vmware-vix-disklib-distrib"},
		{"yes | head -c 1000000", "", "vmware-vix-disklib-distrib"},
		{"echo 'libvixDiskLib.so.7: cannot open shared object file' >&2; exit 1", "", "vmware-vix-disklib-distrib"},
		{"echo 'cannot open plugin' >&2; exit 1", "", "nbdkit-vddk-plugin"},
	} {
		f := newFake(t, c.says+"; exit")
		got, err := Available(ctx, Options{Nbdkit: f.path, LibDir: "/opt/v"})
		if got != c.version || (err == nil) != (c.err == "") {
			t.Errorf("%s: %q, %v", c.says, got, err)
		}
		if err != nil && (!errors.Is(err, ErrNotInstalled) || !strings.Contains(hintOf(t, err), c.err)) {
			t.Errorf("%s: %v, hint %q", c.says, err, hintOf(t, err))
		}
		if args := f.note(1, "cmdline"); !strings.HasSuffix(args, "\x00vddk\x00--dump-plugin\x00libdir=/opt/v\x00") {
			t.Errorf("called with %q", args)
		}
	}
	_, err := Available(ctx, Options{Plugin: "nonesuch"})
	if !errors.Is(err, ErrNotInstalled) || !strings.Contains(hintOf(t, err), "nbdkit-vddk-plugin") {
		t.Errorf("a plugin that is not there: %v", err)
	}
	if _, err := Available(ctx, Options{Nbdkit: "/none/nbdkit"}); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("no nbdkit: %v", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	time.AfterFunc(100*time.Millisecond, cancel)
	if _, err := Available(ctx, Options{Nbdkit: newFake(t, "exec sleep 60").path}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
