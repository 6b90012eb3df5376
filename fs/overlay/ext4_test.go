package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/overlay/overlaytest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

const (
	ext4Size  = 24<<20 + 3*unit // bytes of the guest's disk
	ext4Cuts  = 20              // crash states of one run of the guest
	ext4Time  = 40 * time.Second
	ext4Check = 2 // crash states looked at at a time
)

// TestExt4Cuts takes power cuts of an overlay while the kernel's ext4 works on it, through a loop device over a
// file system of one file. At each the disk, after its journal was replayed, is fine for e2fsck, and has
// every file whose fsync had returned. HOLDFAST_TEST_EXT4_CUTS says how many; when it is not
// set, as many as fit in 40 s.
func TestExt4Cuts(t *testing.T) {
	needs(t)
	many, end := 1<<30, time.Now().Add(ext4Time)
	if s := os.Getenv("HOLDFAST_TEST_EXT4_CUTS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		many, end = n, time.Now().Add(24*time.Hour)
	}
	var sum ext4Count
	start := time.Now()
	images := []*ext4Image{makeExt4(t, 4096), makeExt4(t, 1024)}
	for seed := uint64(0); sum.cuts < many && time.Now().Before(end) && !t.Failed(); seed++ {
		ext4Run(t, seed, images[seed%2], min(ext4Cuts, many-sum.cuts), &sum)
	}
	t.Logf("%d crash states of %d mounts in %v: %d journals replayed, %d synced files found; %d writes, %d fsyncs, %d discards passed down",
		sum.cuts, sum.mounts, time.Since(start).Round(time.Second), sum.replayed, sum.files, sum.writes, sum.syncs, sum.punches)
	if !t.Failed() && sum.mounts > 4 && (sum.replayed == 0 || sum.files == 0 || sum.punches == 0 || sum.syncs == 0) {
		t.Error("some of this never happened")
	}
}

type ext4Count struct {
	cuts, mounts, replayed, files int
	writes, syncs, punches        int64
}

// needs skips a test that cannot run here; with HOLDFAST_TEST_ALL=1 that is an error.
func needs(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short")
	}
	var err error
	if os.Geteuid() != 0 {
		err = syscall.EPERM
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		_, e := os.Stat(dev)
		err = errors.Join(err, e)
	}
	for _, program := range []string{"mkfs.ext4", "e2fsck", "debugfs", "mount", "umount"} {
		_, e := exec.LookPath(program)
		err = errors.Join(err, e)
	}
	switch {
	case err == nil:
	case os.Getenv("HOLDFAST_TEST_ALL") == "1":
		t.Fatal("needs root, FUSE, loop devices and e2fsprogs: ", err)
	default:
		t.Skip("needs root, FUSE, loop devices and e2fsprogs: ", err)
	}
}

// ext4Image is an image with an ext4 in it.
type ext4Image struct {
	*flatImage
	data []extent.Extent // outside of which there are zeros, in blocks
}

// makeExt4 makes the image with the files that the guest begins with, and some that it leaves alone.
func makeExt4(t *testing.T, block int) *ext4Image {
	root, file := t.TempDir(), filepath.Join(t.TempDir(), "image")
	for n := range guestWorkers * guestFiles {
		if err := os.MkdirAll(filepath.Join(root, guestDir(n)), 0o700); err != nil {
			t.Fatal(err)
		}
		if n%2 == 0 {
			writeOrFail(t, filepath.Join(root, guestDir(n), firstName(n)), contentOf(uint64(n), firstLen(n)))
		}
	}
	writeOrFail(t, filepath.Join(root, "still"), contentOf(stillSeed, stillLen))
	writeOrFail(t, file, nil)
	if err := os.Truncate(file, ext4Size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-b", strconv.Itoa(block), "-d", root, file).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := &ext4Image{flatImage: &flatImage{b: b}}
	m.data = all(t, m.flatImage.Allocated(Block))
	return m
}

// A file that nobody touches.
const stillSeed, stillLen = 1000, 300_000

func writeOrFail(t *testing.T, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(name, p, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (m *ext4Image) Allocated(g int64) iter.Seq2[extent.Extent, error] { return m.AllocatedFrom(0, g) }

func (m *ext4Image) AllocatedFrom(off, g int64) iter.Seq2[extent.Extent, error] {
	i, _ := slices.BinarySearchFunc(m.data, off, func(e extent.Extent, off int64) int { return int(e.End() - off) })
	return extent.Coarsen(func(yield func(extent.Extent, error) bool) {
		for _, e := range m.data[i:] {
			if !yield(e, nil) {
				return
			}
		}
	}, g, m.Size())
}

// crash is a power cut and what the guest had said by then.
type crash struct {
	seed   uint64
	files  files
	synced int     // events before the cut; an fsync that had returned is one of them
	log    []event // up to after the cut; what the guest had begun is in it
}

// ext4Run runs a guest on an overlay and takes crash states.
func ext4Run(t *testing.T, seed uint64, image *ext4Image, cuts int, sum *ext4Count) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 6))
	// Syncs take their time, so that the power goes in the middle of flushes, too. The disk writes 4 KiB whole, as all do
	// that have sectors of that size inside: of a last commit block that is written in half e2fsck says that its
	// transaction is corrupt and repairs the file system, though nothing is lost (seen once in 320 with 512 bytes).
	f := lossyFiles(&power{left: -1, whole: Block, slow: func() { time.Sleep(rand.N(2 * time.Millisecond)) }})
	d, err := create(f, image, head{seq: 1, size: ext4Size, limit: ext4Size})
	if err != nil {
		t.Fatal(err)
	}
	disk, mnt := t.TempDir(), t.TempDir()
	node, server, err := serveDisk(d, disk)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unmountSoon(server.Unmount); err != nil {
			t.Error(err)
		}
	}()
	g, err := startGuest(seed, filepath.Join(disk, "disk"), mnt)
	if err != nil {
		t.Fatal(err)
	}
	crashes := make(chan crash)
	var wg sync.WaitGroup
	var mu sync.Mutex // guards sum
	for range ext4Check {
		dir := t.TempDir()
		wg.Go(func() {
			for c := range crashes {
				replayed, files, err := c.check(image, dir)
				if err != nil {
					t.Errorf("seed %d, block size of image %d: %v", seed, seed%2, err)
				}
				mu.Lock()
				sum.cuts++
				sum.replayed += replayed
				sum.files += files
				mu.Unlock()
			}
		})
	}
	for range cuts {
		time.Sleep(time.Duration(r.IntN(30_000)) * time.Microsecond)
		c := crash{seed: seed, synced: g.seen()}
		c.files = f.cut(&power{left: -1, rnd: r})
		if c.log, err = g.upTo(); err != nil {
			t.Error(err)
			break
		}
		crashes <- c
	}
	close(crashes)
	wg.Wait()
	if err := g.finish(); err != nil {
		t.Error(err)
	}
	sum.mounts++
	sum.writes += node.writes.Load()
	sum.syncs += node.syncs.Load()
	sum.punches += node.punch.Load()
}

// unmountSoon waits for the loop device to let go.
func unmountSoon(unmount func() error) (err error) {
	for range 500 {
		if err = unmount(); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// check looks at the crash state: how many journals were replayed, how many synced files found.
func (c crash) check(image Image, dir string) (replayed, found int, err error) {
	d, err := open(c.files, image, "")
	if err != nil {
		return 0, 0, err
	}
	raw := filepath.Join(dir, "raw")
	if err := writeRaw(d, raw); err != nil {
		return 0, 0, err
	}
	// The state says that the file system is clean, so -p replays the journal, ends what deletions it
	// lists and checks, and mends, nothing: e2fsck(8).
	out, err := exec.Command("e2fsck", "-p", raw).CombinedOutput()
	if exitCode(err) > 1 || !bytes.Contains(out, []byte(": clean, ")) {
		return 0, 0, fmt.Errorf("e2fsck -p: %v: %s", err, out)
	}
	if bytes.Contains(out, []byte("recovering journal")) {
		replayed = 1
	}
	if out, err := exec.Command("e2fsck", "-fn", raw).CombinedOutput(); err != nil {
		return 0, 0, fmt.Errorf("e2fsck -fn: %w: %s", err, out)
	}
	tree := filepath.Join(dir, "tree")
	if err := errors.Join(os.RemoveAll(tree), os.Mkdir(tree, 0o700)); err != nil {
		return 0, 0, err
	}
	if out, err := exec.Command("debugfs", "-R", "rdump / "+tree, raw).CombinedOutput(); err != nil {
		return 0, 0, fmt.Errorf("debugfs: %w: %s", err, out)
	}
	found, err = c.checkFiles(tree)
	return replayed, found, err
}

func exitCode(err error) int {
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e.Exited():
		return e.ExitCode()
	}
	return 1 << 10
}

// writeRaw writes what d holds to a file.
func writeRaw(d *Disk, name string) error {
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(d.Size()); err != nil {
		return err
	}
	const piece = 64 << 10
	for off := 0; off < len(b); off += piece {
		if p := b[off:min(off+piece, len(b))]; !isZero(p) {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileState is what is known of a file of the guest.
type fileState struct {
	must  bool     // it is there
	names []string // under one of these, the last the newest
	now   []byte   // as the guest sees it
	may   []synced // what it holds, one of them; the last is that of the newest rename
}

// synced is content that was durable, and what may have been written over it. It may be longer now.
type synced struct {
	len     int
	sectors *overlaytest.Sectors
}

func (f *fileState) settle(name string) {
	f.must, f.names = true, []string{name}
	f.may = []synced{{len(f.now), overlaytest.New(f.now)}}
}

// checkFiles looks for every file that is to be there below root.
func (c crash) checkFiles(root string) (found int, err error) {
	b, err := os.ReadFile(filepath.Join(root, "still"))
	if err != nil || !bytes.Equal(b, contentOf(stillSeed, stillLen)) {
		return 0, fmt.Errorf("the file that nobody touched is another: %v", err)
	}
	for n, f := range c.states() {
		if !f.must {
			continue
		}
		if err := f.find(filepath.Join(root, guestDir(n))); err != nil {
			return 0, fmt.Errorf("file %d, as %v: %w", n, f.names, err)
		}
		found++
	}
	return found, nil
}

func (f *fileState) find(dir string) (why error) {
	for _, name := range f.names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			why = errors.Join(why, err)
			continue
		}
		for _, s := range f.may {
			err := fmt.Errorf("%d bytes, not %d", len(b), s.len)
			if len(b) >= s.len {
				err = s.sectors.Check(b[:s.len])
			}
			if err == nil {
				return nil
			}
			why = errors.Join(why, err)
		}
	}
	return why
}

// states is what the guest said, file by file.
func (c crash) states() []fileState {
	all := make([]fileState, guestWorkers*guestFiles)
	for n := 0; n < len(all); n += 2 {
		all[n].now = contentOf(uint64(n), firstLen(n))
		all[n].settle(firstName(n))
	}
	for i, e := range c.log {
		f := &all[e.File]
		switch e.Op {
		case opWrite:
			f.write(e)
		case opReplace:
			f.now = contentOf(e.Seed, e.Len)
			f.may = append(f.may, synced{len(f.now), overlaytest.New(f.now)})
		case opRename:
			f.names = append(f.names, e.Name)
		case opRemove:
			*f = fileState{}
		case opSynced:
			if i < c.synced {
				f.settle(f.names[len(f.names)-1])
			}
		}
	}
	return all
}

func (f *fileState) write(e event) {
	p := contentOf(e.Seed, e.Len)
	if grow := int(e.Off) + e.Len - len(f.now); grow > 0 {
		f.now = append(f.now, make([]byte, grow)...)
	}
	copy(f.now[e.Off:], p)
	if len(f.names) == 0 {
		f.names = []string{e.Name}
	}
	if n := len(f.may); n > 0 {
		f.may[n-1].sectors.Add(e.Off, p)
	}
}
