package vdisk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
)

// QCOW2Options says how to open a qcow2 image. The zero value is usable for
// images without a backing file.
type QCOW2Options struct {
	// Name is what errors call the image.
	Name string
	// Backing opens the backing file an image names. format is "raw", "qcow2",
	// another word, or "" when the image does not say. It decides which names
	// are acceptable. The image does not close what it returns. When nil, an
	// image with a backing file is ErrRefused.
	Backing func(name, format string) (Source, error)
	// TableCache bounds the memory for L1 and L2 tables, in bytes; 0 means
	// 4 MiB, which covers 32 GiB of disk in clusters of 64 KiB. Compressed
	// images take up to 1 MiB more, or two clusters where that is larger.
	TableCache int64
}

// qcowHeaderFields is what the reader needs of a header: qcow2 specification,
// "Header" and "Header extensions". All integers are big-endian.
type qcowHeaderFields struct {
	version     uint32
	clusterBits uint32
	size        int64 // of the disk, bytes
	l1Entries   int64
	l1At        int64
	extendedL2  bool
	zstd        bool
	backing     string
	format      string // of the backing file
	headerLen   int64
	incompat    uint64
}

// Incompatible feature bits that have names; an image may name more.
const (
	qcowDirty        = 1 << 0 // refcounts may be wrong: reading needs none
	qcowCorrupt      = 1 << 1
	qcowExternalData = 1 << 2
	qcowCompression  = 1 << 3 // the compression type is not zlib
	qcowExtendedL2   = 1 << 4
)

// Header extension types.
const (
	qcowExtBackingFormat = 0xE2792ACA
	qcowExtFeatureNames  = 0x6803F857
)

// OpenQCOW2 opens an image of size bytes for reading: versions 2 and 3, zlib
// and zstd clusters, extended L2 entries, backing files. Encrypted images,
// external data files and features unknown here are ErrUnsupported. An image
// marked corrupt, or one that points outside of itself, is ErrCorrupt, at the
// latest when the place is read. Internal snapshots are ignored, and so are
// refcounts, which reading does not need: a dirty image is fine.
func OpenQCOW2(r io.ReaderAt, size int64, opts QCOW2Options) (*QCOW2Image, error) {
	if opts.Name == "" {
		opts.Name = "qcow2 image"
	}
	h, err := readQCOWHeader(r, size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", opts.Name, err)
	}
	q := newQCOW2Image(r, size, h, opts)
	if h.backing == "" {
		return q, nil
	}
	if opts.Backing == nil {
		return nil, fmt.Errorf("%s: has the backing file %q: %w", opts.Name, h.backing, ErrRefused)
	}
	if q.backing, err = opts.Backing(h.backing, h.format); err != nil {
		return nil, fmt.Errorf("%s: backing file %q: %w", opts.Name, h.backing, err)
	}
	return q, nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrCorrupt)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrUnsupported)...)
}

func readQCOWHeader(r io.ReaderAt, size int64) (h qcowHeaderFields, err error) {
	b := make([]byte, min(size, 112))
	if _, err := readFull(r, b, 0); err != nil {
		return h, fmt.Errorf("reading the header: %w", err)
	}
	if len(b) < 72 || string(b[:4]) != qcowMagic {
		return h, corrupt("not a qcow2 image")
	}
	be := binary.BigEndian
	h.version = be.Uint32(b[4:])
	h.clusterBits = be.Uint32(b[20:])
	if h.version != 2 && h.version != 3 {
		return h, unsupported("qcow2 version %d", h.version)
	}
	if h.clusterBits < 9 || h.clusterBits > 21 {
		return h, corrupt("clusters of 2^%d bytes (want 2^9 to 2^21)", h.clusterBits)
	}
	if m := be.Uint32(b[32:]); m != 0 {
		return h, unsupported("encrypted (method %d)", m)
	}
	h.headerLen = 72
	compression := byte(0)
	if h.version == 3 {
		if len(b) < 104 {
			return h, corrupt("header ends at %d", size)
		}
		h.incompat = be.Uint64(b[72:])
		h.headerLen = int64(be.Uint32(b[100:]))
		if h.headerLen < 104 || h.headerLen%8 != 0 || h.headerLen > min(h.cluster(), size) {
			return h, corrupt("header length %d", h.headerLen)
		}
		if h.headerLen > 104 {
			compression = b[104]
		}
	}
	first := make([]byte, min(h.cluster(), size))
	if _, err := readFull(r, first, 0); err != nil {
		return h, fmt.Errorf("reading the header: %w", err)
	}
	names, err := h.readExtensions(first, int64(be.Uint64(b[8:])))
	if err != nil {
		return h, err
	}
	if err := h.checkFeatures(names, compression); err != nil {
		return h, err
	}
	if err := h.readBackingName(first, be.Uint64(b[8:]), be.Uint32(b[16:])); err != nil {
		return h, err
	}
	return h, h.checkTables(be.Uint64(b[24:]), be.Uint32(b[36:]), be.Uint64(b[40:]), size)
}

func (h *qcowHeaderFields) cluster() int64 { return 1 << h.clusterBits }

// l2Entries is the number of clusters one L2 table maps.
func (h *qcowHeaderFields) l2Entries() int64 {
	if h.extendedL2 {
		return h.cluster() / 16
	}
	return h.cluster() / 8
}

// readExtensions takes the backing format and returns the names that the image
// gives to its incompatible features. Extensions are u32 type, u32 length, the
// data, padding to 8; they end at type 0 or where the backing file name begins.
func (h *qcowHeaderFields) readExtensions(first []byte, backingAt int64) (map[int]string, error) {
	names := map[int]string{} // bit => name
	b := first[h.headerLen:]
	if backingAt > h.headerLen && backingAt < int64(len(first)) {
		b = first[h.headerLen:backingAt]
	}
	for len(b) >= 8 {
		kind, n := binary.BigEndian.Uint32(b), int64(binary.BigEndian.Uint32(b[4:]))
		if kind == 0 {
			break
		}
		b = b[8:]
		if n > int64(len(b)) {
			return nil, corrupt("header extension %#08x of %d bytes leaves the header", kind, n)
		}
		switch kind {
		case qcowExtBackingFormat:
			h.format = string(b[:n])
		case qcowExtFeatureNames: // 48 bytes each: u8 type (0: incompatible), u8 bit, name
			for e := b[:n]; len(e) >= 48; e = e[48:] {
				if e[0] == 0 {
					names[int(e[1])] = string(bytes.TrimRight(e[2:48], "\x00"))
				}
			}
		}
		b = b[min(int64(len(b)), roundUp(n, 8)):]
	}
	return names, nil
}

func (h *qcowHeaderFields) checkFeatures(names map[int]string, compression byte) error {
	if h.incompat&qcowCorrupt != 0 {
		return corrupt("marked corrupt by its last writer")
	}
	if h.incompat&qcowExternalData != 0 {
		return unsupported("keeps its data in an external data file")
	}
	const known = qcowDirty | qcowCompression | qcowExtendedL2
	var unknown []string
	for bit := range 64 {
		if h.incompat&^known>>bit&1 == 0 {
			continue
		}
		if name := names[bit]; name != "" {
			unknown = append(unknown, fmt.Sprintf("%q", name))
		} else {
			unknown = append(unknown, fmt.Sprintf("bit %d", bit))
		}
	}
	if unknown != nil {
		return unsupported("incompatible features %s", strings.Join(unknown, ", "))
	}
	h.extendedL2 = h.incompat&qcowExtendedL2 != 0
	if h.extendedL2 && h.clusterBits < 14 {
		return corrupt("extended L2 entries with clusters of 2^%d bytes", h.clusterBits)
	}
	h.zstd = compression == 1
	if compression > 1 {
		return unsupported("compression type %d", compression)
	}
	if h.zstd != (h.incompat&qcowCompression != 0) {
		return corrupt("compression type %d contradicts the feature bits %#x", compression, h.incompat)
	}
	return nil
}

func (h *qcowHeaderFields) readBackingName(first []byte, at uint64, n uint32) error {
	if at == 0 || n == 0 {
		return nil
	}
	if n > 1023 || at < uint64(h.headerLen) || at > uint64(len(first)) || uint64(n) > uint64(len(first))-at {
		return corrupt("backing file name of %d bytes at %d", n, at)
	}
	h.backing = string(first[at : at+uint64(n)])
	if strings.ContainsRune(h.backing, 0) {
		return corrupt("backing file name %q", h.backing)
	}
	return nil
}

// checkTables makes sure that the L1 table covers the disk and lies in the file.
func (h *qcowHeaderFields) checkTables(disk uint64, l1Entries uint32, l1At uint64, size int64) error {
	if disk > 1<<62 {
		return corrupt("disk of %d bytes", disk)
	}
	h.size, h.l1Entries, h.l1At = int64(disk), int64(l1Entries), int64(l1At)
	if h.l1Entries > qcowMaxL1/8 {
		return corrupt("L1 table of %d entries", h.l1Entries)
	}
	covered := h.l1Entries * h.l2Entries() // clusters; at most 2^22 * 2^18
	if need := divUp(h.size, h.cluster()); need > covered {
		return corrupt("L1 table of %d entries for a disk of %d bytes", h.l1Entries, h.size)
	}
	if h.l1Entries > 0 && (l1At%uint64(h.cluster()) != 0 || l1At > uint64(size) || h.l1Entries*8 > size-h.l1At) {
		return corrupt("L1 table at %d in a file of %d bytes", l1At, size)
	}
	return nil
}
