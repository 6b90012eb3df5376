package vddk

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nbd"
)

// Options say which disk, and how it is reached.
type Options struct {
	Nbdkit string // program; empty for that of the path
	Plugin string // empty for vddk; another stands in for it in tests
	LibDir string // of VDDK, the unpacked vmware-vix-disklib-distrib; empty for what the plugin was built with

	Server     string // host name or address; empty when File is a path on this computer
	Port       int    // of HTTPS; 0 for 443
	NFCPort    int    // of NFC, on the ESXi hosts; 0 for 902
	User       string
	Password   string // without a line break, up to 4096 bytes
	Thumbprint string // SHA-1 of the server's certificate, in hexadecimal, with or without colons; VDDK takes no SHA-256
	VM         string // managed object id, such as vm-16: as this server has it, an ESXi host has another one
	Snapshot   string // managed object id; empty for none
	File       string // such as "[store1] web01/web01.vmdk"

	Transports  string // such as nbdssl:nbd; empty leaves it to VDDK
	Compression string // zlib, fastlz or skipz; empty for none
	Writable    bool
	// MaxRead is the longest request, bytes; 0 for 2 MiB, the most that vCenter passes on. Straight from ESXi 23 MiB
	// can be had (kubevirt/containerized-data-importer, pkg/importer/vddk-datasource_amd64.go).
	MaxRead     int
	Connections int // how many to use; each is a session of VDDK's with the host; 0 stands for 1
	// Log gets what nbdkit says, line by line without the password, and why something is tried again; it may be nil. It is called by
	// several goroutines.
	Log func(string)

	pause time.Duration // before the second attempt, the third comes after four times that; 0 for a second
}

const (
	defaultMaxRead = 2 << 20
	defaultPause   = time.Second
	// maxPassword is what any pipe takes without somebody who reads, bytes: pipe(7), "Pipe capacity".
	maxPassword = 4096
)

// complete checks o and puts in what was left out.
func (o Options) complete() (Options, error) {
	if strings.ContainsAny(o.Password, "\n\x00") || len(o.Password) > maxPassword {
		return o, errors.New("a password with a line break, or of more than 4096 bytes, cannot be given to nbdkit")
	}
	if o.File == "" {
		return o, errors.New("no file")
	}
	// nbdkit-vddk-plugin(1), "Parameters".
	if o.Server != "" && (o.User == "" || o.Password == "" || o.VM == "" || o.Thumbprint == "") {
		return o, fmt.Errorf("server %s: user, password, thumbprint and VM are needed, too", o.Server)
	}
	if o.MaxRead < 0 || o.Connections < 0 {
		return o, fmt.Errorf("%d bytes at once over %d connections", o.MaxRead, o.Connections)
	}
	if o.MaxRead == 0 {
		o.MaxRead = defaultMaxRead
	}
	o.MaxRead = max(o.MaxRead-o.MaxRead%sector, sector)
	if o.pause == 0 {
		o.pause = defaultPause
	}
	var err error
	if o.Thumbprint, err = colons(o.Thumbprint); err != nil {
		return o, err
	}
	return o.installed()
}

// installed finds the program and names the plugin and the library.
func (o Options) installed() (_ Options, err error) {
	if o.Plugin == "" {
		o.Plugin = "vddk"
	}
	if o.LibDir != "" {
		if o.LibDir, err = filepath.Abs(o.LibDir); err != nil {
			return o, err
		}
	}
	if o.Nbdkit == "" {
		o.Nbdkit = "nbdkit"
	}
	if o.Nbdkit, err = exec.LookPath(o.Nbdkit); err != nil {
		return o, &Error{Err: fmt.Errorf("%w: %w", ErrNotInstalled, err), Hint: "install nbdkit, or say where it is"}
	}
	return o, nil
}

// colons gives a SHA-1 the form that VDDK wants: nbdkit-vddk-plugin(1), "Thumbprints".
func colons(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err != nil || len(b) != 20 {
		return "", fmt.Errorf("thumbprint %q is no SHA-1 in hexadecimal", s)
	}
	return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":"), nil
}

// parameters are those of the plugin. Each has its name before it, so that a value may begin with anything and hold anything.
func (o Options) parameters() (all []string) {
	add := func(name, value string) {
		if value != "" {
			all = append(all, name+"="+value)
		}
	}
	port := func(name string, n int) {
		if n != 0 {
			add(name, strconv.Itoa(n))
		}
	}
	add("libdir", o.LibDir)
	add("server", o.Server)
	port("port", o.Port)
	port("nfchostport", o.NFCPort)
	add("user", o.User)
	if o.Password != "" {
		// The first of ExtraFiles. Measured with nbdkit 1.32.5: it takes the first line, spaces at its ends included, and hands it on
		// when it starts itself again, for VDDK's library path.
		add("password", "-3")
	}
	add("thumbprint", o.Thumbprint)
	if o.VM != "" {
		add("vm", "moref="+o.VM)
	}
	add("snapshot", o.Snapshot)
	add("file", o.File)
	add("transports", o.Transports)
	add("compression", o.Compression)
	return all
}

// environment is what nbdkit gets of ours: secrets of other programs may be in the rest. VDDK reads
// $HOME/.vmware/config; the library path is the plugin's matter, unless a user set one.
func environment() (env []string) {
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		switch name {
		case "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_RUNTIME_DIR", "LANG", "TZ", "LD_LIBRARY_PATH":
			env = append(env, v)
		default:
			if strings.HasPrefix(name, "LC_") {
				env = append(env, v)
			}
		}
	}
	return env
}

// A server is one run of nbdkit, and the connection to it.
type server struct {
	o       Options
	said    *said
	ready   chan struct{} // closed when it serves, or cannot
	unused  chan struct{} // closed when it is to end
	gone    chan struct{} // closed when it has ended
	client  *nbd.Client   // from ready on
	err     error         // from ready on: why it does not serve
	process *process

	// guarded by Disk.mu
	users   int
	retired bool
	ending  bool // unused is closed
}

func newServer(o Options) *server {
	return &server{o: o, said: newSaid(o.Password, o.Log),
		ready: make(chan struct{}), unused: make(chan struct{}), gone: make(chan struct{})}
}

// endUnused ends a retired server that nobody uses; Disk.mu is held.
func (s *server) endUnused() {
	if s.retired && s.users == 0 && !s.ending {
		s.ending = true
		close(s.unused)
	}
}

const (
	// startTime bounds the start of nbdkit, which loads VDDK.
	startTime = time.Minute
	// openTime bounds each connection: VDDK logs in and opens the disk then, and may look for it on a SAN first.
	openTime = 3 * time.Minute
	// stopTime is how long nbdkit may take to end, in which VDDK says goodbye to the host.
	stopTime = 10 * time.Second
)

// start starts nbdkit and connects to it. The disk must be of that size, if it is not negative. After an error nothing is left.
func (s *server) start(ctx context.Context, size int64) error {
	dir, err := privateDir()
	if err != nil {
		return err
	}
	// Nothing in it is needed once the connections are there.
	defer os.RemoveAll(dir)
	if s.process, err = s.launch(dir); err != nil {
		return fmt.Errorf("start of nbdkit: %w", err)
	}
	if err = s.connect(ctx, dir, size); err == nil {
		return nil
	}
	if s.client != nil {
		s.client.Close()
	}
	s.process.stop()
	s.said.end()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return s.explain(err)
}

// privateDir makes a folder for nobody else, with a name that leaves room for a socket's: the path of that has 107 bytes, unix(7).
func privateDir() (string, error) {
	parent := os.TempDir()
	if len(parent) > 70 {
		parent = "/tmp"
	}
	return os.MkdirTemp(parent, "holdfast-vddk-") // mode 0700
}

func socket(dir string) string  { return filepath.Join(dir, "socket") }
func pidFile(dir string) string { return filepath.Join(dir, "pid") }

func (s *server) launch(dir string) (*process, error) {
	args := []string{"--foreground", "--exit-with-parent", "-U", socket(dir), "--pidfile", pidFile(dir)}
	if !s.o.Writable {
		args = append(args, "--readonly")
	}
	args = append(append(args, s.o.Plugin), s.o.parameters()...)
	cmd := exec.Command(s.o.Nbdkit, args...)
	cmd.Env = environment()
	cmd.Stdout, cmd.Stderr = s.said, s.said
	if s.o.Password != "" {
		pipe, err := filled(s.o.Password)
		if err != nil {
			return nil, err
		}
		defer pipe.Close()
		cmd.ExtraFiles = []*os.File{pipe}
	}
	return startProcess(cmd)
}

// filled gives the end of a pipe that text can be read from, up to maxPassword bytes.
func filled(text string) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	if _, err := w.WriteString(text); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// connect waits until nbdkit serves and connects to it.
func (s *server) connect(ctx context.Context, dir string, size int64) error {
	if err := s.process.await(ctx, pidFile(dir)); err != nil {
		return err
	}
	client, err := nbd.Dial(ctx, "unix:"+socket(dir), nbd.ClientOptions{Connections: s.o.Connections, Handshake: openTime})
	if err != nil {
		return err
	}
	s.client = client
	if size >= 0 && client.Size() != size {
		return fmt.Errorf("the disk had %d bytes and now has %d", size, client.Size())
	}
	return nil
}

// A process is a running program.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
	err   error         // from ended on
}

// startProcess starts cmd, which ends with this process.
func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = attributes()
	cmd.WaitDelay = time.Second // for output, if another process holds it open
	p := &process{cmd: cmd, ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		// "Parent" is the thread that started it: nbdkit-captive(1), "Exit with parent"; prctl(2), PR_SET_PDEATHSIG. Go ends threads, this one
		// stays until nbdkit has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.ended)
	}()
	return p, <-started
}

// await waits for the file that nbdkit writes when it is ready for connections: nbdkit(1), "--pidfile".
func (p *process) await(ctx context.Context, pidFile string) error {
	late := time.After(startTime)
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		if st, err := os.Stat(pidFile); err == nil && st.Size() > 0 {
			return nil
		}
		select {
		case <-p.ended:
			return p.end()
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-late:
			return fmt.Errorf("nbdkit is not ready after %v", startTime)
		case <-time.After(pause):
		}
	}
}

// end says how it ended.
func (p *process) end() error {
	if p.err == nil {
		return errors.New("nbdkit ended")
	}
	return fmt.Errorf("nbdkit ended: %w", p.err)
}

// stop ends the process and waits for that.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	late := time.NewTimer(stopTime)
	defer late.Stop()
	select {
	case <-p.ended:
		return
	case <-late.C:
	}
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// Available asks nbdkit whether it has the plugin and whether that can load VDDK. Of o it uses Nbdkit, Plugin and LibDir. It gives VDDK's version,
// as exact as it can be had: 8.0.2, or 8. When something is missing the error is ErrNotInstalled.
func Available(ctx context.Context, o Options) (version string, err error) {
	if o, err = o.installed(); err != nil {
		return "", fmt.Errorf("vddk: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	args := []string{o.Plugin, "--dump-plugin"}
	if o.LibDir != "" {
		args = append(args, "libdir="+o.LibDir)
	}
	cmd := exec.CommandContext(ctx, o.Nbdkit, args...)
	var out limited
	said := newSaid("", nil)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = environment(), &out, said, time.Second
	err = cmd.Run()
	said.end()
	if err == nil {
		version, err = out.version()
	}
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("vddk: %w", ctx.Err())
	case err != nil:
		s := &server{o: o, said: said}
		return "", fmt.Errorf("vddk: %w: %w", ErrNotInstalled, s.explain(err))
	}
	return version, nil
}

// limited holds the beginning of what is written to it.
type limited []byte

func (l *limited) Write(p []byte) (int, error) {
	const most = 64 << 10
	*l = append(*l, p[:min(len(p), most-len(*l))]...)
	return len(p), nil
}

// version finds VDDK's in what nbdkit prints: nbdkit-vddk-plugin(1), "Dump-plugin output".
func (l limited) version() (string, error) {
	lines := strings.Split(string(l), "\n")
	value := func(key string) string {
		i := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, key+"=") })
		if i < 0 {
			return ""
		}
		return strings.TrimSpace(lines[i][len(key)+1:])
	}
	major := value("vddk_library_version")
	if major == "" {
		return "", errors.New("nbdkit's vddk plugin cannot load VDDK's library libvixDiskLib.so")
	}
	// The library is a link to a file whose name has the whole version.
	if file, err := filepath.EvalSymlinks(value("vddk_dll")); err == nil {
		if _, exact, ok := strings.Cut(filepath.Base(file), ".so."); ok && strings.HasPrefix(exact, major) {
			return exact, nil
		}
	}
	return major, nil
}
