package xfs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// churn changes a mounted tree in ways that guesttest.Burst does not, so that all kinds of items get into the log: extent
// trees, attributes, links, shared blocks, freed inodes and directories. Only at the end something is made durable, and with it all that came
// before: the log has it in few large transactions.
type churn struct {
	t   *testing.T
	dir string
	rng *rand.Rand
	// crash: the file system may be shut down at any moment.
	crash bool
}

func (c *churn) must(err error) {
	c.t.Helper()
	if err != nil && !c.crash && !os.IsNotExist(err) && !os.IsExist(err) {
		c.t.Fatal(err)
	}
}

func (c *churn) bytes(n int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%x;", c.rng.Uint32()), n/3+1)[:n]
}

func (c *churn) path(kind string, n int) string {
	return fmt.Sprintf("%s/%s %d", c.dir, kind, c.rng.IntN(n))
}

func (c *churn) run(steps int) {
	c.must(os.MkdirAll(c.dir, 0o755))
	actions := []func(){c.fragment, c.attribute, c.link, c.special, c.share, c.punch, c.directory, c.remove, c.truncate, c.move}
	for range steps {
		actions[c.rng.IntN(len(actions))]()
	}
	if f, err := os.Create(c.dir + "/last"); err == nil {
		defer f.Close()
		c.must(f.Sync())
	}
}

// open opens a file for writing, a new one or one that is there.
func (c *churn) open(kind string, fn func(f *os.File)) {
	f, err := os.OpenFile(c.path(kind, 6), os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		c.must(err)
		return
	}
	defer f.Close()
	fn(f)
}

// fragment adds extents to a file, until it has a tree of them.
func (c *churn) fragment() {
	c.open("fragments", func(f *os.File) {
		for range 60 {
			_, err := f.WriteAt(c.bytes(100), int64(c.rng.IntN(2000))*8192)
			c.must(err)
		}
		c.must(unix.Fdatasync(int(f.Fd())))
	})
}

func (c *churn) attribute() {
	p := c.path("attributes", 8)
	c.must(os.WriteFile(p, nil, 0o600))
	for range 1 + c.rng.IntN(20) {
		name := fmt.Sprint("user.", strings.Repeat("n", c.rng.IntN(60)), c.rng.IntN(30))
		if c.rng.IntN(3) == 0 {
			_ = unix.Removexattr(p, name)
		} else {
			_ = unix.Setxattr(p, name, c.bytes(c.rng.IntN(1+c.rng.IntN(3000))), 0)
		}
	}
}

func (c *churn) link() {
	c.must(os.Symlink(strings.Repeat("x/", 1+c.rng.IntN(500)), c.path("link", 200)))
	c.must(os.Link(c.dir+"/last", c.path("hard link", 50)))
}

func (c *churn) special() {
	_ = unix.Mknod(c.path("device", 100), unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(c.rng.IntN(4000)), uint32(c.rng.IntN(200000)))))
	p := c.path("fragments", 6)
	_ = os.Chmod(p, os.FileMode(c.rng.IntN(0o777)))
	_ = os.Chown(p, c.rng.IntN(1<<20), c.rng.IntN(1<<20))
	_ = unix.UtimesNano(p, []unix.Timespec{{Sec: int64(c.rng.IntN(1 << 32)), Nsec: 5}, {Sec: -int64(c.rng.IntN(1 << 30)), Nsec: 7}})
}

// share copies a file by sharing its blocks, and writes into the middle of it.
func (c *churn) share() {
	from, to := c.path("fragments", 6), c.path("shared", 6)
	_ = exec.Command("cp", "--reflink=always", from, to).Run()
	c.open("shared", func(f *os.File) {
		_, err := f.WriteAt(c.bytes(20000), int64(c.rng.IntN(1<<20)))
		c.must(err)
		c.must(f.Sync())
	})
}

func (c *churn) punch() {
	c.open("fragments", func(f *os.File) {
		_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(c.rng.IntN(1<<24)), int64(c.rng.IntN(1<<20)))
		_ = unix.Fallocate(int(f.Fd()), 0, int64(c.rng.IntN(1<<24)), int64(c.rng.IntN(1<<16)))
	})
}

// directory fills a directory with long names and empties half of it.
func (c *churn) directory() {
	d := c.path("directory", 5)
	c.must(os.MkdirAll(d, 0o755))
	for range 150 {
		p := fmt.Sprintf("%s/%d%s", d, c.rng.IntN(2000), strings.Repeat("d", c.rng.IntN(90)))
		if c.rng.IntN(2) == 0 {
			_ = os.Remove(p)
		} else {
			c.must(os.WriteFile(p, c.bytes(c.rng.IntN(50)), 0o644))
		}
	}
}

// remove removes a whole directory, and with it inodes, whose blocks become something else.
func (c *churn) remove() {
	if c.rng.IntN(3) == 0 {
		c.must(os.RemoveAll(c.path("directory", 5)))
	}
	_ = os.Remove(c.path("attributes", 8))
	_ = os.Remove(c.path("shared", 6))
}

func (c *churn) truncate() {
	_ = os.Truncate(c.path("fragments", 6), int64(c.rng.IntN(1<<24)))
}

func (c *churn) move() {
	_ = os.Rename(c.path("directory", 5), c.path("directory", 5))
	_ = os.Rename(c.path("attributes", 8), c.path("attributes", 8))
	c.open("written", func(f *os.File) {
		_, err := f.Write(c.bytes(c.rng.IntN(100000)))
		c.must(err)
	})
}
