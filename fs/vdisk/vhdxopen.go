package vdisk

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// VHDXOptions says how to open a VHDX. The zero value is usable for images
// without a parent.
type VHDXOptions struct {
	// Name is what errors call the image.
	Name string
	// Parent opens the VHDX that a differencing image names, a *VHDXImage or
	// what forwards to one. It decides which of the names are acceptable. The
	// image does not close what it returns. When nil, an image with a parent is
	// ErrRefused.
	Parent func(ParentLocator) (Source, error)
	// TableCache bounds the memory for the BAT and sector bitmaps, in bytes; 0
	// means 4 MiB, which covers 16 TiB of disk in blocks of 32 MiB.
	TableCache int64
}

// GUID is in the byte order of the file: the first three fields little-endian
// (MS-DTYP §2.3.4.2).
type GUID [16]byte

func (g GUID) String() string {
	return fmt.Sprintf("{%08x-%04x-%04x-%x-%x}", binary.LittleEndian.Uint32(g[:]),
		binary.LittleEndian.Uint16(g[4:]), binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:])
}

const (
	// The longest log that is replayed: it is held in memory. Windows and QEMU
	// make logs of 1 MiB.
	vhdxMaxLog = 32 * mib
	// No file is longer, whatever an image says.
	maxFile = 1 << 62
)

// OpenVHDX opens an image of size bytes for reading: fixed, dynamic and
// differencing ones. A log that was not written back is replayed in memory,
// which takes up to four times its length (1 MiB as a rule, above 32 MiB it is
// ErrUnsupported); the file is never changed. Regions and metadata that are unknown here and marked as
// required are ErrUnsupported. An image that fails a checksum, contradicts
// itself or points outside of itself is ErrCorrupt, at the latest when the
// place is read; so is one whose parent has been written to since.
func OpenVHDX(r io.ReaderAt, size int64, opts VHDXOptions) (*VHDXImage, error) {
	if opts.Name == "" {
		opts.Name = "vhdx image"
	}
	v, err := openVHDX(r, size, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", opts.Name, err)
	}
	return v, nil
}

func openVHDX(r io.ReaderAt, size int64, opts VHDXOptions) (*VHDXImage, error) {
	if b, err := vhdxRead(r, 0, 8, size); err != nil || string(b) != vhdxMagic {
		return nil, errors.Join(err, corrupt("not a VHDX"))
	}
	head, err := readVHDXHeader(r, size)
	if err != nil {
		return nil, err
	}
	// Everything but the headers may be in the log only.
	if head.log != (GUID{}) {
		replayed, err := replayVHDXLog(r, size, head)
		if err != nil {
			return nil, fmt.Errorf("log: %w", err)
		}
		r, size = replayed, replayed.size
	}
	regions, err := readVHDXRegions(r, size)
	if err != nil {
		return nil, err
	}
	regions.log = extent.Extent{Off: head.logAt, Len: head.logLen}
	if err := regions.apart(); err != nil {
		return nil, err
	}
	meta, err := readVHDXMetadata(r, size, regions.meta)
	if err != nil {
		return nil, err
	}
	v, err := newVHDXImage(r, size, head, regions, meta, opts)
	if err != nil || !meta.hasParent {
		return v, err
	}
	return v, v.openParent(meta.locator, opts.Parent)
}

// vhdxRead gives n bytes at off; past the end of the file is corrupt.
func vhdxRead(r io.ReaderAt, off, n, size int64) ([]byte, error) {
	if off > size || n > size-off {
		return nil, corrupt("%d bytes at %d lie past the end of the file at %d", n, off, size)
	}
	b := make([]byte, n)
	_, err := readFull(r, b, off)
	return b, err
}

// goodSum checks a CRC-32C at +4 that covers all of b with itself as zero, and
// leaves it zero.
func goodSum(b []byte) bool {
	want := binary.LittleEndian.Uint32(b[4:])
	clear(b[4:8])
	return castagnoli(b) == want
}

// vhdxHead is what the reader needs of the current header.
type vhdxHead struct {
	dataWrite GUID
	log       GUID // zero: nothing to replay
	logAt     int64
	logLen    int64
}

// readVHDXHeader reads both headers; the current one is the valid one with the
// larger sequence number (MS-VHDX §2.2.2).
func readVHDXHeader(r io.ReaderAt, size int64) (vhdxHead, error) {
	var current []byte
	for _, at := range []int64{vhdxHeader1, vhdxHeader2} {
		b, err := vhdxRead(r, at, 4*kib, size)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return vhdxHead{}, fmt.Errorf("reading the header: %w", err)
		}
		if err != nil || string(b[:4]) != "head" || !goodSum(b) {
			continue
		}
		if current == nil {
			current = b
			continue
		}
		switch a, z := vhdxSequence(current), vhdxSequence(b); {
		case z > a:
			current = b
		case z == a && string(b) != string(current):
			return vhdxHead{}, corrupt("two different headers with the sequence number %d", a)
		}
	}
	if current == nil {
		return vhdxHead{}, corrupt("both headers are damaged")
	}
	return parseVHDXHeader(current, size)
}

func vhdxSequence(header []byte) uint64 { return binary.LittleEndian.Uint64(header[8:]) }

// parseVHDXHeader: the layout is at vhdxHeader.
func parseVHDXHeader(b []byte, size int64) (vhdxHead, error) {
	le := binary.LittleEndian
	h := vhdxHead{dataWrite: GUID(b[32:]), log: GUID(b[48:])}
	if v := le.Uint16(b[66:]); v != 1 {
		return h, unsupported("VHDX version %d", v)
	}
	if v := le.Uint16(b[64:]); v != 0 && h.log != (GUID{}) {
		return h, unsupported("log version %d", v)
	}
	at, n := le.Uint64(b[72:]), int64(le.Uint32(b[68:]))
	if n%mib != 0 || at%mib != 0 || n > 0 && (at < mib || at > uint64(size) || n > size-int64(at)) {
		return h, corrupt("log of %d bytes at %d in a file of %d bytes", n, at, size)
	}
	if n > 0 {
		h.logAt, h.logLen = int64(at), n
	}
	return h, nil
}

// vhdxRegions is where things are.
type vhdxRegions struct{ bat, meta, log extent.Extent }

// readVHDXRegions reads the region table, or its copy when it is damaged
// (MS-VHDX §2.2.3; the layout is at vhdxRegionTable).
func readVHDXRegions(r io.ReaderAt, size int64) (vhdxRegions, error) {
	for _, at := range []int64{vhdxRegions1, vhdxRegions2} {
		b, err := vhdxRead(r, at, 64*kib, size)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return vhdxRegions{}, fmt.Errorf("reading the region table: %w", err)
		}
		if err == nil && string(b[:4]) == "regi" && goodSum(b) {
			return parseVHDXRegions(b, size)
		}
	}
	return vhdxRegions{}, corrupt("both region tables are damaged")
}

const vhdxMaxEntries = 2047 // of the region table and of the metadata table

func parseVHDXRegions(b []byte, size int64) (vhdxRegions, error) {
	var found vhdxRegions
	le := binary.LittleEndian
	n := le.Uint32(b[8:])
	if n > vhdxMaxEntries {
		return found, corrupt("%d regions", n)
	}
	for i := range n {
		e := b[16+32*i:]
		var place *extent.Extent
		switch g := GUID(e); {
		case g == GUID(guid(vhdxBATRegion)):
			place = &found.bat
		case g == GUID(guid(vhdxMetaRegion)):
			place = &found.meta
		case le.Uint32(e[28:])&1 != 0:
			return found, unsupported("required region %v", g)
		default:
			continue
		}
		at, length := le.Uint64(e[16:]), int64(le.Uint32(e[24:]))
		if place.Len != 0 || length == 0 || length%mib != 0 || at%mib != 0 || at < mib ||
			at > uint64(size) || length > size-int64(at) {
			return found, corrupt("region %v of %d bytes at %d in a file of %d bytes", GUID(e), length, at, size)
		}
		*place = extent.Extent{Off: int64(at), Len: length}
	}
	if found.bat.Len == 0 || found.meta.Len == 0 {
		return found, corrupt("a region is missing")
	}
	return found, nil
}

func (g vhdxRegions) apart() error {
	for _, pair := range [][2]extent.Extent{{g.bat, g.meta}, {g.bat, g.log}, {g.meta, g.log}} {
		if !extent.Intersect(pair[0], pair[1]).Empty() {
			return corrupt("regions overlap: %v and %v", pair[0], pair[1])
		}
	}
	return nil
}

// covers says whether any region has a part of e.
func (g vhdxRegions) covers(e extent.Extent) bool {
	return !extent.Intersect(g.bat, e).Empty() || !extent.Intersect(g.meta, e).Empty() || !extent.Intersect(g.log, e).Empty()
}

// vhdxMetaItems is what the reader needs of the metadata.
type vhdxMetaItems struct {
	block     int64 // bytes
	disk      int64 // bytes
	sector    int64 // logical, bytes
	hasParent bool
	locator   []byte // of a parent
}

// readVHDXMetadata: MS-VHDX §2.6; the layout is at vhdxMetadata.
func readVHDXMetadata(r io.ReaderAt, size int64, region extent.Extent) (vhdxMetaItems, error) {
	table, err := vhdxRead(r, region.Off, 64*kib, size)
	if err != nil {
		return vhdxMetaItems{}, fmt.Errorf("reading the metadata: %w", err)
	}
	n := binary.LittleEndian.Uint16(table[10:])
	if string(table[:8]) != "metadata" || n > vhdxMaxEntries {
		return vhdxMetaItems{}, corrupt("metadata table at %d", region.Off)
	}
	items := map[string][]byte{} // id, one of the constants => value
	for i := range int(n) {
		id, value, err := vhdxItem(r, region, table[32+32*i:], size)
		if err != nil {
			return vhdxMetaItems{}, err
		}
		if id == "" {
			continue
		}
		// The size may be there under both of its ids.
		if before, ok := items[id]; ok && (id != vhdxDiskSize || string(before) != string(value)) {
			return vhdxMetaItems{}, corrupt("metadata item %s twice", id)
		}
		items[id] = value
	}
	return parseVHDXMetadata(items)
}

// vhdxItem reads the item of one entry of the metadata table. The id is empty
// for an item that does not matter here.
func vhdxItem(r io.ReaderAt, region extent.Extent, e []byte, size int64) (id string, value []byte, err error) {
	le := binary.LittleEndian
	flags := le.Uint32(e[24:])
	const user, required = 1, 4
	id = vhdxKnownItem(GUID(e))
	if id == "" || flags&user != 0 {
		if flags&required != 0 {
			return "", nil, unsupported("required metadata item %v", GUID(e))
		}
		return "", nil, nil
	}
	at, n := int64(le.Uint32(e[16:])), int64(le.Uint32(e[20:]))
	longest := int64(16)
	if id == vhdxParentLocator {
		longest = mib
	}
	if at < vhdxItems || n > longest || at+n > region.Len {
		return "", nil, corrupt("metadata item %s of %d bytes at %d", id, n, at)
	}
	value, err = vhdxRead(r, region.Off+at, n, size)
	return id, value, err
}

// vhdxOtherDiskSize is what at least one writer takes for the id of the disk's
// size. MS-VHDX §2.6.2 (versions of 2018-09-12 and 2024-04-23) has vhdxDiskSize
// in its table of known items, which is also what QEMU writes and reads.
const vhdxOtherDiskSize = "2FA54224-CD1B-4876-B211-5BE07A6CE32C"

// vhdxKnownItem gives the constant for an id, empty when there is none.
func vhdxKnownItem(g GUID) string {
	for _, id := range []string{vhdxFileParameters, vhdxDiskSize, vhdxDiskID, vhdxLogicalSector, vhdxPhysicalSector, vhdxParentLocator} {
		if g == GUID(guid(id)) {
			return id
		}
	}
	if g == GUID(guid(vhdxOtherDiskSize)) {
		return vhdxDiskSize
	}
	return ""
}

func parseVHDXMetadata(items map[string][]byte) (vhdxMetaItems, error) {
	var m vhdxMetaItems
	le := binary.LittleEndian
	params, disk, logical := items[vhdxFileParameters], items[vhdxDiskSize], items[vhdxLogicalSector]
	if len(params) != 8 || len(disk) != 8 || len(logical) != 4 {
		return m, corrupt("metadata: a required item is missing or of a wrong length")
	}
	m.block, m.sector = int64(le.Uint32(params)), int64(le.Uint32(logical))
	flags := le.Uint32(params[4:])
	m.hasParent = flags&2 != 0 // bit 0 is for writers: leave blocks allocated
	if flags>>2 != 0 {
		return m, unsupported("file parameters %#x", flags)
	}
	if m.block < mib || m.block > 256*mib || m.block&(m.block-1) != 0 {
		return m, corrupt("blocks of %d bytes", m.block)
	}
	if m.sector != 512 && m.sector != 4096 {
		return m, corrupt("logical sectors of %d bytes", m.sector)
	}
	size := le.Uint64(disk)
	if size > vhdxMaxDisk || size%uint64(m.sector) != 0 {
		return m, corrupt("disk of %d bytes in sectors of %d", size, m.sector)
	}
	m.disk = int64(size)
	m.locator = items[vhdxParentLocator]
	return m, nil
}

// vhdxGUID parses "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}", braces optional.
func vhdxGUID(s string) (GUID, bool) {
	if len(s) == 38 && s[0] == '{' && s[37] == '}' {
		s = s[1:37]
	}
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return GUID{}, false
	}
	if _, err := hex.DecodeString(s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]); err != nil {
		return GUID{}, false
	}
	return guid(s), true
}
