package overlay

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Image is what an overlay is over: bytes that never change. Safe for concurrent use.
//
// An Image may have AllocatedFrom(off, granularity), the same as Allocated from off on, and
// Prefetch(off, n int64), which are used then.
type Image interface {
	io.ReaderAt
	Size() int64 // bytes
	// Allocated yields ascending ranges aligned to granularity (bytes) and clipped to
	// Size, outside of which all bytes are zero.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
}

var (
	// ErrOtherBase: the overlay is over another image.
	ErrOtherBase = errors.New("overlay belongs to another image")
	// ErrBusy: another process has the overlay open.
	ErrBusy = errors.New("overlay is in use")
	// ErrRange: an offset outside of the disk.
	ErrRange = errors.New("overlay: outside of the disk")
)

// Options says what an overlay is over.
type Options struct {
	// Base names the image, up to 1024 bytes. Open refuses an overlay over another one.
	Base string
	// Size of the disk, bytes; 0: that of the image. For Create.
	Size int64
}

// Disk is an overlay with its image: a disk that can be written. Safe for concurrent use.
type Disk struct {
	image  Image
	data   file
	head   file
	boot   string
	blocks *blockMap
	first  ranges // first writes

	gate  sync.RWMutex // held by Resize and Close; for reading by everything else
	state head         // changed by Resize only

	written  atomic.Bool // since the last sync of data
	unsynced unsynced

	flush struct {
		sync.Mutex        // held while a flush goes on; guards following, as gate does for its writer
		broken     error  // a sync failed: nobody knows what is on the disk
		done       uint64 // number of the last flush that ended
		log        *syncLog
		list       []int64       // memory of add
		begun      atomic.Uint64 // number of the last flush that began
	}
	closed bool // guarded by gate
}

// The names of the files.
const (
	dataName = "data"
	mapName  = "map"
	headName = "head"
	liveName = "live"
	logName  = "log"
)

// Create makes an overlay in dir, which it makes, too, and opens it. An error that is
// os.ErrExist when there is one already.
func Create(dir string, image Image, opt Options) (*Disk, error) {
	size := opt.Size
	if size == 0 {
		size = image.Size()
	}
	if size < 0 || size > maxSize || len(opt.Base) > maxBase {
		return nil, fmt.Errorf("overlay: size %d, base of %d bytes", size, len(opt.Base))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := openFiles(dir, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	h := head{seq: 1, size: size, limit: min(size, image.Size()), base: opt.Base}
	rand.Read(h.id[:])
	d, err := create(f, image, h)
	if err == nil {
		err = errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
	}
	if err != nil {
		f.close()
		return nil, fmt.Errorf("overlay: %w", err)
	}
	return d, nil
}

func create(f files, image Image, h head) (*Disk, error) {
	if err := f.data.Truncate(roundUp(h.size)); err != nil {
		return nil, err
	}
	if err := errors.Join(f.data.Sync(), f.blocks.Sync()); err != nil {
		return nil, err
	}
	// The head comes last: without one there is no overlay.
	if err := writeHead(f.head, h); err != nil {
		return nil, err
	}
	d := newDisk(f, image, h)
	d.blocks.live = f.live
	return d, d.blocks.forget(f.boot)
}

// Open opens an overlay and makes durable what it finds there. ErrOtherBase, ErrBusy, ErrDamaged;
// os.ErrNotExist when there is none.
func Open(dir string, image Image, opt Options) (*Disk, error) {
	f, err := openFiles(dir, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	d, err := open(f, image, opt.Base)
	if err == nil {
		err = syncDir(dir) // there may have been no log
	}
	if err != nil {
		f.close()
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return d, nil
}

func open(f files, image Image, base string) (*Disk, error) {
	h, err := readHead(f.head)
	if err != nil {
		return nil, err
	}
	if h.base != base {
		return nil, fmt.Errorf("%w: %q, not %q", ErrOtherBase, h.base, base)
	}
	if h.limit > image.Size() {
		return nil, fmt.Errorf("%w: it shows %d bytes of an image of %d", ErrOtherBase, h.limit, image.Size())
	}
	// A Resize that was stopped may have left the file at another size, and its head in the system's
	// memory alone. The other head wants what is cut off here.
	if err := f.head.Sync(); err != nil {
		return nil, err
	}
	if err := f.data.Truncate(roundUp(h.size)); err != nil {
		return nil, err
	}
	d := newDisk(f, image, h)
	if err := d.blocks.load(); err != nil {
		return nil, err
	}
	// A process that was killed may have left what it had answered and not flushed.
	killed, err := d.blocks.adopt(f.live, f.boot)
	if err != nil {
		return nil, err
	}
	if err := d.flush.log.open(); err != nil {
		return nil, err
	}
	if err := d.flush.log.replay(killed, d.restore); err != nil {
		return nil, err
	}
	// Nor may it have synced what it wrote, and nothing would do so later: a bit of the map that is set here
	// is not set again. The map is never ahead of the data.
	if err := errors.Join(f.data.Sync(), f.blocks.Sync()); err != nil {
		return nil, err
	}
	// Bits past the end are of a Resize that was stopped, too.
	d.blocks.clear(d.blocks.blocks, int64(len(d.blocks.sectors))*mapBlocks)
	if err := d.sync(true); err != nil || killed { // what is seen now stays
		return d, err
	}
	return d, d.blocks.forget(f.boot) // not before: with live, marks of the log count
}

// restore writes a block of the log to where it belongs. It is not synced.
func (d *Disk) restore(block int64, content []byte) error {
	if block < 0 || block >= d.blocks.blocks {
		return fmt.Errorf("%w: log, block %d", ErrDamaged, block)
	}
	if _, err := d.data.WriteAt(content, block*Block); err != nil {
		return err
	}
	d.blocks.restore(block)
	return nil
}

func newDisk(f files, image Image, h head) *Disk {
	d := &Disk{image: image, data: f.data, head: f.head, boot: f.boot, blocks: newBlockMap(f.blocks, h.size), state: h}
	d.flush.log = newLog(f.log, f.logSize)
	return d
}

// files are the files of an overlay.
type files struct {
	data, blocks, head, live, log file
	boot                          string // see bootID
	logSize                       int64  // bytes; 0: logLen
}

// openFiles opens them and keeps other processes away: flock(2).
func openFiles(dir string, flag int) (f files, err error) {
	for _, x := range []struct {
		name string
		to   *file
	}{{headName, &f.head}, {mapName, &f.blocks}, {dataName, &f.data}, {liveName, &f.live}, {logName, &f.log}} {
		if x.to == &f.live { // it may be lost, and older overlays have no log
			flag = os.O_RDWR | os.O_CREATE
		}
		o, err := os.OpenFile(filepath.Join(dir, x.name), flag, 0o600)
		if err != nil {
			f.close()
			return files{}, err
		}
		*x.to = osFile{o}
		if x.to != &f.head {
			continue
		}
		if err := unix.Flock(int(o.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				err = fmt.Errorf("%s: %w", dir, ErrBusy)
			}
			return files{}, err
		}
	}
	f.boot, err = bootID()
	if err != nil {
		f.close()
	}
	return f, err
}

func (f files) close() error {
	var errs []error
	for _, x := range []file{f.data, f.blocks, f.head, f.live, f.log} {
		if x != nil {
			errs = append(errs, x.Close())
		}
	}
	return errors.Join(errs...)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func roundUp(n int64) int64 { return (n + Block - 1) / Block * Block }

// ID is a random number that the overlay keeps.
func (d *Disk) ID() [16]byte { return d.state.id }

// Size is the size of the disk in bytes.
func (d *Disk) Size() int64 {
	d.gate.RLock()
	defer d.gate.RUnlock()
	return d.state.size
}

// enter begins a call that does not change the size; the caller calls d.gate.RUnlock.
func (d *Disk) enter() error {
	d.gate.RLock()
	if d.closed {
		d.gate.RUnlock()
		return os.ErrClosed
	}
	return nil
}

// Flush makes durable what was written before. After one that failed, or a Resize that could not
// sync, all fail: the operating system may have dropped what it could not write, and says so
// once (fsync(2), Linux since 4.13).
func (d *Disk) Flush() error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.gate.RUnlock()
	return d.sync(false)
}

// sync lets those who wait for the same flush share it: one that began after they came
// is theirs, too. With whole it leaves nothing in the log; nobody else is there then.
func (d *Disk) sync(whole bool) error {
	came := d.flush.begun.Load()
	d.flush.Lock()
	defer d.flush.Unlock()
	if d.flush.broken != nil {
		return d.flush.broken
	}
	if d.flush.done > came {
		return nil
	}
	n := d.flush.begun.Add(1)
	if err := d.syncNow(whole); err != nil {
		return d.breaks("flush", err)
	}
	d.flush.done = n
	return nil
}

// breaks says that a sync failed. The caller holds d.flush, or d.gate for writing.
func (d *Disk) breaks(what string, err error) error {
	d.flush.broken = fmt.Errorf("overlay: an earlier %s failed: %w", what, err)
	return fmt.Errorf("overlay: %s: %w", what, err)
}

// syncNow writes few blocks to the log, and syncs data for many, or when there is no more room.
func (d *Disk) syncNow(whole bool) error {
	list, many := d.unsynced.take(d.flush.list[:0])
	d.flush.list = list
	if !whole && !many {
		if len(list) == 0 {
			return nil
		}
		if logged, err := d.flush.log.add(list, d.data); logged || err != nil {
			return err
		}
	}
	if err := d.syncData(); err != nil {
		return err
	}
	return d.flush.log.reset()
}

// syncData writes the blocks before the map that says they are there.
func (d *Disk) syncData() error {
	wrote := d.written.Swap(false)
	for rounds := d.blocks.unwritten()/maxDirty + 1; rounds > 0; rounds-- {
		list, content := d.blocks.changed()
		if !wrote && len(list) == 0 {
			return nil
		}
		if err := d.data.Sync(); err != nil {
			return err
		}
		if len(list) == 0 {
			return nil
		}
		if err := d.blocks.write(list, content); err != nil {
			return err
		}
		wrote = false
	}
	return nil
}

// Resize changes the size of the disk, durably. What is new reads as zeros.
func (d *Disk) Resize(size int64) error {
	d.gate.Lock()
	defer d.gate.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	if size < 0 || size > maxSize {
		return fmt.Errorf("overlay: size %d", size)
	}
	if d.flush.broken != nil {
		return d.flush.broken
	}
	if err := d.sync(true); err != nil { // what is in the log is about the disk as it was
		return fmt.Errorf("overlay: resize: %w", err)
	}
	grow := size > d.state.size
	if grow {
		if err := d.grow(size); err != nil {
			return fmt.Errorf("overlay: resize: %w", err)
		}
		if err := d.data.Sync(); err != nil {
			return d.breaks("resize", err)
		}
	}
	h := d.state
	h.seq++
	h.size, h.limit = size, min(h.limit, size)
	if err := writeHead(d.head, h); err != nil {
		return d.breaks("resize", err) // nobody knows of which size it is on the disk
	}
	was := d.blocks.blocks
	d.state = h
	d.blocks.resize(size)
	if grow {
		return nil
	}
	// Should the rest not be done, Open does it.
	d.blocks.clear(d.blocks.blocks, was)
	if err := errors.Join(d.sync(true), d.blocks.forget(d.boot)); err != nil {
		return fmt.Errorf("overlay: resize: %w", err)
	}
	if err := d.data.Truncate(roundUp(size)); err != nil {
		return fmt.Errorf("overlay: resize: %w", err)
	}
	d.written.Store(true)
	return d.sync(true)
}

// grow makes room in data. In the last block there may be rests past the end.
func (d *Disk) grow(size int64) error {
	old := d.state.size
	if old%Block != 0 && d.blocks.has(old/Block) {
		if _, err := d.data.WriteAt(make([]byte, roundUp(old)-old), old); err != nil {
			return err
		}
	}
	return d.data.Truncate(roundUp(size))
}

// Close flushes and closes. It may be called twice.
func (d *Disk) Close() error {
	d.gate.Lock()
	defer d.gate.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	return errors.Join(d.sync(true), files{data: d.data, blocks: d.blocks.f, head: d.head, live: d.blocks.live, log: d.flush.log.f}.close())
}

// StoredIn is the bytes that the overlay in dir takes up on its file system, whether it is open or not; 0 when
// there is none.
func StoredIn(dir string) (n int64) {
	for _, name := range []string{dataName, mapName, headName, liveName, logName} {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(dir, name), &st) == nil {
			n += st.Blocks * 512
		}
	}
	return n
}
