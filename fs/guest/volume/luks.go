package volume

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/ripemd160"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// luksHeader is what the headers of both versions of LUKS say.
type luksHeader struct {
	version     int
	uuid, label string
	slots       []luksSlot
	digests     []luksDigest
	cipher      string // aes-xts-plain64
	offset      int64  // of the data, bytes
	size        int64  // of the data, bytes; 0 for all that there is
	sector      int64  // bytes
	tweak       uint64 // number of the first sector, as the initial vector counts
	refused     error  // why it cannot be opened even with a key
	damaged     bool   // the first header is; this is the second
}

// luksSlot holds the volume key, encrypted by a passphrase.
type luksSlot struct {
	kdf         luksKDF
	key         int // bytes of the volume key
	stripes     int
	hash        string // of the anti-forensic splitter
	off, n      int64  // of the material, bytes
	cipher      string
	materialKey int // bytes of the key that the material is encrypted with
	digest      int // index into digests
}

// luksKDF makes a key of a passphrase.
type luksKDF struct {
	kind         string // pbkdf2, argon2i, argon2id
	hash         string
	salt         []byte
	time, memory int64 // iterations; KiB
	cpus         int
}

// luksDigest tells a right volume key.
type luksDigest struct {
	luksKDF
	sum []byte
}

// The bounds of what a header may ask for. cryptsetup(8) chooses for two seconds of its machine, up to 1 GiB.
const (
	maxIterations = 1 << 27
	maxArgonWork  = 64 << 20 // passes times KiB
	maxStripes    = 1 << 14
	maxVolumeKey  = 512
)

// luksHash gives a hash by the name that LUKS has for it.
func luksHash(name string) func() hash.Hash {
	switch name {
	case "sha1":
		return sha1.New
	case "sha256":
		return sha256.New
	case "sha512":
		return sha512.New
	case "ripemd160":
		return ripemd160.New
	}
	return nil
}

// key makes a key of n bytes, with at most memory bytes.
func (k luksKDF) key(pass []byte, n int, memory int64) ([]byte, error) {
	if k.kind == "pbkdf2" {
		h := luksHash(k.hash)
		switch {
		case h == nil:
			return nil, guest.Unsupported("LUKS: the hash %s", k.hash)
		case k.time < 1 || k.time > maxIterations:
			return nil, guest.Unsupported("LUKS: %d iterations", k.time)
		}
		return pbkdf2.Key(h, string(pass), k.salt, int(k.time), n)
	}
	switch {
	case k.memory < 8 || k.memory<<10 > memory:
		return nil, guest.Unsupported("LUKS: a key that takes %d KiB of memory to make; %d are allowed", k.memory, memory>>10)
	case k.time < 1 || k.time*k.memory > maxArgonWork || k.cpus < 1 || k.cpus > 255:
		return nil, guest.Unsupported("LUKS: %d passes with %d threads", k.time, k.cpus)
	}
	switch k.kind {
	case "argon2id":
		return argon2.IDKey(pass, k.salt, uint32(k.time), uint32(k.memory), uint8(k.cpus), uint32(n)), nil
	case "argon2i":
		return argon2.Key(pass, k.salt, uint32(k.time), uint32(k.memory), uint8(k.cpus), uint32(n)), nil
	}
	return nil, guest.Unsupported("LUKS: keys by %s", k.kind)
}

// is reports whether a volume key is the one of a digest.
func (d luksDigest) is(key []byte) bool {
	if len(d.sum) == 0 {
		return false
	}
	sum, err := d.key(key, len(d.sum), 0)
	return err == nil && subtle.ConstantTimeCompare(sum, d.sum) == 1
}

// readLUKS reads the header of either version.
func readLUKS(dev guest.Device) (*luksHeader, error) {
	b := make([]byte, 4096)
	if err := guest.ReadFull(dev, b, 0); err != nil {
		return nil, err
	}
	if string(b[:6]) == luksMagic && binary.BigEndian.Uint16(b[6:]) == 1 {
		return parseLUKS1(b)
	}
	return readLUKS2(dev)
}

const (
	luksMagic  = "LUKS\xba\xbe"
	luksSecond = "SKUL\xba\xbe"
)

// cString is a text that ends with a zero byte.
func cString(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

// parseLUKS1 reads a header of version 1 (LUKS1 On-Disk Format §3.1), big-endian:
//
//	0 magic 6 | 6 version 2 | 8 cipher 32 | 40 mode 32 | 72 hash 32 | 104 first sector of data 4 | 108 bytes of the key 4
//	112 digest 20 | 132 its salt 32 | 164 its iterations 4 | 168 UUID 40 | 208 eight slots of 48:
//	0 active 4 | 4 iterations 4 | 8 salt 32 | 40 first sector of the material 4 | 44 stripes 4
func parseLUKS1(b []byte) (*luksHeader, error) {
	const active = 0x00ac71f3
	be := binary.BigEndian
	hash, key := cString(b[72:104]), be.Uint32(b[108:])
	if key == 0 || key > maxVolumeKey {
		return nil, guest.Damaged("LUKS: a key of %d bytes", key)
	}
	h := &luksHeader{version: 1, uuid: cString(b[168:208]), cipher: cString(b[8:40]) + "-" + cString(b[40:72]),
		offset: int64(be.Uint32(b[104:])) * sectorSize, sector: sectorSize}
	h.digests = []luksDigest{{luksKDF{kind: "pbkdf2", hash: hash, salt: b[132:164], time: int64(be.Uint32(b[164:]))}, b[112:132]}}
	for i := range 8 {
		s := b[208+48*i:]
		if be.Uint32(s) != active {
			continue
		}
		slot := luksSlot{kdf: luksKDF{kind: "pbkdf2", hash: hash, salt: s[8:40], time: int64(be.Uint32(s[4:]))}, key: int(key), hash: hash,
			stripes: int(be.Uint32(s[44:])), off: int64(be.Uint32(s[40:])) * sectorSize, cipher: h.cipher, materialKey: int(key)}
		slot.n = (int64(key)*int64(slot.stripes) + sectorSize - 1) &^ (sectorSize - 1)
		h.slots = append(h.slots, slot)
	}
	return h, nil
}

// open opens a volume with the first of the keys that fits; ErrLocked when none does.
func (h *luksHeader) open(dev device, keys [][]byte, memory int64) (device, error) {
	if h.refused != nil {
		return nil, h.refused
	}
	err := error(nil)
	for _, key := range keys {
		for _, d := range h.digests {
			if h.fits(key) && d.is(key) { // the volume key itself
				return h.device(dev, key)
			}
		}
		for _, slot := range h.slots {
			volume, e := slot.open(dev, key, memory)
			if e != nil {
				err = e
				continue
			}
			if h.digests[slot.digest].is(volume) {
				return h.device(dev, volume)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLocked, err)
	}
	return nil, ErrLocked
}

// fits reports whether a key has the length of the volume key.
func (h *luksHeader) fits(key []byte) bool {
	for _, s := range h.slots {
		if s.key == len(key) {
			return true
		}
	}
	return false
}

// open gives the volume key that a slot holds, if the passphrase is right; else some other bytes.
func (s luksSlot) open(dev device, pass []byte, memory int64) ([]byte, error) {
	n := int64(s.key) * int64(s.stripes)
	if s.stripes < 1 || s.stripes > maxStripes || s.key < 1 || s.key > maxVolumeKey || s.n < n || s.n > n+4096 && s.n > 16<<20 ||
		s.materialKey < 1 || s.materialKey > maxVolumeKey {
		return nil, guest.Damaged("LUKS: a key of %d bytes in %d stripes", s.key, s.stripes)
	}
	key, err := s.kdf.key(pass, s.materialKey, memory)
	if err != nil {
		return nil, err
	}
	c, err := newSectorCipher(s.cipher, key)
	if err != nil {
		return nil, err
	}
	material := make([]byte, (n+sectorSize-1)&^(sectorSize-1))
	if err := guest.ReadFull(dev, material, s.off); err != nil {
		return nil, err
	}
	c.decrypt(material, sectorSize, 0, 1)
	return luksMerge(material[:n], s.key, s.hash)
}

// luksMerge undoes the anti-forensic splitter (LUKS1 On-Disk Format §2.4).
func luksMerge(material []byte, n int, name string) ([]byte, error) {
	h := luksHash(name)
	if h == nil {
		return nil, guest.Unsupported("LUKS: the hash %s", name)
	}
	d := make([]byte, n)
	for len(material) > n {
		subtle.XORBytes(d, d, material[:n])
		diffuse(d, h())
		material = material[n:]
	}
	subtle.XORBytes(d, d, material)
	return d, nil
}

// diffuse replaces each block of d, of the hash's size, by the hash of its number and itself.
func diffuse(d []byte, h hash.Hash) {
	size := h.Size()
	for i := 0; i*size < len(d); i++ {
		block := d[i*size : min(len(d), (i+1)*size)]
		h.Reset()
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(i)))
		h.Write(block)
		copy(block, h.Sum(nil))
	}
}
