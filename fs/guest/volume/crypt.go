package volume

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// sectorCipher decrypts sectors. Safe for concurrent use.
type sectorCipher interface {
	// decrypt decrypts the sectors in b, of size bytes each, in place. The first one's initial vector is made of number, and each
	// later one's of step more.
	decrypt(b []byte, size int, number, step uint64)
}

// newSectorCipher makes the cipher that dm-crypt calls by this name (the kernel's
// Documentation/admin-guide/device-mapper/dm-crypt.rst).
func newSectorCipher(name string, key []byte) (sectorCipher, error) {
	mode, ok := strings.CutPrefix(name, "aes-")
	if !ok {
		return nil, guest.Unsupported("the cipher %s", name)
	}
	mask := ^uint64(0)
	if mode == "xts-plain" || mode == "cbc-plain" {
		mask = 1<<32 - 1 // plain has 32 bits
	}
	switch mode {
	case "xts-plain64", "xts-plain":
		data, err := aes.NewCipher(key[:len(key)/2])
		tweak, err2 := aes.NewCipher(key[len(key)/2:])
		if err != nil || err2 != nil {
			return nil, guest.Damaged("a key of %d bytes for %s", len(key), name)
		}
		return xtsSectors{data, tweak, mask}, nil
	case "cbc-plain64", "cbc-plain", "cbc-essiv:sha256":
		c, err := aes.NewCipher(key)
		if err != nil {
			return nil, guest.Damaged("a key of %d bytes for %s", len(key), name)
		}
		s := cbcSectors{block: c, mask: mask}
		if mode == "cbc-essiv:sha256" {
			h := luksHash("sha256")()
			h.Write(key)
			s.iv, err = aes.NewCipher(h.Sum(nil))
		}
		return s, err
	case "cbc-eboiv":
		c, err := aes.NewCipher(key)
		if err != nil {
			return nil, guest.Damaged("a key of %d bytes for %s", len(key), name)
		}
		return cbcSectors{c, c, mask}, nil
	case "cbc-elephant":
		data, err := aes.NewCipher(key[:len(key)/2])
		tweak, err2 := aes.NewCipher(key[len(key)/2:])
		if err != nil || err2 != nil {
			return nil, guest.Damaged("a key of %d bytes for %s", len(key), name)
		}
		return elephantSectors{cbcSectors{data, data, mask}, tweak}, nil
	}
	return nil, guest.Unsupported("the cipher %s", name)
}

// xtsSectors is XTS (IEEE 1619) by words of 64 bits: about twice as fast as golang.org/x/crypto/xts, which goes by bytes.
type xtsSectors struct {
	data, tweak cipher.Block
	mask        uint64
}

func (x xtsSectors) decrypt(b []byte, size int, number, step uint64) {
	le := binary.LittleEndian
	iv := make([]byte, aes.BlockSize)
	for ; len(b) >= size; b, number = b[size:], number+step {
		clear(iv)
		le.PutUint64(iv, number&x.mask)
		x.tweak.Encrypt(iv, iv)
		x.sector(b[:size], le.Uint64(iv), le.Uint64(iv[8:]))
	}
}

// sector decrypts one sector by its encrypted tweak.
func (x xtsSectors) sector(b []byte, low, high uint64) {
	le := binary.LittleEndian
	for ; len(b) >= aes.BlockSize; b = b[aes.BlockSize:] {
		block := b[:aes.BlockSize]
		le.PutUint64(block, le.Uint64(block)^low)
		le.PutUint64(block[8:], le.Uint64(block[8:])^high)
		x.data.Decrypt(block, block)
		le.PutUint64(block, le.Uint64(block)^low)
		le.PutUint64(block[8:], le.Uint64(block[8:])^high)
		// Times x in GF(2¹²⁸) modulo x¹²⁸+x⁷+x²+x+1.
		carry := high >> 63
		low, high = low<<1^carry*0x87, high<<1|low>>63
	}
}

// cbcSectors is CBC; the initial vector is the number, encrypted by iv if there is one.
type cbcSectors struct {
	block, iv cipher.Block
	mask      uint64
}

func (c cbcSectors) decrypt(b []byte, size int, number, step uint64) {
	iv := make([]byte, aes.BlockSize)
	mode := cipher.NewCBCDecrypter(c.block, iv)
	again, _ := mode.(interface{ SetIV([]byte) }) // not in the interface, but of all of Go's own
	for ; len(b) >= size; b, number = b[size:], number+step {
		clear(iv)
		binary.LittleEndian.PutUint64(iv, number&c.mask)
		if c.iv != nil {
			c.iv.Encrypt(iv, iv)
		}
		if again != nil {
			again.SetIV(iv)
		} else {
			mode = cipher.NewCBCDecrypter(c.block, iv)
		}
		mode.CryptBlocks(b[:size], b[:size])
	}
}

// crypt is what an encrypted device hides. Bytes keep their positions.
type crypt struct {
	device // encrypted
	sectorCipher
	sector int64  // bytes
	unit   int64  // bytes that the number of a sector counts
	tweak  uint64 // added to the number of a sector
}

// device makes what a LUKS volume hides.
func (h *luksHeader) device(dev device, key []byte) (device, error) {
	c, err := newSectorCipher(h.cipher, key)
	if err != nil {
		return nil, err
	}
	n := h.size
	if n == 0 {
		n = (dev.Size() - h.offset) &^ (h.sector - 1)
	}
	if h.offset < 0 || n <= 0 || n%h.sector != 0 {
		return nil, guest.Damaged("LUKS: data of %d bytes from %d on", n, h.offset)
	}
	data, err := section(dev, h.offset, n)
	if err != nil {
		return nil, err
	}
	// Numbers count 512 bytes, however large sectors are.
	return &crypt{data, c, h.sector, sectorSize, h.tweak}, nil
}

// ReadAt implements io.ReaderAt.
func (c *crypt) ReadAt(p []byte, off int64) (int, error) {
	return readRuns(p, off, c.Size(), c.read)
}

// read reads whole sectors into p, or a part of one by a buffer.
func (c *crypt) read(p []byte, off int64) (int, error) {
	in := off % c.sector
	if in == 0 && int64(len(p)) >= c.sector {
		p = p[:int64(len(p))/c.sector*c.sector]
		return len(p), c.sectors(p, off)
	}
	b := make([]byte, c.sector)
	if err := c.sectors(b, off-in); err != nil {
		return 0, err
	}
	return copy(p, b[in:]), nil
}

// sectors reads and decrypts whole sectors.
func (c *crypt) sectors(p []byte, off int64) error {
	if err := guest.ReadFull(c.device, p, off); err != nil {
		return err
	}
	c.decrypt(p, int(c.sector), uint64(off/c.unit)+c.tweak, uint64(c.sector/c.unit))
	return nil
}
