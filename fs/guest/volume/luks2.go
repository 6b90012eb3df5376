package volume

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// luks2Second are where the second header may be (LUKS2 On-Disk Format §2.1).
var luks2Second = []int64{0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000, 0x400000}

// readLUKS2 reads the newer of the two headers, or the one that is whole.
func readLUKS2(dev guest.Device) (*luksHeader, error) {
	best, area, seq, err := luks2Header(dev, 0, luksMagic)
	damaged := err != nil
	places := luks2Second
	if err == nil {
		places = []int64{int64(binary.BigEndian.Uint64(best[8:]))}
	}
	for _, at := range places {
		b, a, s, e := luks2Header(dev, at, luksSecond)
		if e == nil && (err != nil || s > seq) {
			best, area, seq, err = b, a, s, nil
		}
	}
	if err != nil {
		return nil, err
	}
	h, err := parseLUKS2(best, area)
	if h != nil {
		h.damaged = damaged
	}
	return h, err
}

// luks2Header reads one header and checks it (LUKS2 On-Disk Format §2.1), big-endian:
//
//	0 magic 6 | 6 version 2 | 8 size with the JSON area 8 | 16 sequence 8 | 24 label 48 | 72 checksum's algorithm 32 | 104 salt 64
//	168 UUID 40 | 208 subsystem 48 | 256 own offset 8 | 448 checksum over everything with itself zero 64 | 4096 JSON
func luks2Header(dev guest.Device, at int64, magic string) (head, area []byte, seq uint64, err error) {
	const most = 4 << 20
	be := binary.BigEndian
	b := make([]byte, 4096)
	if err := guest.ReadFull(dev, b, at); err != nil {
		return nil, nil, 0, err
	}
	if string(b[:6]) != magic || be.Uint16(b[6:]) != 2 {
		return nil, nil, 0, guest.ErrUnknown
	}
	size := be.Uint64(b[8:])
	if size < 8192 || size > most || be.Uint64(b[256:]) != uint64(at) {
		return nil, nil, 0, guest.Damaged("LUKS2: a header of %d bytes at %d", size, at)
	}
	area = make([]byte, size-4096)
	if err := guest.ReadFull(dev, area, at+4096); err != nil {
		return nil, nil, 0, err
	}
	new := luksHash(cString(b[72:104]))
	if new == nil {
		return nil, nil, 0, guest.Unsupported("LUKS2: the checksum %q", cString(b[72:104]))
	}
	want := bytes.Clone(b[448:512])
	clear(b[448:512])
	h := new()
	h.Write(b)
	h.Write(area)
	if sum := h.Sum(nil); !bytes.Equal(sum, want[:len(sum)]) {
		return nil, nil, 0, guest.Damaged("LUKS2: the header's checksum")
	}
	return b, area, be.Uint64(b[16:]), nil
}

// luks2Text is the JSON area (LUKS2 On-Disk Format §3). Numbers of 64 bits are strings there.
type luks2Text struct {
	Keyslots map[string]struct {
		Type    string
		KeySize int `json:"key_size"`
		AF      struct {
			Type, Hash string
			Stripes    int
		}
		Area struct {
			Type, Offset, Size, Encryption string
			KeySize                        int `json:"key_size"`
		}
		KDF luks2KDF
	}
	Segments map[string]struct {
		Type, Offset, Size, Encryption string
		Tweak                          string `json:"iv_tweak"`
		Sector                         int64  `json:"sector_size"`
		Integrity                      json.RawMessage
		Flags                          []string
	}
	Digests map[string]struct {
		luks2KDF
		Keyslots, Segments []string
		Digest             string
	}
	Config struct {
		Requirements struct{ Mandatory []string }
	}
}

type luks2KDF struct {
	Type, Hash, Salt string
	Iterations       int64
	Time, Memory     int64
	CPUs             int
}

func (k luks2KDF) kdf() luksKDF {
	salt, _ := base64.StdEncoding.DecodeString(k.Salt)
	return luksKDF{kind: k.Type, hash: k.Hash, salt: salt, time: max(k.Iterations, k.Time), memory: k.Memory, cpus: k.CPUs}
}

// maxKeyslots is how many slots and digests are looked at; LUKS2 has up to 32.
const maxKeyslots = 64

// parseLUKS2 reads a checked header.
func parseLUKS2(b, area []byte) (*luksHeader, error) {
	var t luks2Text
	area, _, _ = bytes.Cut(area, []byte{0})
	if err := json.Unmarshal(area, &t); err != nil {
		return nil, guest.Damaged("LUKS2: %v", err)
	}
	h := &luksHeader{version: 2, uuid: cString(b[168:208]), label: cString(b[24:72])}
	if len(t.Keyslots) > maxKeyslots || len(t.Digests) > maxKeyslots {
		return nil, guest.Damaged("LUKS2: %d key slots", len(t.Keyslots))
	}
	segment := ""
	for id, s := range t.Segments {
		if slices.ContainsFunc(s.Flags, func(f string) bool { return strings.HasPrefix(f, "backup-") }) {
			continue
		}
		if segment != "" || s.Type != "crypt" {
			h.refused = guest.Unsupported("LUKS2: several segments, as while it is encrypted anew")
		}
		segment = id
	}
	s, ok := t.Segments[segment]
	if !ok {
		return nil, guest.Damaged("LUKS2: no segment")
	}
	offset, err := strconv.ParseUint(s.Offset, 10, 62)
	tweak, err2 := strconv.ParseUint(s.Tweak, 10, 64)
	if err != nil || err2 != nil || s.Sector < 512 || s.Sector > 4096 || s.Sector&(s.Sector-1) != 0 {
		return nil, guest.Damaged("LUKS2: a segment at %q in sectors of %d bytes", s.Offset, s.Sector)
	}
	if s.Size != "dynamic" {
		n, err := strconv.ParseUint(s.Size, 10, 62)
		if err != nil || n == 0 {
			return nil, guest.Damaged("LUKS2: a segment of %q bytes", s.Size)
		}
		h.size = int64(n)
	}
	h.offset, h.tweak, h.sector, h.cipher = int64(offset), tweak, s.Sector, s.Encryption
	switch {
	case len(s.Integrity) > 0:
		h.refused = guest.Unsupported("LUKS2: authenticated encryption")
	case len(t.Config.Requirements.Mandatory) > 0:
		h.refused = guest.Unsupported("LUKS2: %s", strings.Join(t.Config.Requirements.Mandatory, ", "))
	}
	return h, h.readSlots(&t, segment)
}

// readSlots takes the slots that hold the key of a segment, in their order.
func (h *luksHeader) readSlots(t *luks2Text, segment string) error {
	for id, d := range t.Digests {
		if !slices.Contains(d.Segments, segment) {
			continue
		}
		sum, err := base64.StdEncoding.DecodeString(d.Digest)
		if err != nil || len(sum) > 64 {
			return guest.Damaged("LUKS2: digest %s", id)
		}
		h.digests = append(h.digests, luksDigest{d.kdf(), sum})
		slices.Sort(d.Keyslots)
		for _, slot := range slices.Compact(d.Keyslots) {
			k, ok := t.Keyslots[slot]
			if !ok || k.Type != "luks2" {
				continue
			}
			off, err := strconv.ParseUint(k.Area.Offset, 10, 62)
			n, err2 := strconv.ParseUint(k.Area.Size, 10, 62)
			if err != nil || err2 != nil || k.Area.Type != "raw" || k.AF.Type != "luks1" {
				return guest.Damaged("LUKS2: the area of key slot %s", slot)
			}
			h.slots = append(h.slots, luksSlot{kdf: k.KDF.kdf(), key: k.KeySize, stripes: k.AF.Stripes, hash: k.AF.Hash, off: int64(off), n: int64(n),
				cipher: k.Area.Encryption, materialKey: k.Area.KeySize, digest: len(h.digests) - 1})
		}
	}
	return nil
}
