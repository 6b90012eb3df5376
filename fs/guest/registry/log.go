package registry

import (
	"cmp"
	"math/bits"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// maxLog is what is read of a log, bytes.
const maxLog = 64 << 20

// recover applies to over what the logs have of a dirty hive, and gives the base block that then counts ("Dirty state of a hive",
// "Multiple transaction log files").
func (h *Hive) recover(b base, over *guest.Overlay, logs []guest.Device) (base, error) {
	sound := b.sound()
	written := b.written()
	if !sound {
		// "Hive bin": the first one has a copy.
		var head [32]byte
		if err := guest.ReadFull(over, head[:], baseSize); err != nil {
			return nil, err
		}
		written = le.Uint64(head[20:])
	}
	var entries []*entryLog
	for _, dev := range logs {
		log, err := readLog(dev)
		if err != nil {
			return nil, err
		}
		switch {
		case log == nil:
		case log.base.kind() == typeLogEntry:
			if e := log.entries(); e != nil {
				entries = append(entries, e)
			}
		case log.base.written() == written:
			done, err := log.applyPages(over)
			if err != nil || done {
				h.Replayed = true
				return log.base.asPrimary(), err
			}
		}
	}
	from := entries
	if !sound && len(entries) > 1 { // only the log with the latest
		from = []*entryLog{slices.MaxFunc(entries, byFirst)}
	}
	slices.SortFunc(from, byFirst)
	next, strict := b.secondary(), false
	if !sound {
		next = 0
	}
	for _, log := range from {
		if !sound {
			b, sound = log.base.asPrimary(), true
		}
		for _, e := range log.list {
			if e.sequence < next || strict && e.sequence != next {
				break
			}
			if err := e.apply(over); err != nil {
				return nil, err
			}
			b = slices.Clone(b)
			le.PutUint32(b[40:], e.binsSize)
			next, strict, h.Replayed = e.sequence+1, true, true
		}
	}
	switch {
	case !sound:
		return nil, guest.Damaged("the base block's checksum, and no log has a copy")
	case !h.Replayed:
		h.Warnings = append(h.Warnings, "a registry hive was being changed, and no log has these changes: it is read without them")
	}
	return b, nil
}

func byFirst(a, b *entryLog) int { return cmp.Compare(a.list[0].sequence, b.list[0].sequence) }

// asPrimary makes the base block of a log that of the hive itself.
func (b base) asPrimary() base {
	b = slices.Clone(b)
	le.PutUint32(b[28:], typePrimary)
	return b
}

// A logFile is a transaction log, read.
type logFile struct {
	base base
	data []byte // with the base
}

// readLog reads a log; nil when it is none, or empty.
func readLog(dev guest.Device) (*logFile, error) {
	if dev.Size() < 1024 {
		return nil, nil
	}
	l := &logFile{data: make([]byte, min(dev.Size(), maxLog))}
	if err := guest.ReadFull(dev, l.data[:512], 0); err != nil {
		return nil, err
	}
	l.base = l.data[:512]
	if !l.base.sound() || l.base.primary() != l.base.secondary() || l.base.kind() == typePrimary {
		return nil, nil
	}
	return l, guest.ReadFull(dev, l.data[512:], 512)
}

// applyPages applies a log of the old format ("Old format"):
//
//	base block, one sector | "DIRT", a bit for each 512 bytes of the bins, up to a sector's end | the pages whose bit is set
//
// It reports whether there was one.
func (l *logFile) applyPages(over *guest.Overlay) (bool, error) {
	sector := l.base.sector()
	if kind := l.base.kind(); kind != typeLog && kind != typeLogOld || sector < 512 || sector > 4096 {
		return false, nil
	}
	n := l.base.binsSize() / 512
	from := sector + (4+(n+7)/8+sector-1)/sector*sector
	if from > int64(len(l.data)) || string(l.data[sector:sector+4]) != "DIRT" {
		return false, nil
	}
	bitmap, pages := l.data[sector+4:], l.data[from:]
	for i := range n {
		if bitmap[i/8]>>(i%8)&1 == 0 {
			continue
		}
		if len(pages) < 512 {
			return false, guest.Damaged("a registry log ends within its pages")
		}
		if err := over.Set(baseSize/512+i, pages[:512:512]); err != nil {
			return false, err
		}
		pages = pages[512:]
	}
	return true, nil
}

// An entryLog is a log of the new format, Windows 8.1 and later.
type entryLog struct {
	base base
	list []logEntry // at least one, with sequence numbers one after the other
}

// A logEntry is what was changed at once ("Log entries"):
//
//	0 "HvLE" | 4 bytes of all 4 | 8 flags 4 | 12 sequence number 4 | 16 bytes of the bins 4 | 20 number of pages 4
//	24 Marvin32 of what follows the head 8 | 32 Marvin32 of the 32 bytes before 8 | 40 where each page is: offset 4, size 4 | the pages
type logEntry struct {
	sequence, binsSize uint32
	refs, data         []byte
}

const entryHead = 40

// entries reads the entries of a log, up to the first that is not good or out of order; nil when there is none.
func (l *logFile) entries() *entryLog {
	e := &entryLog{base: l.base}
	next := l.base.primary()
	for b := l.data[512:]; ; next++ {
		entry, size := parseEntry(b)
		if size == 0 || entry.sequence != next {
			break
		}
		e.list = append(e.list, entry)
		b = b[size:]
	}
	if len(e.list) == 0 {
		return nil
	}
	return e
}

// parseEntry reads the entry at the start of b; its size is 0 when there is none that is good.
func parseEntry(b []byte) (e logEntry, size int) {
	if len(b) < entryHead || string(b[:4]) != "HvLE" {
		return e, 0
	}
	n := int64(le.Uint32(b[4:]))
	if n < 512 || n%512 != 0 || n > int64(len(b)) {
		return e, 0
	}
	b = b[:n]
	e.sequence, e.binsSize = le.Uint32(b[12:]), le.Uint32(b[16:])
	count := int64(le.Uint32(b[20:]))
	if e.binsSize%pageSize != 0 || entryHead+8*count > n || le.Uint64(b[24:]) != marvin32(b[entryHead:]) || le.Uint64(b[32:]) != marvin32(b[:32]) {
		return e, 0
	}
	e.refs, e.data = b[entryHead:entryHead+8*count], b[entryHead+8*count:]
	room := int64(len(e.data))
	for r := e.refs; len(r) > 0; r = r[8:] {
		off, size := int64(le.Uint32(r)), int64(le.Uint32(r[4:]))
		if room -= size; room < 0 || off%512 != 0 || size%512 != 0 || off+size > int64(e.binsSize) {
			return e, 0
		}
	}
	return e, int(n)
}

func (e logEntry) apply(over *guest.Overlay) error {
	data := e.data
	for r := e.refs; len(r) > 0; r = r[8:] {
		first, n := int64(baseSize+le.Uint32(r))/512, int64(le.Uint32(r[4:]))/512
		for i := range n {
			if err := over.Set(first+i, data[:512:512]); err != nil {
				return err
			}
			data = data[512:]
		}
	}
	return nil
}

// marvin32 is the Marvin32 checksum (published by Microsoft under the MIT licence, with .NET and SymCrypt) with the seed of
// registry logs.
func marvin32(b []byte) uint64 { return marvin(b, 0x82ef4d887a4e55c5) }

func marvin(b []byte, seed uint64) uint64 {
	lo, hi := uint32(seed), uint32(seed>>32)
	mix := func(v uint32) {
		lo += v
		hi ^= lo
		lo = bits.RotateLeft32(lo, 20) + hi
		hi = bits.RotateLeft32(hi, 9) ^ lo
		lo = bits.RotateLeft32(lo, 27) + hi
		hi = bits.RotateLeft32(hi, 19)
	}
	for ; len(b) >= 4; b = b[4:] {
		mix(le.Uint32(b))
	}
	var last [4]byte
	copy(last[:], b)
	last[len(b)] = 0x80
	mix(le.Uint32(last[:]))
	mix(0)
	return uint64(hi)<<32 | uint64(lo)
}
