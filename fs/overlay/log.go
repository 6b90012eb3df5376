package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"
	"sync/atomic"
)

const (
	logMagic    = "HFOLOG1\x00"
	recordMagic = "HFOR"
	logHeadLen  = 512 // bytes: a sector, which a disk writes whole
	logMarks    = 512 // where the marks are, up to logStart
	logStart    = Block
	logLen      = 4 << 20                                // bytes of the file
	maxLog      = logStart + 8*(logStart-logMarks)*Block // bytes: so many blocks have marks
	recordFixed = 32                                     // bytes of a record before the numbers of its blocks
	maxLogged   = 64                                     // blocks of a record; their numbers fit in its first block
)

// syncLog is the file with what few blocks held at flushes. See the package's comment. It is used by one at a time, but for overwritten.
type syncLog struct {
	f     file
	size  int64 // bytes
	epoch uint64
	made  bool // it is on the disk, all of it
	off   bool // it cannot be used
	at    int64
	n     uint64 // records
	old   bool   // there may be records of another process, which are void or in data
	buf   []byte

	held atomic.Int64 // blocks in slots

	mu sync.Mutex
	// guards following
	slots map[int64]int64 // block => which one of the log has what data holds
	marks [logStart - logMarks]byte
}

func newLog(f file, size int64) *syncLog {
	if size == 0 {
		size = logLen
	}
	return &syncLog{f: f, size: min(size, maxLog), at: logStart, slots: map[int64]int64{}}
}

// open reads the head. A log without one was not made yet.
func (l *syncLog) open() error {
	b := make([]byte, logHeadLen)
	if _, err := l.f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if _, err := l.f.ReadAt(l.marks[:], logMarks); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if isZero(b) {
		return nil
	}
	if string(b[:8]) != logMagic || binary.LittleEndian.Uint32(b[logHeadLen-4:]) != crc32.Checksum(b[:logHeadLen-4], crcTable) {
		return fmt.Errorf("%w: log, head", ErrDamaged)
	}
	l.epoch, l.made = binary.LittleEndian.Uint64(b[8:]), true
	l.old = true
	return nil
}

// make lays it ready: what is written over later is on the disk already, so a sync of it is a write and nothing else.
func (l *syncLog) make() error {
	zero := make([]byte, min(l.size, 1<<20))
	for at := int64(0); at < l.size; {
		n, err := l.f.WriteAt(zero[:min(int64(len(zero)), l.size-at)], at)
		if err != nil {
			return err
		}
		at += int64(n)
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	l.made = true
	return l.begin()
}

// begin makes void, durably, what is in the log.
func (l *syncLog) begin() error {
	if err := l.writeHead(l.epoch + 1); err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	l.epoch, l.at, l.n, l.old = l.epoch+1, logStart, 0, false
	return nil
}

// writeHead writes the head, without marks.
func (l *syncLog) writeHead(epoch uint64) error {
	b := make([]byte, logStart)
	copy(b, logMagic)
	binary.LittleEndian.PutUint64(b[8:], epoch)
	binary.LittleEndian.PutUint32(b[logHeadLen-4:], crc32.Checksum(b[:logHeadLen-4], crcTable))
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.slots)
	clear(l.marks[:])
	l.held.Store(0)
	_, err := l.f.WriteAt(b, 0)
	return err
}

// slot is which block of the log is at an offset.
func slot(at int64) int64 { return (at - logStart) / Block }

// hold says that the blocks are about to be in the log from offset at on.
func (l *syncLog) hold(blocks []int64, at int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, block := range blocks {
		l.slots[block] = slot(at) + int64(i)
	}
	l.held.Store(int64(len(l.slots)))
}

// overwritten marks blocks [from, to), which were written, as newer than in the log, where they are there: should the process be killed, data has them.
// It is not synced.
func (l *syncLog) overwritten(from, to int64) error {
	if l.held.Load() == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for block := from; block < to && len(l.slots) > 0; block++ {
		at, ok := l.slots[block]
		if !ok {
			continue
		}
		delete(l.slots, block)
		l.marks[at/8] |= 1 << (at % 8)
		if _, err := l.f.WriteAt(l.marks[at/8:at/8+1], logMarks+at/8); err != nil {
			return err
		}
	}
	l.held.Store(int64(len(l.slots)))
	return nil
}

// reset is begin if there may be something in the log. What it holds is in data, durably.
func (l *syncLog) reset() error {
	if l.n == 0 && !l.old {
		return nil
	}
	return l.begin()
}

// add makes durable what the blocks hold in data. It reports false when that is to be done otherwise: there is no room. After an error nobody knows what
// is on the disk.
func (l *syncLog) add(blocks []int64, data file) (bool, error) {
	n := int64(len(blocks)+1) * Block
	if l.off || l.at+n > l.size {
		return false, nil
	}
	if !l.made {
		if l.make() != nil { // the disk is full, perhaps
			l.off = true
			return false, nil
		}
	}
	l.hold(blocks, l.at+Block) // before their content is read: what is written later is marked
	l.buf = slices.Grow(l.buf[:0], int(n))[:n]
	b, le := l.buf, binary.LittleEndian
	clear(b[:Block])
	copy(b, recordMagic)
	le.PutUint64(b[8:], l.epoch)
	le.PutUint64(b[16:], l.n)
	le.PutUint32(b[24:], uint32(len(blocks)))
	for i, block := range blocks {
		le.PutUint64(b[recordFixed+8*i:], uint64(block))
		if _, err := full(data, b[(i+1)*Block:][:Block], block*Block); err != nil {
			return false, err
		}
	}
	le.PutUint32(b[4:], crc32.Checksum(b[8:], crcTable))
	if _, err := l.f.WriteAt(b, l.at); err != nil {
		return false, err
	}
	if err := l.f.Sync(); err != nil {
		return false, err
	}
	l.at += n
	l.n++
	return true, nil
}

// replay gives the blocks of all records to do, the oldest first. After the death of the process alone, those that are marked
// are left out.
func (l *syncLog) replay(killed bool, do func(block int64, content []byte) error) error {
	if !l.made {
		return nil
	}
	le := binary.LittleEndian
	buf := make([]byte, (maxLogged+1)*Block)
	for {
		head := buf[:Block]
		if _, err := l.f.ReadAt(head, l.at); err != nil {
			return notEOF(err)
		}
		n := int(le.Uint32(head[24:]))
		if string(head[:4]) != recordMagic || le.Uint64(head[8:]) != l.epoch || le.Uint64(head[16:]) != l.n || n > maxLogged ||
			l.at+int64(n+1)*Block > maxLog {
			return nil
		}
		b := buf[:(n+1)*Block]
		if _, err := l.f.ReadAt(b, l.at); err != nil {
			return notEOF(err)
		}
		if le.Uint32(b[4:]) != crc32.Checksum(b[8:], crcTable) {
			return nil // its flush did not return
		}
		for i := range n {
			if at := slot(l.at) + 1 + int64(i); killed && l.marks[at/8]&(1<<(at%8)) != 0 {
				continue
			}
			if err := do(int64(le.Uint64(b[recordFixed+8*i:])), b[(i+1)*Block:][:Block]); err != nil {
				return err
			}
		}
		l.at += int64(len(b))
		l.n++
	}
}

// notEOF is for reading up to the end of the log, where nothing follows.
func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// unsynced are the blocks written since the last flush, while they are few.
type unsynced struct {
	many atomic.Bool // they are not, or something else was done to the disk

	mu     sync.Mutex // guards following
	blocks []int64
}

// add is called when blocks [from, to) have been written and are in the map.
func (u *unsynced) add(from, to int64) {
	if u.many.Load() { // the flush that clears it has yet to sync data
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for block := from; block < to; block++ {
		if slices.Contains(u.blocks, block) {
			continue
		}
		if len(u.blocks) == maxLogged {
			u.many.Store(true)
			return
		}
		u.blocks = append(u.blocks, block)
	}
}

// take gives the blocks to a flush, appended to list. With many, it is to sync data.
func (u *unsynced) take(list []int64) (blocks []int64, many bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	list = append(list, u.blocks...)
	u.blocks = u.blocks[:0]
	return list, u.many.Swap(false)
}
