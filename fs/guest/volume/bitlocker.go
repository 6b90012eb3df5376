package volume

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"iter"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// bitLocker is what a copy of a volume's BitLocker metadata says. There are three copies. The format is J. Metz's "BitLocker Drive
// Encryption (BDE) format specification" (libbde's documentation), here BDE.
type bitLocker struct {
	version     int   // 1: Windows Vista; 2: 7 and later
	sector      int64 // bytes
	method      bitLockerMethod
	uuid, label string
	protectors  []protector
	key         []byte // volume key, sealed by the master key
	covered     []byte // bytes that the hash is of
	hash        []byte // sealed by the master key; nil for none
	copies      []int64
	headerAt    int64 // where the first bytes of what is hidden are; version 2
	header      int64 // how many of them, bytes
	encrypted   int64 // bytes from the start on; the others are as they are
	mirror      int64 // cluster of the MFT's mirror; version 1
	refused     error // why it cannot be opened even with a key
}

// bitLockerMethod is a way of encryption (BDE, "Encryption methods").
type bitLockerMethod struct {
	number uint16
	name   string // as Windows' manage-bde names it
	cipher string // as dm-crypt names it
	key    int    // bytes of each of its keys
}

var bitLockerMethods = []bitLockerMethod{
	{0x8000, "AES 128 with Diffuser", "aes-cbc-elephant", 16},
	{0x8001, "AES 256 with Diffuser", "aes-cbc-elephant", 32},
	{0x8002, "AES 128", "aes-cbc-eboiv", 16},
	{0x8003, "AES 256", "aes-cbc-eboiv", 32},
	{0x8004, "XTS-AES 128", "aes-xts-plain64", 16},
	{0x8005, "XTS-AES 256", "aes-xts-plain64", 32},
}

// The bounds of what metadata may hold, and the sizes of its regions (BDE, "Metadata files").
const (
	maxProtectors   = 64
	bitLockerRegion = 64 << 10 // bytes
	bitLockerVista  = 16 << 10 // bytes
	bitLockerBoot   = 8 << 10  // bytes that Vista does not encrypt
	bitLockerSign   = "-FVE-FS-"
	bitLockerGUID   = "\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01"
	// While the volume is converted, from Windows 8 on. BDE takes it for that of volumes of which only the used space is encrypted; libbde
	// issue 69 has it right.
	bitLockerConvertGUID = "\x3b\x4d\xa8\x92\x80\xdd\x0e\x4d\x9e\x4e\xb1\xe3\x28\x4e\xae\xd8"
	bitLockerToGoAt      = 424 // of the GUID in a boot sector that looks like FAT32
)

// isToGo reports whether a boot sector is that of BitLocker To Go, which has a FAT file system in front (BDE, "BitLocker To Go").
func isToGo(b []byte) bool {
	if len(b) < 512 || b[510] != 0x55 || b[511] != 0xaa {
		return false
	}
	id := string(b[bitLockerToGoAt : bitLockerToGoAt+16])
	return id == bitLockerGUID || id == bitLockerConvertGUID
}

func isSector(n int64) bool { return n >= 512 && n <= 4096 && n&(n-1) == 0 }

// bitLockerPlaces reads a boot sector (BDE, "Volume header"): the size of sectors, which one in front of exFAT does not have (libbde issues 52
// and 79), and where copies of the metadata are.
func bitLockerPlaces(b []byte) (sector int64, copies []int64, refused error, err error) {
	le := binary.LittleEndian
	sector = int64(le.Uint16(b[11:]))
	if sector != 0 && !isSector(sector) {
		return 0, nil, nil, guest.Damaged("BitLocker: sectors of %d bytes", sector)
	}
	at := 160
	if isToGo(b) {
		at = bitLockerToGoAt
	}
	switch string(b[at : at+16]) {
	case bitLockerConvertGUID:
		refused = guest.Unsupported("BitLocker: in the middle of a conversion; let Windows end it")
	case bitLockerGUID:
	default:
		if string(b[:3]) != "\xeb\x52\x90" {
			return 0, nil, nil, guest.Unsupported("BitLocker: a boot sector of an unknown kind")
		}
		// Vista, by cluster. More than 128 sectors are a negative power of two, as in NTFS.
		cluster := uint64(b[13])
		if cluster > 128 {
			cluster = 1 << (256 - cluster) & (1<<20 - 1)
		}
		n, size := le.Uint64(b[56:]), cluster*uint64(sector)
		if size == 0 || n == 0 || n > 1<<62/size {
			return 0, nil, nil, guest.Damaged("BitLocker: metadata at cluster %d of %d bytes", n, size)
		}
		return sector, []int64{int64(n * size)}, nil, nil
	}
	for i := range 3 {
		copies = append(copies, int64(le.Uint64(b[at+16+8*i:])))
	}
	return sector, copies, refused, nil
}

// readBitLocker reads the copies of the metadata that are whole and differ, the first of them first, which also says when
// none is to be opened; bad is why another one is not used.
func readBitLocker(dev guest.Device) (all []*bitLocker, bad, err error) {
	boot := make([]byte, 512)
	if err := guest.ReadFull(dev, boot, 0); err != nil {
		return nil, nil, err
	}
	sector, places, refused, err := bitLockerPlaces(boot)
	if err != nil {
		return nil, nil, err
	}
	vista := len(places) == 1
	for i := 0; i < len(places); i++ {
		b, err := bitLockerBlock(dev, places[i])
		if err == nil && vista && i == 0 {
			places = append(places, others(b, places[0])...)
		}
		var h *bitLocker
		if err == nil {
			h, err = parseBitLocker(b, places[i], sector)
		}
		if err != nil {
			bad = err
			continue
		}
		if !slices.ContainsFunc(all, func(o *bitLocker) bool { return bytes.Equal(o.covered, h.covered) }) {
			all = append(all, h)
		}
	}
	if len(all) == 0 {
		return nil, nil, fmt.Errorf("none of the copies of BitLocker's metadata is good: %w", bad)
	}
	for _, h := range all[1:] {
		if o := all[0]; h.encrypted != o.encrypted || h.headerAt != o.headerAt || h.header != o.header || h.method != o.method {
			refused = guest.Unsupported("BitLocker: the copies of its metadata tell different things")
		}
	}
	if refused != nil {
		all[0].refused = refused
	}
	return all, bad, nil
}

// others are the places of the further copies that a block names.
func others(b []byte, first int64) (at []int64) {
	for i := range 3 {
		if n := int64(binary.LittleEndian.Uint64(b[32+8*i:])); n != first {
			at = append(at, n)
		}
	}
	return at
}

// bitLockerBlock reads one copy of the metadata, with the bytes behind it.
func bitLockerBlock(dev guest.Device, at int64) ([]byte, error) {
	const least = 64 + 48 + 8
	if at <= 0 || at > dev.Size()-least {
		return nil, guest.Damaged("BitLocker: metadata at %d", at)
	}
	b := make([]byte, min(bitLockerRegion, dev.Size()-at))
	if err := guest.ReadFull(dev, b, at); err != nil {
		return nil, err
	}
	if string(b[:8]) != bitLockerSign {
		return nil, guest.Damaged("BitLocker: no metadata at %d", at)
	}
	return b, nil
}

// parseBitLocker reads a copy of the metadata, little-endian (BDE, "FVE metadata block"). The unit of its size and what is behind it are
// not in that document; they are so in all volumes of Windows that cryptsetup's tests have.
//
//	0 "-FVE-FS-" | 8 size 2, in 16 bytes; bytes in version 1 | 10 version 2 | 12 state 2 | 14 next state 2 | 16 encrypted bytes 8 | 24 being
//	converted? 4 | 28 sectors of the header 4 | 32 offsets of the copies 3*8 | 56 offset of the header 8, or the cluster of the MFT's mirror
//	64 size from here 4 | 68 version 4 | 72 own size 4 | 76 size again 4 | 80 GUID 16 | 96 counter 4 | 100 method 2 | 104 time 8 | 112 datums
//	size: its own size 2 | 2 version 2 | 4 CRC-32 of all before 4 | 8 a datum: SHA-256 of all before, sealed by the master key
func parseBitLocker(b []byte, at, sector int64) (*bitLocker, error) {
	le := binary.LittleEndian
	h := &bitLocker{version: int(le.Uint16(b[10:])), sector: sector, uuid: strings.ToLower(GUID(b[80:96]))}
	size, set := int64(le.Uint16(b[8:])), int64(le.Uint32(b[64:]))
	if h.version == 2 {
		size *= 16
	}
	switch {
	case h.version != 1 && h.version != 2, h.version == 1 && sector == 0:
		return nil, guest.Unsupported("BitLocker: metadata of version %d", h.version)
	case h.version == 1 && (size < 64+set || size > int64(len(b))):
		size = 64 + set
	}
	if set < 48 || size < 64+set || size > int64(len(b)-8) {
		return nil, guest.Damaged("BitLocker: metadata of %d bytes in %d", set, size)
	}
	for i := range 3 {
		h.copies = append(h.copies, int64(le.Uint64(b[32+8*i:])))
	}
	if !slices.Contains(h.copies, at) {
		return nil, guest.Damaged("BitLocker: metadata of another place, at %d", at)
	}
	h.covered = b[:size:size]
	i := slices.IndexFunc(bitLockerMethods, func(m bitLockerMethod) bool { return m.number == le.Uint16(b[100:]) })
	if i < 0 {
		h.refused = guest.Unsupported("BitLocker: the method %#04x", le.Uint16(b[100:]))
	} else {
		h.method = bitLockerMethods[i]
	}
	if h.version == 1 {
		h.mirror, h.encrypted = int64(le.Uint64(b[56:])), 1<<62
		return h, h.entries(b[112 : 64+set])
	}
	if crc32.ChecksumIEEE(h.covered) != le.Uint32(b[size+4:]) {
		return nil, guest.Damaged("BitLocker: the checksum of the metadata at %d", at)
	}
	for d := range datums(b[size+8:]) {
		if d.kind == datumSealed {
			h.hash = d.data
		}
		break
	}
	sectors := int64(le.Uint32(b[28:]))
	h.encrypted, h.headerAt, h.header = int64(le.Uint64(b[16:])), int64(le.Uint64(b[56:])), sectors*sector
	if h.refused == nil && (le.Uint32(b[24:]) != 0 || h.encrypted == 0) {
		h.refused = guest.Unsupported("BitLocker: in the middle of a conversion; let Windows end it")
	}
	err := h.entries(b[112 : 64+set])
	if h.sector == 0 {
		h.sector = h.header / max(1, sectors)
	}
	if err == nil && !isSector(h.sector) {
		err = guest.Damaged("BitLocker: %d sectors of %d bytes", sectors, h.header)
	}
	return h, err
}

// The kinds of datums (BDE, "FVE metadata value types") and what those at the top are for ("FVE metadata entry types").
const (
	datumKey       = 1
	datumText      = 2
	datumStretch   = 3
	datumSealed    = 5
	datumProtector = 8
	datumExternal  = 9
	datumPlace     = 15

	roleVolumeKey = 3
	roleLabel     = 7
)

// datum is an entry of the metadata, little-endian:
//
//	0 size 2 | 2 role 2 | 4 kind 2 | 6 version 2 | 8 data
type datum struct {
	role, kind uint16
	data       []byte
}

// datums are those in b, up to what is none.
func datums(b []byte) iter.Seq[datum] {
	return func(yield func(datum) bool) {
		le := binary.LittleEndian
		for len(b) >= 8 {
			n := int(le.Uint16(b))
			if n < 8 || n > len(b) || !yield(datum{le.Uint16(b[2:]), le.Uint16(b[4:]), b[8:n]}) {
				return
			}
			b = b[n:]
		}
	}
}

// entries reads the datums at the top.
func (h *bitLocker) entries(b []byte) error {
	for d := range datums(b) {
		switch {
		case d.kind == datumText && d.role == roleLabel:
			h.label = utf16Text(d.data)
		case d.kind == datumSealed && d.role == roleVolumeKey:
			h.key = d.data
		case d.kind == datumPlace && len(d.data) >= 16 && h.version > 1:
			h.headerAt, h.header = int64(binary.LittleEndian.Uint64(d.data)), int64(binary.LittleEndian.Uint64(d.data[8:]))
		case d.kind == datumProtector && len(d.data) >= 28 && len(h.protectors) < maxProtectors:
			h.protectors = append(h.protectors, newProtector(d.data))
		}
	}
	if h.key == nil {
		return guest.Damaged("BitLocker: metadata without the volume's key")
	}
	return nil
}

// String says what a person needs to know to find the right key.
func (h *bitLocker) String() string {
	const most = 8
	var names []string
	for i, p := range h.protectors {
		if i == most {
			names = append(names, fmt.Sprintf("%d more", len(h.protectors)-most))
			break
		}
		names = append(names, p.String())
	}
	if len(names) == 0 {
		names = []string{"no protectors"}
	}
	return strings.TrimSpace("BitLocker "+h.method.name) + " (" + strings.Join(names, ", ") + ")"
}
