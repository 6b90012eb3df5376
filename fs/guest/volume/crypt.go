package volume

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// sectorCipher decrypts sectors in place, by the number that makes the initial vector. Safe for concurrent use.
type sectorCipher interface {
	decrypt(b []byte, sector uint64)
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
			s.essiv, err = aes.NewCipher(h.Sum(nil))
		}
		return s, err
	}
	return nil, guest.Unsupported("the cipher %s", name)
}

// xtsSectors is XTS (IEEE 1619) by words of 64 bits: about twice as fast as golang.org/x/crypto/xts, which goes by bytes.
type xtsSectors struct {
	data, tweak cipher.Block
	mask        uint64
}

func (x xtsSectors) decrypt(b []byte, sector uint64) {
	le := binary.LittleEndian
	iv := make([]byte, aes.BlockSize)
	le.PutUint64(iv, sector&x.mask)
	x.tweak.Encrypt(iv, iv)
	low, high := le.Uint64(iv), le.Uint64(iv[8:])
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

type cbcSectors struct {
	block, essiv cipher.Block
	mask         uint64
}

func (c cbcSectors) decrypt(b []byte, sector uint64) {
	iv := make([]byte, aes.BlockSize)
	binary.LittleEndian.PutUint64(iv, sector&c.mask)
	if c.essiv != nil {
		c.essiv.Encrypt(iv, iv)
	}
	cipher.NewCBCDecrypter(c.block, iv).CryptBlocks(b, b)
}

// crypt is what an encrypted device hides. Bytes keep their positions.
type crypt struct {
	device // encrypted
	sectorCipher
	sector int64  // bytes
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
	return &crypt{data, c, h.sector, h.tweak}, nil
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

// sectors reads and decrypts whole sectors. Their numbers count 512 bytes, however large they are.
func (c *crypt) sectors(p []byte, off int64) error {
	if err := guest.ReadFull(c.device, p, off); err != nil {
		return err
	}
	for ; len(p) > 0; p, off = p[c.sector:], off+c.sector {
		c.decrypt(p[:c.sector], uint64(off/sectorSize)+c.tweak)
	}
	return nil
}
