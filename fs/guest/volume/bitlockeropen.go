package volume

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

const maxNTFSCluster = 2 << 20 // bytes

// bitLocker opens a BitLocker volume and looks into it, under the same name. It says no when it stays closed.
func (s *scan) bitLocker(f found, v *Volume) bool {
	v.dev, v.Encryption = nil, "BitLocker"
	all, bad, err := readBitLocker(f.dev)
	if err != nil {
		v.Err = err
		return false
	}
	h := all[0]
	v.Encryption, v.UUID = h.String(), h.uuid
	if bad != nil {
		s.warn(f.name, "%v; another copy is used", bad)
	}
	if v.Err = h.refused; v.Err != nil {
		return false
	}
	var keys [][]byte
	if s.opt.Unlock != nil {
		keys = s.opt.Unlock(Locked{Name: f.name, Type: "BitLocker", UUID: h.uuid, Label: h.label})
	}
	dev, h, err := openBitLocker(f.dev, all, keys)
	if err != nil {
		v.Err = err
		return false
	}
	// A file system is a cluster shorter than its volume at most, and so is what is encrypted.
	if h.encrypted < dev.Size()-maxNTFSCluster {
		s.warn(f.name, "BitLocker has encrypted %d of %d bytes; the others are read as they are", h.encrypted, dev.Size())
	}
	f.dev, f.encryption, f.uuid, f.depth = dev, v.Encryption, v.UUID, f.depth+1
	s.look(f)
	return true
}

// openBitLocker opens a volume by the first copy of its metadata that can be trusted, and says which; ErrLocked when no key fits.
func openBitLocker(dev device, all []*bitLocker, keys [][]byte) (device, *bitLocker, error) {
	var secrets []secret
	for _, key := range keys {
		secrets = append(secrets, newSecret(key))
	}
	made, err := stretcher{}, error(nil)
	for _, h := range all {
		var master, key []byte
		if master, err = h.unlock(secrets, made); err != nil {
			continue
		}
		if err = h.check(master); err != nil {
			continue
		}
		if key, err = h.volumeKey(master); err != nil {
			continue
		}
		d, err := h.device(dev, key)
		return d, h, err
	}
	return nil, nil, err
}

// check compares the metadata with its hash, if there is one.
func (h *bitLocker) check(master []byte) error {
	if h.hash == nil {
		return nil
	}
	want, err := unsealKey(master, h.hash)
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(h.covered); subtle.ConstantTimeCompare(sum[:], want) != 1 {
		return guest.Damaged("BitLocker: the hash of the metadata")
	}
	return nil
}

// volumeKey gives the key of the sectors. That with a diffuser has two of 32 bytes, of which AES 128 uses the first halves (BDE, "Full Volume
// Encryption Key").
func (h *bitLocker) volumeKey(master []byte) ([]byte, error) {
	key, err := unsealKey(master, h.key)
	if err != nil {
		return nil, err
	}
	n := h.method.key
	want := n
	switch h.method.cipher {
	case "aes-cbc-elephant":
		if len(key) == 64 {
			return slices.Concat(key[:n], key[32:32+n]), nil
		}
		want = 64
	case "aes-xts-plain64":
		want = 2 * n
	}
	if len(key) < want {
		return nil, guest.Damaged("BitLocker: a key of %d bytes for %s", len(key), h.method.name)
	}
	return key[:want], nil
}

// device makes what a volume hides.
func (h *bitLocker) device(dev device, key []byte) (device, error) {
	c, err := newSectorCipher(h.method.cipher, key)
	if err != nil {
		return nil, err
	}
	size := dev.Size() &^ (h.sector - 1)
	plain, err := section(dev, 0, size)
	if err != nil {
		return nil, err
	}
	unit := int64(1) // CBC counts bytes
	if h.method.cipher == "aes-xts-plain64" {
		unit = h.sector
	}
	hidden := &crypt{plain, c, h.sector, unit, 0}
	if h.version == 1 {
		if plain, err = h.vista(plain); err != nil {
			return nil, err
		}
	}
	if (h.header|h.headerAt|h.encrypted)&(h.sector-1) != 0 || h.header < 0 || h.header > size ||
		h.headerAt < h.header || h.headerAt > size-h.header || h.version > 1 && h.header == 0 {
		return nil, guest.Damaged("BitLocker: a header of %d bytes at %d", h.header, h.headerAt)
	}
	return concat(h.places(hidden, plain, size))
}

// places says where everything is: the header elsewhere, where the metadata is there are zeros, and what is not encrypted is as it is.
func (h *bitLocker) places(hidden, plain device, size int64) (parts []place) {
	type hole struct{ off, end int64 }
	n, clear := int64(bitLockerRegion), int64(0)
	if h.version == 1 {
		n, clear = bitLockerVista, bitLockerBoot
	}
	holes := []hole{{h.headerAt, h.headerAt + h.header}}
	for _, at := range h.copies {
		if at > 0 && at < size {
			holes = append(holes, hole{at, at + n})
		}
	}
	cuts := []int64{0, clear, h.header, h.encrypted, h.encrypted - h.headerAt, size}
	for _, z := range holes {
		cuts = append(cuts, z.off, z.end)
	}
	cuts = slices.DeleteFunc(cuts, func(at int64) bool { return at < 0 || at > size })
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	for i, at := range cuts[:len(cuts)-1] {
		p := place{hidden, at, cuts[i+1] - at}
		zero := slices.ContainsFunc(holes, func(z hole) bool { return at >= z.off && at < z.end })
		if at < h.header {
			p.off, zero = h.headerAt+at, false
		}
		switch {
		case zero:
			p = place{nil, 0, p.n}
		case p.off < clear || p.off >= h.encrypted:
			p.dev = plain
		}
		parts = append(parts, p)
	}
	return parts
}

// vista gives back what Windows Vista replaces in the first sector, which it does not move (BDE, "BitLocker Windows Vista").
func (h *bitLocker) vista(dev device) (device, error) {
	first := make([]byte, 512)
	if err := guest.ReadFull(dev, first, 0); err != nil {
		return nil, err
	}
	copy(first[3:], "NTFS    ")
	binary.LittleEndian.PutUint64(first[56:], uint64(h.mirror))
	return mended{dev, first}, nil
}

// mended is a device with other first bytes.
type mended struct {
	device
	first []byte
}

// ReadAt implements io.ReaderAt.
func (m mended) ReadAt(p []byte, off int64) (int, error) {
	n, err := m.device.ReadAt(p, off)
	if off >= 0 && off < int64(len(m.first)) {
		copy(p[:n], m.first[off:])
	}
	return n, err
}
