package vdisk

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"slices"
	"sort"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// The log of a VHDX, MS-VHDX §2.3: a ring of entries, each a number of sectors
// of 4 KiB.
//
//	+0   "loge"             +16 u64 sequence         +48 u64 flushed file offset
//	+4   u32 CRC-32C        +24 u32 descriptors      +56 u64 last file offset
//	+8   u32 entry length   +28 u32 reserved         +64 descriptors of 32 bytes,
//	+12  u32 tail           +32 log GUID                 on through further sectors
//
//	zero descriptor: "zero", u32 reserved, u64 length, u64 offset, u64 sequence
//	data descriptor: "desc", last 4 bytes, first 8 bytes, u64 offset, u64 sequence
//
// Then, for each data descriptor, a sector: "data", u32 high half of the
// sequence, bytes 8..4091 of the 4 KiB to write, u32 low half. The checksum
// covers the entry with itself as zero. A torn entry fails it, or holds sectors
// of another sequence.
const vhdxLogSector = 4 * kib

// logEntry is a valid entry.
type logEntry struct {
	sequence uint64
	length   int64 // bytes
	tail     int64 // offset in the log of the oldest entry not yet written back
	flushed  uint64
	last     uint64
	writes   []logWrite
}

// logWrite is what an entry writes to the file.
type logWrite struct {
	extent.Extent
	desc, data int32 // descriptor and data sector, in units of 32 bytes of the log; data < 0: zeros
}

// logRing is a log in memory.
type logRing struct {
	b       []byte
	guid    GUID
	parsed  map[int64]*logEntry // offset => entry, nil: none is there
	summing int64               // bytes that may still be checksummed
}

// replayVHDXLog gives the file as it is after the log has been written back.
func replayVHDXLog(r io.ReaderAt, size int64, head vhdxHead) (*replayedFile, error) {
	if head.logLen == 0 {
		return nil, corrupt("has an id but no bytes")
	}
	if head.logLen > vhdxMaxLog {
		return nil, unsupported("a log to replay of %d bytes (at most %d)", head.logLen, vhdxMaxLog)
	}
	b, err := vhdxRead(r, head.logAt, head.logLen, size)
	if err != nil {
		return nil, err
	}
	// Valid entries do not share sectors, unless someone made them up.
	l := &logRing{b: b, guid: head.log, parsed: map[int64]*logEntry{}, summing: 4 * head.logLen}
	active, err := l.active()
	if err != nil {
		return nil, err
	}
	newest := active[len(active)-1]
	if newest.flushed > uint64(size) {
		return nil, corrupt("the file was cut off: it has %d bytes, the log knew %d", size, newest.flushed)
	}
	var writes []logWrite
	for _, e := range active {
		writes = append(writes, e.writes...)
	}
	f := &replayedFile{r: r, stored: size, size: size, patches: l.patches(settle(writes))}
	if newest.last > maxFile {
		return nil, corrupt("last file offset %d", newest.last)
	}
	f.size = max(f.size, int64(newest.last))
	if n := len(f.patches); n > 0 {
		f.size = max(f.size, f.patches[n-1].End())
	}
	return f, nil
}

// active finds the newest complete sequence, from its tail to its head
// (MS-VHDX §2.3.3).
func (l *logRing) active() ([]*logEntry, error) {
	size := int64(len(l.b))
	var best []*logEntry
	for start := int64(0); start < size; {
		entries, length, err := l.sequence(start)
		if err != nil {
			return nil, err
		}
		if entries == nil {
			start += vhdxLogSector
			continue
		}
		if best == nil || entries[len(entries)-1].sequence > best[len(best)-1].sequence {
			best = entries
		}
		start += length
	}
	if best == nil {
		return nil, corrupt("nothing in it is valid, and the header says that it must be replayed")
	}
	return best, nil
}

// sequence gathers entries in a row from start on, length bytes of them, and
// gives those from the tail of the last on; nil when that tail is not among
// them. What is before the tail was written back, and its place may hold
// something else by now.
func (l *logRing) sequence(start int64) (from []*logEntry, length int64, err error) {
	size := int64(len(l.b))
	var entries []*logEntry
	var places []int64
	for length < size {
		at := (start + length) % size
		e, err := l.entry(at)
		if err != nil {
			return nil, 0, err
		}
		if e == nil || len(entries) > 0 && e.sequence != entries[len(entries)-1].sequence+1 {
			break
		}
		entries, places = append(entries, e), append(places, at)
		length += e.length
	}
	if len(entries) == 0 || length > size {
		return nil, 0, nil
	}
	tail := slices.Index(places, entries[len(entries)-1].tail)
	if tail < 0 {
		return nil, 0, nil
	}
	return entries[tail:], length, nil
}

// entry is the valid entry at a sector of the log, nil when there is none.
func (l *logRing) entry(at int64) (*logEntry, error) {
	if e, ok := l.parsed[at]; ok {
		return e, nil
	}
	e, err := l.parse(at)
	l.parsed[at] = e
	return e, err
}

// place is where the i-th sector from at on begins, around the end of the ring.
func (l *logRing) place(at, i int64) int64 { return (at + i*vhdxLogSector) % int64(len(l.b)) }

func (l *logRing) parse(at int64) (*logEntry, error) {
	le := binary.LittleEndian
	h := l.b[at:]
	if string(h[:4]) != "loge" || GUID(h[32:]) != l.guid {
		return nil, nil
	}
	e := &logEntry{
		sequence: le.Uint64(h[16:]),
		length:   int64(le.Uint32(h[8:])),
		tail:     int64(le.Uint32(h[12:])),
		flushed:  le.Uint64(h[48:]),
		last:     le.Uint64(h[56:]),
	}
	size := int64(len(l.b))
	if e.sequence == 0 || e.length == 0 || e.length > size || e.length%vhdxLogSector != 0 ||
		e.tail >= size || e.tail%vhdxLogSector != 0 {
		return nil, nil
	}
	if !l.describe(e, at, int64(le.Uint32(h[24:]))) {
		return nil, nil
	}
	if l.summing -= e.length; l.summing < 0 {
		return nil, corrupt("its entries overlap")
	}
	if !l.goodSum(at, e.length) {
		return nil, nil
	}
	return e, nil
}

// describe fills in what e writes, and says whether all parts belong together.
// Descriptors follow the header, which takes the room of two.
func (l *logRing) describe(e *logEntry, at, descriptors int64) bool {
	le := binary.LittleEndian
	sectors := divUp(descriptors+2, 128) // of descriptors
	if sectors*vhdxLogSector > e.length {
		return false
	}
	for i := int64(2); i < descriptors+2; i++ {
		place := l.place(at, i/128) + i%128*32
		d := l.b[place:]
		w := logWrite{Extent: extent.Extent{Off: int64(le.Uint64(d[16:])), Len: vhdxLogSector}, desc: int32(place / 32), data: -1}
		switch string(d[:4]) {
		case "zero":
			w.Len = int64(le.Uint64(d[8:]))
		case "desc":
			if sectors*vhdxLogSector >= e.length {
				return false
			}
			place := l.place(at, sectors)
			sectors++
			w.data = int32(place / 32)
			data := l.b[place:]
			if string(data[:4]) != "data" || le.Uint32(data[4:]) != uint32(e.sequence>>32) || le.Uint32(data[4092:]) != uint32(e.sequence) {
				return false
			}
		default:
			return false
		}
		if le.Uint64(d[24:]) != e.sequence || !aligned(w.Extent) {
			return false
		}
		e.writes = append(e.writes, w)
	}
	return true
}

// aligned: a place in a file that a log may write to.
func aligned(e extent.Extent) bool {
	return e.Off >= 0 && e.Len >= 0 && e.Off <= maxFile && e.Len <= maxFile-e.Off &&
		e.Off%vhdxLogSector == 0 && e.Len%vhdxLogSector == 0
}

func (l *logRing) goodSum(at, length int64) bool {
	one := l.b[at:min(at+length, int64(len(l.b)))]
	two := l.b[:length-int64(len(one))]
	sum := crc32.Update(0, castagnoliTable, one[:4])
	sum = crc32.Update(sum, castagnoliTable, make([]byte, 4))
	sum = crc32.Update(sum, castagnoliTable, one[8:])
	sum = crc32.Update(sum, castagnoliTable, two)
	return sum == binary.LittleEndian.Uint32(one[4:])
}

// patch is a part of the file that the log has anew.
type patch struct {
	extent.Extent
	data []byte // nil: zeros
}

// patches gives what settled writes write. Their ranges are whole sectors, so
// a data sector is there whole or not at all.
func (l *logRing) patches(writes []logWrite) []patch {
	all := make([]patch, len(writes))
	for i, w := range writes {
		all[i].Extent = w.Extent
		if w.data < 0 {
			continue
		}
		d := l.b[int64(w.desc)*32:]
		data := slices.Clone(l.b[int64(w.data)*32:][:vhdxLogSector])
		copy(data, d[8:16])
		copy(data[4092:], d[4:8])
		all[i].data = data
	}
	return all
}

// settle turns writes, the oldest first, into ranges that do not overlap, in
// ascending order: the last write of a place counts. Many writes are no more
// than a sort.
func settle(writes []logWrite) []logWrite {
	var edges []int64 // where ranges may begin and end
	for _, w := range writes {
		edges = append(edges, w.Off, w.End())
	}
	slices.Sort(edges)
	edges = slices.Compact(edges)
	// Cells between edges are given to writers from the newest to the oldest.
	owner := make([]int32, len(edges)) // 1 + index of the write, 0: none
	next := make([]int32, len(edges)+1)
	for i := range next {
		next[i] = int32(i)
	}
	free := func(i int32) int32 { // the first cell from i on without an owner
		for next[i] != i {
			next[i] = next[next[i]]
			i = next[i]
		}
		return i
	}
	for i := len(writes) - 1; i >= 0; i-- {
		first, _ := slices.BinarySearch(edges, writes[i].Off)
		for c := free(int32(first)); int(c) < len(edges) && edges[c] < writes[i].End(); c = free(c) {
			owner[c], next[c] = int32(i+1), c+1
		}
	}
	var all []logWrite
	for c, o := range owner {
		if o == 0 {
			continue
		}
		w := writes[o-1]
		w.Extent = to(edges[c], edges[c+1])
		if n := len(all); n > 0 && all[n-1].desc == w.desc && all[n-1].End() == w.Off {
			all[n-1].Len += w.Len
			continue
		}
		all = append(all, w)
	}
	return all
}

// replayedFile is a file with the writes of its log.
type replayedFile struct {
	r       io.ReaderAt
	stored  int64   // bytes that r has
	size    int64   // bytes, at least stored; zeros between
	patches []patch // ascending, apart
}

func (f *replayedFile) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, f.size)
	head := p[:max(0, min(int64(len(p)), f.stored-off))]
	if len(head) > 0 {
		if n, err := readFull(f.r, head, off); err != nil {
			return n, err
		}
	}
	clear(p[len(head):])
	i := sort.Search(len(f.patches), func(i int) bool { return f.patches[i].End() > off })
	for ; i < len(f.patches); i++ {
		w := f.patches[i]
		part := extent.Intersect(w.Extent, extent.Extent{Off: off, Len: int64(len(p))})
		if part.Empty() {
			break
		}
		dst := p[part.Off-off:][:part.Len]
		if w.data == nil {
			clear(dst)
			continue
		}
		copy(dst, w.data[part.Off-w.Off:])
	}
	return len(p), end
}
