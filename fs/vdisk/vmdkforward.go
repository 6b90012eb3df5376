package vdisk

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"sync"
)

// VMDKStream reads a streamOptimized VMDK from its beginning to its end, such as one that a server
// sends. Its methods are for one goroutine, but for Unpack, which is safe for concurrent use.
//
//	s, err := vdisk.ReadStreamVMDK(body, "web01")
//	grain := make([]byte, s.GrainSize())
//	for {
//		off, n, err := s.Next(grain)
//		if err == io.EOF {
//			break // the disk is whole; what no grain covers is zero
//		}
//		…
//	}
//
// VMware's products and WriteStreamOptimized put the grain tables behind the grains, QEMU and
// VMware's open-vmdk before them. Both are held against the grains that came.
type VMDKStream struct {
	name   string
	in     *bufio.Reader
	at     int64 // where in is in the stream, bytes
	size   int64 // of the disk, bytes
	h      sparseHeader
	tables streamTables
	next   int64 // grains begin there on the disk, or behind
	phase  streamPhase
	dirAt  int64     // where a directory behind the grains came
	packed []byte    // of Next
	work   sync.Pool // of *unpacker
	err    error     // what all calls give from now on
}

// streamPhase is what has come of a stream.
type streamPhase int

const (
	streamGrains    streamPhase = iota
	streamDirectory             // the directory came
	streamFooter                // and the footer, if any
	streamEnd                   // and the marker of the end
)

// Bounds of a stream.
const (
	streamMaxTables  = 1 << 22 // 128 TiB in grains of 64 KiB
	streamMinGrain   = 4 * kib // the specification wants 8 sectors and more
	streamMaxPadding = 2 * mib // behind the end; QEMU pads the last grain to its full size
	streamBuffer     = 128 * kib
	streamMaxFile    = math.MaxUint32 * sector // places in it have 32 bits
)

// ReadStreamVMDK reads the header and the descriptor of a streamOptimized VMDK, and all that
// comes before its grains. name is what errors call the stream.
//
// Anything but a streamOptimized VMDK of one extent without a parent is ErrUnsupported, and what
// contradicts the format ErrCorrupt. A stream that ends too early is io.ErrUnexpectedEOF; other
// errors of r are passed on. Reading waits where r waits: who wants to stop it closes what r
// reads from.
//
// Memory: 128 KiB, and for each 512 grains up to 32 bytes: 1 MiB for a disk of 1 TiB in grains of
// 64 KiB, 128 MiB for the largest that is read.
func ReadStreamVMDK(r io.Reader, name string) (*VMDKStream, error) {
	s := &VMDKStream{name: name, in: bufio.NewReaderSize(r, streamBuffer)}
	s.work.New = func() any { return new(unpacker) }
	if err := s.begin(); err != nil {
		return nil, s.wrap(err)
	}
	return s, nil
}

func (s *VMDKStream) wrap(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%s: at byte %d of the stream: %w", s.name, s.at, err)
}

// Size is the size of the disk in bytes.
func (s *VMDKStream) Size() int64 { return s.size }

// GrainSize is the size of a grain in bytes, a power of two. The last one of the disk may be cut off.
func (s *VMDKStream) GrainSize() int { return int(s.h.grain) }

// MaxPacked is the length that a packed grain has at most.
func (s *VMDKStream) MaxPacked() int { return int(2*s.h.grain + sector) }

func (s *VMDKStream) begin() error {
	var head [sector]byte
	if err := s.read(head[:]); err != nil {
		return err
	}
	switch {
	case hasPrefix(head[:], vmdkMagic):
	case isVMDKText(head[:]), hasPrefix(head[:], cowdMagic), hasPrefix(head[:], seSparseMagic):
		return unsupported("a VMDK, but not a streamOptimized one")
	default:
		return corrupt("not a VMDK")
	}
	h, err := parseSparseHeader(head[:], streamMaxFile)
	if err != nil {
		return err
	}
	s.h = h
	switch tables := divUp(h.capacity, vmdkTableGrains*h.grain); {
	case h.flags&vmdkCompressed == 0, h.flags&vmdkMarkers == 0:
		return unsupported("a sparse VMDK, but not a streamOptimized one")
	case h.entries != vmdkTableGrains:
		return unsupported("grain tables of %d entries", h.entries)
	case h.grain < streamMinGrain, h.grain > vmdkMaxPacked:
		return unsupported("compressed grains of %d bytes", h.grain)
	case tables > streamMaxTables:
		return unsupported("a disk of %d bytes in grains of %d", h.capacity, h.grain)
	case h.descLen == 0:
		return unsupported("a stream without a descriptor")
	default:
		s.tables = newStreamTables(tables, h.flags&vmdkZeroGrains != 0)
	}
	if err := s.descriptor(); err != nil {
		return err
	}
	if h.directory != vmdkAtEnd && h.directory < h.grainsAt {
		if err := s.frontTables(); err != nil {
			return err
		}
	}
	return s.skipTo(max(s.at, h.grainsAt))
}

// descriptor reads the embedded descriptor, which knows the exact size of the disk: the capacity
// in the header may be rounded up to a whole grain.
func (s *VMDKStream) descriptor() error {
	if s.h.descAt < sector {
		return corrupt("a descriptor at byte %d", s.h.descAt)
	}
	if err := s.skipTo(s.h.descAt); err != nil {
		return err
	}
	raw := make([]byte, s.h.descLen) // at most vmdkMaxText
	if err := s.read(raw); err != nil {
		return err
	}
	t, err := parseVMDKText(raw)
	switch {
	case err != nil:
		return err
	case !strings.EqualFold(t.createType, "streamOptimized"):
		return unsupported("createType %q instead of streamOptimized", t.createType)
	case t.parentCID != vmdkNoParent:
		return unsupported("a stream with the parent %q", t.parent)
	case len(t.extents) != 1 || t.extents[0].kind != "SPARSE":
		return unsupported("an embedded descriptor with other extents than the file itself")
	}
	if s.size = t.extents[0].sectors * sector; s.size > s.h.capacity || s.h.capacity-s.size >= s.h.grain {
		return corrupt("has %d sectors, but the descriptor says %d", s.h.capacity/sector, t.extents[0].sectors)
	}
	return nil
}

// frontTables reads the grain directory and the tables that come before the grains. Their copies,
// the redundant ones, are passed over.
func (s *VMDKStream) frontTables() error {
	s.tables.front = true
	places, err := s.directoryAt(s.h.directory)
	if err != nil {
		return err
	}
	for i, place := range places {
		if s.tables.none(place) {
			continue
		}
		if err := s.skipTo(int64(place) * sector); err != nil {
			return err
		}
		sum, err := s.table()
		if err != nil {
			return err
		}
		s.tables.name(uint32(i), sum)
	}
	if s.at > s.h.grainsAt {
		return corrupt("the grain tables reach to %d, into the grains at %d", s.at, s.h.grainsAt)
	}
	return nil
}

// directoryAt reads the grain directory at a place ahead.
func (s *VMDKStream) directoryAt(at int64) ([]uint32, error) {
	if err := s.skipTo(at); err != nil {
		return nil, err
	}
	// It grows as it comes: the header alone makes nothing large.
	var places []uint32
	var b [sector]byte
	for left := s.tables.count; left > 0; left -= sector / 4 {
		if err := s.read(b[:]); err != nil {
			return nil, err
		}
		for i := range min(left, sector/4) {
			places = append(places, binary.LittleEndian.Uint32(b[i*4:]))
		}
	}
	return places, nil
}

func (s *VMDKStream) table() (uint64, error) {
	b := &s.tables.read
	if err := s.read(b[:]); err != nil {
		return 0, err
	}
	return s.tables.sum(b), nil
}

// read fills p; an end of the stream is an error.
func (s *VMDKStream) read(p []byte) error {
	n, err := io.ReadFull(s.in, p)
	s.at += int64(n)
	return err
}

func (s *VMDKStream) skipTo(at int64) error {
	if at < s.at {
		return unsupported("what belongs at byte %d comes behind byte %d: this is no stream", at, s.at)
	}
	for s.at < at {
		n, err := s.in.Discard(int(min(at-s.at, mib)))
		s.at += int64(n)
		if err != nil {
			return err
		}
	}
	return nil
}

// Next gives the next grain: its place on the disk, and in p, which has room for GrainSize, its
// bytes on the disk. Grains ascend. io.EOF means that the disk is whole.
func (s *VMDKStream) Next(p []byte) (off int64, n int, err error) {
	off, packed, err := s.NextPacked(func(n int) ([]byte, error) {
		if cap(s.packed) < n {
			s.packed = make([]byte, s.MaxPacked())
		}
		return s.packed[:n], nil
	})
	if err != nil {
		return 0, 0, err
	}
	n = int(min(s.h.grain, s.size-off))
	return off, n, s.Unpack(p[:n], packed, off)
}

// NextPacked is Next without unpacking. room gives a buffer of n bytes, at most MaxPacked; it may
// wait, and an error of it is passed on.
func (s *VMDKStream) NextPacked(room func(n int) ([]byte, error)) (off int64, packed []byte, err error) {
	if s.err != nil {
		return 0, nil, s.err
	}
	for err == nil && packed == nil {
		off, packed, err = s.step(room)
	}
	if err != nil {
		if err != io.EOF || s.phase != streamEnd {
			err = s.wrap(err)
		}
		s.err = err
	}
	return off, packed, err
}

// step takes a grain, or something else: then packed is nil.
func (s *VMDKStream) step(room func(n int) ([]byte, error)) (off int64, packed []byte, err error) {
	b, err := s.in.Peek(streamMarker + 4)
	if err == io.EOF && len(b) == 0 && s.Complete() {
		s.phase = streamEnd // QEMU makes no marker behind a last grain that does not shrink
		return 0, nil, io.EOF
	}
	if err != nil {
		return 0, nil, err
	}
	value, n, kind := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
	if n == 0 {
		return 0, nil, s.marker(value, kind)
	}
	if err := s.checkGrain(value, int64(n)); err != nil {
		return 0, nil, err
	}
	off, place := int64(value)*sector, s.at/sector
	if packed, err = room(int(n)); err != nil {
		return 0, nil, err
	}
	if err := s.skipTo(s.at + streamMarker); err != nil {
		return 0, nil, err
	}
	if err := s.read(packed); err != nil {
		return 0, nil, err
	}
	if err := s.skipTo(roundUp(s.at, sector)); err != nil {
		return 0, nil, err
	}
	s.next = off + s.h.grain
	return off, packed, s.tables.grain(off/s.h.grain, place)
}

// checkGrain checks what the marker of a grain says: its sector on the disk, and its packed length.
func (s *VMDKStream) checkGrain(at uint64, n int64) error {
	if s.phase != streamGrains {
		return corrupt("a grain behind the grain directory")
	}
	if at >= uint64(divUp(s.size, sector)) {
		return corrupt("a grain for sector %d of a disk of %d bytes", at, s.size)
	}
	off := int64(at) * sector
	switch {
	case off%s.h.grain != 0:
		return corrupt("a grain for sector %d, in the middle of one", at)
	case off == s.next-s.h.grain && s.next > 0:
		return corrupt("two grains for sector %d", at)
	case off < s.next:
		return unsupported("the grain for sector %d comes behind that for sector %d: only a file can be read like that", at, (s.next-s.h.grain)/sector)
	case n > int64(s.MaxPacked()):
		return corrupt("a grain of %d compressed bytes", n)
	case s.at > streamMaxFile:
		return corrupt("a grain at byte %d", s.at)
	}
	return nil
}

// marker takes a marker with what belongs to it: sectors of metadata. Nothing is said of the rest of its
// sector; VMware's own writer leaves there what was in its buffer.
func (s *VMDKStream) marker(sectors uint64, kind uint32) error {
	if err := s.skipTo(s.at + sector); err != nil {
		return err
	}
	switch kind {
	case vmdkMarkTable:
		if err := s.expect("grain table", streamGrains, sectors, streamGTSectors); err != nil {
			return err
		}
		return s.backTable()
	case vmdkMarkDir:
		if err := s.expect("grain directory", streamGrains, sectors, divUp(s.tables.count*4, sector)); err != nil {
			return err
		}
		return s.backDirectory()
	case vmdkMarkFooter:
		if err := s.expect("footer", streamDirectory, sectors, 1); err != nil {
			return err
		}
		return s.footer()
	case vmdkMarkProgress, vmdkMarkEnd:
		if sectors != 0 {
			return corrupt("a marker of type %d with %d sectors", kind, sectors)
		}
		if kind == vmdkMarkProgress {
			return nil
		}
		return s.end()
	}
	return unsupported("a marker of type %d", kind)
}

// expect checks that metadata comes when it should, and in its size.
func (s *VMDKStream) expect(what string, phase streamPhase, sectors uint64, want int64) error {
	if s.phase != phase || s.tables.front {
		return corrupt("a %s where none belongs", what)
	}
	if sectors != uint64(want) {
		return corrupt("a %s of %d sectors instead of %d", what, sectors, want)
	}
	return nil
}

func (s *VMDKStream) backTable() error {
	at := s.at
	sum, err := s.table()
	if err != nil {
		return err
	}
	return s.tables.came(at/sector, sum)
}

func (s *VMDKStream) backDirectory() error {
	s.dirAt = s.at
	if s.h.directory != vmdkAtEnd && s.h.directory != s.dirAt {
		return corrupt("the grain directory is at %d, but the header says %d", s.dirAt, s.h.directory)
	}
	places, err := s.directoryAt(s.dirAt)
	if err != nil {
		return err
	}
	s.phase = streamDirectory
	return s.tables.directory(places)
}

func (s *VMDKStream) footer() error {
	var b [sector]byte
	if err := s.read(b[:]); err != nil {
		return err
	}
	foot, err := parseSparseHeader(b[:], streamMaxFile)
	if err == nil {
		err = s.h.take(foot)
	}
	if err != nil {
		return fmt.Errorf("footer: %w", err)
	}
	if s.h.directory != s.dirAt {
		return corrupt("the grain directory is at %d, but the footer says %d", s.dirAt, s.h.directory)
	}
	s.phase = streamFooter
	return nil
}

// end takes what is behind the marker of the end: zeros at most.
func (s *VMDKStream) end() error {
	switch {
	case s.tables.front:
		if err := s.tables.finish(); err != nil {
			return err
		}
	case s.phase == streamGrains:
		return corrupt("no grain directory before the end")
	case s.h.directory == vmdkAtEnd:
		return corrupt("no footer before the end")
	}
	s.phase = streamEnd
	for began := s.at; ; {
		b, err := s.in.Peek(1)
		if err != nil {
			return err // io.EOF, where all is well
		}
		b, _ = s.in.Peek(s.in.Buffered())
		for i := range b {
			if b[i] != 0 {
				return corrupt("something behind the end")
			}
		}
		if err := s.skipTo(s.at + int64(len(b))); err != nil {
			return err
		}
		if s.at-began > streamMaxPadding {
			return corrupt("%d bytes behind the end", s.at-began)
		}
	}
}

// Complete says whether all of the disk came, so that the stream may end here. It is true with the
// marker of the end, and where the tables came first also with the last grain that they name.
// It is meant for what the stream reads from: when that is asked for more, it tells an end from
// a connection that was lost.
func (s *VMDKStream) Complete() bool {
	return s.phase == streamEnd || s.tables.front && s.tables.finish() == nil
}

// Unpack unpacks a grain that NextPacked gave: dst has the bytes that the disk has of it.
func (s *VMDKStream) Unpack(dst, packed []byte, off int64) error {
	u := s.work.Get().(*unpacker)
	own := u.in
	u.in = packed
	defer func() {
		u.in = own
		u.src.Reset(nil) // packed is the caller's
		s.work.Put(u)
	}()
	whole := dst
	if int64(len(dst)) < s.h.grain { // packed it may be longer
		if u.out == nil {
			u.out = make([]byte, s.h.grain)
		}
		whole = u.out
	}
	n, err := u.unzlib(whole)
	if err == nil && n < len(dst) {
		err = fmt.Errorf("gives %d bytes only", n)
	}
	if err != nil {
		return fmt.Errorf("%s: the grain for byte %d of the disk: %w", s.name, off, corrupt("compressed data (%v)", err))
	}
	if len(whole) != len(dst) {
		copy(dst, whole)
	}
	return nil
}
