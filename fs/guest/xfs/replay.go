package xfs

import (
	"errors"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// replayed is what readers must know of a replay besides the bytes.
type replayed struct {
	// unsummed: byte on the device => a block lies there that was put together of several pieces, whose checksum could not be computed.
	unsummed map[int64]bool
	// moved: inode => its blocks name the inode that they were taken from.
	moved map[uint64]bool
	// unfinished: inode => what the log only announces.
	unfinished map[uint64]uint8
}

const (
	unfinishedMap  = 1 << iota // extents to be mapped or unmapped
	unfinishedAttr             // attributes to be set or removed
)

// Types of items (XFSDS, Log Items); those from itemATTRI on are newer than the book.
const (
	itemEFI      = 0x1236
	itemEFD      = 0x1237
	itemInode    = 0x123b
	itemBuffer   = 0x123c
	itemDquot    = 0x123d
	itemQuotaOff = 0x123e
	itemCreate   = 0x123f
	itemRUI      = 0x1240
	itemCUD      = 0x1243
	itemBUI      = 0x1244
	itemBUD      = 0x1245
	itemATTRI    = 0x1246
	itemATTRD    = 0x1247
	itemXMI      = 0x1248
	itemXMD      = 0x1249
	itemLast     = 0x124f // intents of the real-time device
)

// A replayer carries transactions out in memory.
type replayer struct {
	fs    *FS
	over  *guest.Overlay
	pages map[int64][]byte // block => its bytes, which the overlay has too
	lsn   uint64           // of the transactions being carried out
	dirty []place          // replayed with this lsn, not yet stamped
	done  int              // transactions
	replayed
	cancelled   map[place]int  // buffer => how many times the rest of the log cancels it
	cancelledAt map[uint64]int // the same, by where it begins
	intents     map[intent][]uint64
}

// A place is a buffer on the device, in sectors.
type place struct{ at, n uint64 }

type intent struct {
	kind uint16
	id   uint64
}

// replay brings into memory what the log has and the disk has not. A log that cannot be replayed is a warning, and the disk is
// shown as it is; one that needs too much memory is an error.
func (fs *FS) replay(opt guest.Options) error {
	dev := fs.dev
	err := fs.replayLog(opt)
	if err == nil || errors.Is(err, errNoRoom) {
		return err
	}
	if !errors.Is(err, guest.ErrDamaged) && !errors.Is(err, guest.ErrUnsupported) {
		return err
	}
	fs.dev, fs.log, fs.info.Replayed = dev, replayed{}, false
	fs.doubt = err
	fs.warn("the log was not replayed: %v", err)
	return nil
}

func (fs *FS) replayLog(opt guest.Options) error {
	if fs.sb.journal == 0 {
		return guest.Unsupported("a log on another device")
	}
	off, err := fs.sb.offset(fs.sb.journal, uint64(fs.sb.logLen))
	if err != nil || fs.sb.logLen == 0 {
		return guest.Damaged("the place of the log")
	}
	ring := &ring{dev: fs.dev, off: off, size: fs.sb.logLen << fs.sb.blockLog / sector, uuid: fs.sb.uuid}
	if opt.NoReplay {
		fs.doubt = guest.Unsupported("the log was left alone")
		return nil
	}
	s, err := ring.stretch()
	if err != nil || s.tail == s.head {
		return err
	}
	if fs.sb.logCompat&^logKnown != 0 {
		return guest.Unsupported("features of a newer log: %#x", fs.sb.logCompat&^logKnown)
	}
	r := &replayer{fs: fs, over: guest.NewOverlay(fs.dev, fs.sb.blockSize, opt.Journal), pages: map[int64][]byte{},
		replayed:  replayed{map[int64]bool{}, map[uint64]bool{}, map[uint64]uint8{}},
		cancelled: map[place]int{}, cancelledAt: map[uint64]int{}, intents: map[intent][]uint64{}}
	if err := ring.pass(s, fs.sb.v5, opt.Journal, r.cancels); err != nil {
		return err
	}
	if err := ring.pass(s, fs.sb.v5, opt.Journal, r.transaction); err != nil {
		return err
	}
	return r.finish()
}

// finish puts what was replayed in the place of the device.
func (r *replayer) finish() error {
	if err := r.stampAll(); err != nil {
		return err
	}
	if r.done == 0 {
		return nil
	}
	fs := r.fs
	if r.pages[0] != nil {
		sb, err := superAt(r.over, 0)
		if err != nil {
			return err
		}
		fs.sb = sb
	}
	for i, inodes := range r.intents {
		what := uint8(unfinishedMap | unfinishedAttr)
		if i.kind == itemATTRI {
			what = unfinishedAttr
		}
		for _, ino := range inodes {
			r.unfinished[ino] |= what
		}
	}
	if n := len(r.unfinished); n > 0 {
		fs.warn("the log holds unfinished changes of %d files, which cannot be read", n)
	}
	fs.dev, fs.log, fs.info.Replayed = r.over, r.replayed, true
	return nil
}

// cancels is the first pass: it counts which buffers are cancelled, so that what came before is not replayed over what
// the blocks have become since.
func (r *replayer) cancels(t *trans) error {
	for i := range t.items {
		if t.items[i].kind() != itemBuffer {
			continue
		}
		b, err := parseBuffer(t.items[i].regions[0])
		if err != nil {
			return err
		}
		if b.flags&bufCancel != 0 {
			r.cancelled[b.place]++
			r.cancelledAt[b.at]++
		}
	}
	return nil
}

// transaction is the second pass: it carries one out. Buffers come first, because inodes may lie in them; cancels come last.
func (r *replayer) transaction(t *trans) error {
	if t.lsn != r.lsn {
		if err := r.stampAll(); err != nil {
			return err
		}
		r.lsn = t.lsn
	}
	r.done++
	var inodes, cancels []*item
	for n := range t.items {
		i := &t.items[n]
		switch kind := i.kind(); kind {
		case itemBuffer:
			b, err := parseBuffer(i.regions[0])
			if err == nil && b.flags&bufCancel != 0 {
				cancels = append(cancels, i)
			} else if err == nil {
				err = r.buffer(b, i.regions[1:])
			}
			if err != nil {
				return err
			}
		case itemCreate:
			if err := r.create(i.regions[0]); err != nil {
				return err
			}
		case itemInode:
			inodes = append(inodes, i)
		case itemDquot, itemQuotaOff:
		default:
			if kind < itemEFI || kind > itemLast {
				return guest.Unsupported("an item of type %#x", kind)
			}
			if err := r.intent(kind, i.regions[0]); err != nil {
				return err
			}
		}
	}
	for _, i := range inodes {
		if err := r.inode(i); err != nil {
			return err
		}
	}
	for _, i := range cancels {
		b, _ := parseBuffer(i.regions[0])
		r.cancelled[b.place]--
		r.cancelledAt[b.at]--
	}
	return nil
}

// intent notes what is to be done after this transaction, and forgets it when it was. Of the intents only those that change what
// a reader shows matter: which blocks are free or shared is settled by what is already there.
func (r *replayer) intent(kind uint16, b []byte) error {
	if len(b) < 16 {
		return guest.Damaged("an item of type %#x with %d bytes", kind, len(b))
	}
	id := le.Uint64(b[8:])
	var inodes []uint64
	switch kind {
	case itemBUI:
		// Extents of 32 bytes that begin with the inode (XFSDS, File Block Mapping Intent).
		for n := range int(min(le.Uint32(b[4:]), 1<<12)) {
			if at := 16 + n*32; at+8 <= len(b) {
				inodes = append(inodes, le.Uint64(b[at:]))
			}
		}
	case itemATTRI:
		if len(b) >= 24 {
			inodes = append(inodes, le.Uint64(b[16:]))
		}
	case itemXMI:
		if len(b) >= 32 {
			inodes = append(inodes, le.Uint64(b[16:]), le.Uint64(b[24:]))
		}
	case itemBUD, itemATTRD, itemXMD:
		delete(r.intents, intent{kind - 1, id})
		return nil
	default:
		return nil
	}
	r.intents[intent{kind, id}] = inodes
	return nil
}

// read reads n bytes as they are after what has been replayed so far.
func (r *replayer) read(off, n int64) ([]byte, error) {
	b := make([]byte, n)
	return b, guest.ReadFull(r.over, b, off)
}

// write changes bytes in memory.
func (r *replayer) write(off int64, b []byte) error {
	for size := r.fs.sb.blockSize; len(b) > 0; {
		n, from := off/size, off%size
		page := r.pages[n]
		if page == nil {
			page = make([]byte, size)
			if err := guest.ReadFull(r.over, page, n*size); err != nil {
				return err
			}
			if err := r.over.Set(n, page); err != nil {
				return errNoRoom
			}
			r.pages[n] = page
		}
		k := copy(page[from:], b)
		b, off = b[k:], off+int64(k)
	}
	return nil
}
