package registry

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var le = binary.LittleEndian

// The bounds of a hive.
const (
	baseSize   = 4096     // bytes before the bins
	pageSize   = 4096     // of bins, and of the cache
	cacheSize  = 4 << 20  // bytes
	maxCell    = 16 << 20 // bytes; Windows itself keeps larger data in pieces
	maxBins    = 4 << 30  // bytes; offsets have 32 bits
	maxChanged = 64 << 20 // bytes of memory for what logs change; Windows keeps a log below 32 MiB
	maxDepth   = 512      // "Registry Element Size Limits" of Microsoft's documentation
	none       = 0xffffffff
)

// Hive is an open hive. Safe for concurrent use.
type Hive struct {
	minor uint32
	root  uint32
	size  int64 // of the bins, bytes
	bins  *guest.Cache

	// Replayed: the hive was dirty, and the logs had what was missing.
	Replayed bool
	// Warnings are for people: a dirty hive whose logs do not help.
	Warnings []string
}

// base is the base block ("Base block"), of which the first 512 bytes count:
//
//	0 "regf" | 4 primary sequence number 4 | 8 secondary 4 | 12 written 8, FILETIME | 20 major version 4 | 24 minor 4
//	28 type 4: 0 primary file, 1, 2 and 6 logs | 32 format 4: 1 | 36 root cell 4 | 40 bytes of bins 4 | 44 clustering factor 4
//	48 name 64 | … | 508 XOR of the words before
type base []byte

const (
	typePrimary  = 0
	typeLog      = 1
	typeLogOld   = 2 // Windows 2000
	typeLogEntry = 6 // Windows 8.1
)

func (b base) primary() uint32   { return le.Uint32(b[4:]) }
func (b base) secondary() uint32 { return le.Uint32(b[8:]) }
func (b base) written() uint64   { return le.Uint64(b[12:]) }
func (b base) kind() uint32      { return le.Uint32(b[28:]) }
func (b base) binsSize() int64   { return int64(le.Uint32(b[40:])) }
func (b base) sector() int64     { return int64(le.Uint32(b[44:])) * 512 }

func (b base) sound() bool {
	if string(b[:4]) != "regf" {
		return false
	}
	var sum uint32
	for i := 0; i < 508; i += 4 {
		sum ^= le.Uint32(b[i:])
	}
	switch sum {
	case 0:
		sum = 1
	case 0xffffffff:
		sum = 0xfffffffe
	}
	return sum == le.Uint32(b[508:])
}

// Open opens a hive with its transaction logs (.LOG, .LOG1, .LOG2), which count only when the hive is dirty. ErrUnknown: it is
// none.
func Open(primary guest.Device, logs ...guest.Device) (*Hive, error) {
	b := make(base, 512)
	if primary.Size() < baseSize+32 {
		return nil, fmt.Errorf("registry: %w", guest.ErrUnknown)
	}
	if err := guest.ReadFull(primary, b, 0); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	if string(b[:4]) != "regf" {
		return nil, fmt.Errorf("registry: %w", guest.ErrUnknown)
	}
	h := &Hive{}
	over := guest.NewOverlay(longer{primary}, 512, maxChanged)
	if !b.sound() || b.primary() != b.secondary() {
		var err error
		if b, err = h.recover(b, over, logs); err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
	}
	if err := h.describe(b); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	room := primary.Size() - baseSize
	if h.Replayed { // what makes a hive longer is in the logs
		for _, log := range logs {
			room += log.Size()
		}
	}
	if h.size > room {
		return nil, fmt.Errorf("registry: %w", guest.Damaged("%d bytes of bins in a file of %d", h.size, primary.Size()))
	}
	h.bins = guest.NewCache(bins{over, h.size}, pageSize, cacheSize)
	return h, nil
}

func (h *Hive) describe(b base) error {
	h.minor, h.root, h.size = le.Uint32(b[24:]), le.Uint32(b[36:]), b.binsSize()
	if major := le.Uint32(b[20:]); major != 1 || h.minor < 3 || h.minor > 6 {
		return guest.Unsupported("a hive of the format %d.%d", major, h.minor)
	}
	if b.kind() != typePrimary || le.Uint32(b[32:]) != 1 {
		return guest.Unsupported("a hive of the type %d, format %d", b.kind(), le.Uint32(b[32:]))
	}
	if h.size == 0 || h.size%pageSize != 0 {
		return guest.Damaged("%d bytes of bins", h.size)
	}
	return nil
}

// longer is a device that goes on with zeros behind its end: logs may make a hive longer.
type longer struct{ guest.Device }

func (l longer) Size() int64 { return baseSize + maxBins }

func (l longer) ReadAt(p []byte, off int64) (int, error) {
	n := int(max(0, min(int64(len(p)), l.Device.Size()-off)))
	clear(p[n:])
	if n > 0 {
		if err := guest.ReadFull(l.Device, p[:n], off); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// bins is what follows the base block.
type bins struct {
	over *guest.Overlay
	size int64
}

func (b bins) Size() int64 { return b.size }

func (b bins) ReadAt(p []byte, off int64) (int, error) { return b.over.ReadAt(p, baseSize+off) }

// read fills p from the bins.
func (h *Hive) read(p []byte, off int64) error {
	if off < 0 || off > h.size-int64(len(p)) {
		return guest.Damaged("%d bytes at %#x, past the end of the hive", len(p), off)
	}
	for len(p) > 0 {
		page, err := h.bins.Block(off/pageSize, nil)
		if err != nil {
			return err
		}
		n := copy(p, page[off%pageSize:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// cell gives the content of the cell at off, at least least bytes ("Cell"): size 4, negative for one in use, then the content. Of a cell longer than
// most, only the first most bytes.
func (h *Hive) cell(off uint32, least, most int) ([]byte, error) {
	var head [4]byte
	if off%8 != 0 {
		return nil, guest.Damaged("a cell at %#x", off)
	}
	if err := h.read(head[:], int64(off)); err != nil {
		return nil, err
	}
	n := -int64(int32(le.Uint32(head[:]))) - 4
	if n < int64(least) || int64(off)+4+n > h.size {
		return nil, guest.Damaged("the cell at %#x has %d bytes", off, n)
	}
	if n > maxCell {
		return nil, guest.Unsupported("the cell at %#x has %d bytes", off, n)
	}
	b := make([]byte, min(n, int64(most)))
	return b, h.read(b, int64(off)+4)
}

// filetime is 100 ns since 1601 ([MS-DTYP] §2.3.3); 0 is none.
func filetime(t uint64) time.Time {
	const epoch = 11644473600 // seconds from 1601 to 1970
	if t == 0 || t > 1<<63 {
		return time.Time{}
	}
	return time.Unix(int64(t/1e7)-epoch, int64(t%1e7)*100).UTC()
}
