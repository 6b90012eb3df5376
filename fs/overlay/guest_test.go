package overlay

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// guestArgs tells this program to be the guest of TestExt4Cuts: seed, disk, mount point.
const guestArgs = "HOLDFAST_TEST_EXT4_GUEST"

func TestMain(m *testing.M) {
	args := os.Getenv(guestArgs)
	if args == "" {
		os.Exit(m.Run())
	}
	if err := beGuest(strings.Split(args, ":")); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

// What the guest has: its workers' directories w/0 ... with files of their own.
const (
	guestWorkers = 4
	guestFiles   = 8         // of each
	guestMost    = 64 << 10  // bytes of a file
	guestSparse  = 512 << 10 // bytes of a file that nobody looks at
)

// event is something that the guest is about to do, but for opSynced, which it has done, and opMark.
type event struct {
	Op   string
	File int    // number
	Name string // of the file afterwards, without directory
	Off  int64
	Len  int
	Seed uint64 // of what is written
}

const (
	opReady   = "ready"
	opWrite   = "write"   // creates the file unless it is there
	opReplace = "replace" // by a whole new one, durable already, by a rename
	opRename  = "rename"
	opRemove  = "remove"
	opSynced  = "synced" // an fsync of the file has returned
	opMark    = "mark"   // answers a line on stdin
)

// contentOf is what a write with a seed writes.
func contentOf(seed uint64, n int) []byte {
	p := make([]byte, n)
	fillRandom(rand.New(rand.NewPCG(seed, 9)), p)
	return p
}

// guestDir is the directory of a file.
func guestDir(file int) string { return filepath.Join("w", strconv.Itoa(file/guestFiles)) }

// firstName, and firstLen, are of the files in the image; odd ones are not there. Their content is that of
// their number.
func firstName(file int) string { return fmt.Sprint("f", file) }
func firstLen(file int) int     { return file * 997 % guestMost }

// guest works in a mounted ext4. It is a process of its own, with mounts of its own: the file system
// server below its disk must not wait for it, and when either ends, all mounts go.
type guest struct {
	root string
	stop atomic.Bool
	mu   sync.Mutex // guards following
	out  *json.Encoder
}

func beGuest(args []string) error {
	seed, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		return err
	}
	g := &guest{root: args[2], out: json.NewEncoder(os.Stdout)}
	if out, err := exec.Command("mount", "-o", "loop", args[1], g.root).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	g.emit(event{Op: opReady})
	errs := make(chan error, guestWorkers)
	for w := range guestWorkers {
		go func() { errs <- g.work(w, rand.New(rand.NewPCG(seed, uint64(w)))) }()
	}
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan() && in.Text() == opMark; {
			g.emit(event{Op: opMark})
		}
		g.stop.Store(true)
	}()
	for range guestWorkers {
		if err := <-errs; err != nil {
			return err
		}
	}
	if out, err := exec.Command("umount", g.root).CombinedOutput(); err != nil {
		return fmt.Errorf("umount: %w: %s", err, out)
	}
	return nil
}

// emit tells an event before it is acted on.
func (g *guest) emit(e event) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.out.Encode(e); err != nil {
		g.stop.Store(true) // nobody is there
	}
}

// guestFile is a file as a worker knows it.
type guestFile struct {
	number int
	name   string // empty: not there
	size   int
}

func (g *guest) work(w int, r *rand.Rand) error {
	var files [guestFiles]guestFile
	for i := range files {
		f := &files[i]
		if f.number = w*guestFiles + i; f.number%2 == 0 {
			f.name, f.size = firstName(f.number), firstLen(f.number)
		}
	}
	for !g.stop.Load() {
		f := &files[r.IntN(guestFiles)]
		if err := g.change(f, r); err != nil {
			return err
		}
		if f.name != "" && r.IntN(2) == 0 {
			if err := g.sync(f); err != nil {
				return err
			}
		}
		time.Sleep(time.Duration(r.IntN(8000)) * time.Microsecond)
	}
	return nil
}

func (g *guest) path(f *guestFile, name string) string {
	return filepath.Join(g.root, guestDir(f.number), name)
}

func (g *guest) change(f *guestFile, r *rand.Rand) error {
	op := r.IntN(10)
	switch {
	case op == 0:
		return g.noise(filepath.Join(g.root, guestDir(f.number), "noise"), r)
	case f.name == "" || op < 4:
		return g.write(f, r.IntN(f.size+1), r)
	case op < 6:
		return g.write(f, f.size, r)
	case op < 7:
		return g.replace(f, r)
	case op < 9:
		to := fmt.Sprint("r", f.number, "-", r.IntN(1000))
		from := f.name
		f.name = to
		g.emit(event{Op: opRename, File: f.number, Name: to})
		return os.Rename(g.path(f, from), g.path(f, to))
	}
	name := f.name
	f.name, f.size = "", 0
	g.emit(event{Op: opRemove, File: f.number})
	return os.Remove(g.path(f, name))
}

func (g *guest) write(f *guestFile, off int, r *rand.Rand) error {
	if f.name == "" {
		f.name = firstName(f.number)
	}
	off = min(off, guestMost-1)
	e := event{Op: opWrite, File: f.number, Name: f.name, Off: int64(off), Len: min(1+r.IntN(20000), guestMost-off), Seed: r.Uint64()}
	f.size = max(f.size, off+e.Len)
	g.emit(e)
	return writeFile(g.path(f, f.name), contentOf(e.Seed, e.Len), e.Off, false)
}

// replace writes a new file, makes it durable and gives it the name of the old.
func (g *guest) replace(f *guestFile, r *rand.Rand) error {
	e := event{Op: opReplace, File: f.number, Name: f.name, Len: 1 + r.IntN(guestMost), Seed: r.Uint64()}
	tmp := g.path(f, fmt.Sprint("tmp", f.number))
	if err := writeFile(tmp, contentOf(e.Seed, e.Len), 0, true); err != nil {
		return err
	}
	f.size = e.Len
	g.emit(e)
	return os.Rename(tmp, g.path(f, f.name))
}

func (g *guest) sync(f *guestFile) error {
	if err := writeFile(g.path(f, f.name), nil, 0, true); err != nil {
		return err
	}
	g.emit(event{Op: opSynced, File: f.number})
	return nil
}

func writeFile(path string, p []byte, off int64, sync bool) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, off)
	if err == nil && sync {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// noise keeps the file system busy with what only e2fsck looks at.
func (g *guest) noise(dir string, r *rand.Rand) error {
	name := filepath.Join(dir, fmt.Sprint(r.IntN(4)))
	switch r.IntN(6) {
	case 0:
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return nil
	case 1:
		return os.RemoveAll(dir)
	case 2:
		return g.trim()
	case 3:
		return gone(os.Truncate(name, int64(r.IntN(guestSparse))))
	case 4:
		return gone(os.Symlink(strings.Repeat("x", 1+r.IntN(200)), filepath.Join(dir, fmt.Sprint("link", r.IntN(1000)))))
	}
	return gone(writeFile(name, contentOf(r.Uint64(), r.IntN(30000)), int64(r.IntN(guestSparse)), r.IntN(2) == 0))
}

// gone leaves out that there is no such file, or one already.
func gone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// trim discards what is free, fstrim(8).
func (g *guest) trim() error {
	d, err := os.Open(g.root)
	if err != nil {
		return err
	}
	defer d.Close()
	all := struct{ start, len, least uint64 }{len: 1 << 62} // struct fstrim_range, linux/fs.h
	const fitrim = 0xc0185879                               // _IOWR('X', 121, struct fstrim_range)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), fitrim, uintptr(unsafe.Pointer(&all))); errno != 0 {
		return fmt.Errorf("trim: %w", errno)
	}
	return nil
}

// guestProcess is a guest as the test has it.
type guestProcess struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	end error // read after over

	over chan struct{} // closed at the end of its events
	mark chan int      // position of a mark in log

	mu  sync.Mutex // guards following
	log []event
}

// startGuest starts a guest and waits until it works.
func startGuest(seed uint64, disk, dir string) (*guestProcess, error) {
	g := &guestProcess{cmd: exec.Command("/proc/self/exe"), over: make(chan struct{}), mark: make(chan int)}
	g.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%s:%s", guestArgs, seed, disk, dir))
	g.cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	g.cmd.Stderr = os.Stderr
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go g.listen(out)
	select {
	case <-g.mark: // ready
		return g, nil
	case <-g.over:
		return nil, fmt.Errorf("guest: %w", g.end)
	}
}

func (g *guestProcess) listen(out io.Reader) {
	defer close(g.over)
	for dec := json.NewDecoder(out); ; {
		var e event
		if g.end = dec.Decode(&e); g.end != nil {
			g.end = errors.Join(g.cmd.Wait(), g.end)
			return
		}
		g.mu.Lock()
		g.log = append(g.log, e)
		n := len(g.log)
		g.mu.Unlock()
		if e.Op == opMark || e.Op == opReady {
			g.mark <- n
		}
	}
}

// seen is how many events there are.
func (g *guestProcess) seen() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.log)
}

// upTo gives the events up to now, at least: what the guest does now it has said in them.
func (g *guestProcess) upTo() ([]event, error) {
	if _, err := fmt.Fprintln(g.in, opMark); err != nil {
		return nil, err
	}
	select {
	case n := <-g.mark:
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.log[:n:n], nil
	case <-g.over:
		return nil, fmt.Errorf("guest: %w", g.end)
	}
}

// finish lets the guest unmount and end.
func (g *guestProcess) finish() error {
	g.in.Close()
	<-g.over
	if g.cmd.ProcessState.Success() {
		return nil
	}
	return fmt.Errorf("guest: %w", g.end)
}
