package xfs

import (
	"cmp"
	"errors"
	"maps"
	"slices"

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
	// patched: inode => its extents, after what the log announced was carried out.
	patched map[uint64]*patched
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
	intents     map[intentKey]*intent
	announced   int // intents so far
	changes     int // those that are open, and what is in them
}

func newReplayed() replayed {
	return replayed{map[int64]bool{}, map[uint64]bool{}, map[uint64]uint8{}, map[uint64]*patched{}}
}

// maxIntents are those that are open at the same time.
const maxIntents = 1 << 12

// A place is a buffer on the device, in sectors.
type place struct{ at, n uint64 }

type intentKey struct {
	kind uint16
	id   uint64
}

// An intent is what a transaction has announced and no later one has done.
type intent struct {
	kind    uint16
	number  int         // in their order
	changes []mapChange // of an itemBUI
	inodes  []uint64    // of the others
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
		replayed: newReplayed(), cancelled: map[place]int{}, cancelledAt: map[uint64]int{}, intents: map[intentKey]*intent{}}
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
	fs.dev, fs.log, fs.info.Replayed = r.over, r.replayed, true
	byOrder := func(a, b *intent) int { return cmp.Compare(a.number, b.number) }
	for _, i := range slices.SortedFunc(maps.Values(r.intents), byOrder) {
		for _, c := range i.changes {
			if fs.remap(c) != nil {
				r.unfinished[c.ino] |= unfinishedMap | unfinishedAttr
			}
		}
		for _, ino := range i.inodes {
			r.unfinished[ino] |= unfinishedAttr
			if i.kind == itemXMI {
				r.unfinished[ino] |= unfinishedMap
			}
		}
	}
	if n := len(r.unfinished); n > 0 {
		fs.warn("the log holds unfinished changes of %d files, which cannot be read", n)
	}
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
	r.announced++
	i, id := &intent{kind: kind, number: r.announced}, le.Uint64(b[8:])
	switch kind {
	case itemBUI:
		n := int(min(le.Uint32(b[4:]), 1<<12))
		if len(b) < 16+n*32 {
			return guest.Damaged("%d changes of mapping in %d bytes", n, len(b))
		}
		for b := b[16:]; len(i.changes) < n; b = b[32:] {
			i.changes = append(i.changes, parseMapChange(b))
		}
	case itemATTRI:
		if len(b) >= 24 {
			i.inodes = append(i.inodes, le.Uint64(b[16:]))
		}
	case itemXMI:
		if len(b) >= 32 {
			i.inodes = append(i.inodes, le.Uint64(b[16:]), le.Uint64(b[24:]))
		}
	case itemBUD, itemATTRD, itemXMD:
		if o := r.intents[intentKey{kind - 1, id}]; o != nil {
			r.changes -= len(o.changes) + 1
			delete(r.intents, intentKey{kind - 1, id})
		}
		return nil
	default:
		return nil
	}
	if r.changes += len(i.changes) + 1; r.changes > maxIntents {
		return guest.Unsupported("more than %d changes that were only announced", maxIntents)
	}
	r.intents[intentKey{kind, id}] = i
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
