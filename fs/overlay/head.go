package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

const (
	headMagic   = "HFOV1\x00\x00\x00"
	headLen     = 4096 // bytes of a copy
	headFixed   = 8 + 8 + 8 + 8 + 16 + 2
	maxBase     = 1024 // bytes
	maxSize     = 64 << 40
	headSumAt   = headLen - 4
	headCopies  = 2
	headFileLen = headCopies * headLen
)

// head is what is kept of an overlay besides its blocks.
type head struct {
	seq   uint64
	size  int64 // bytes of the disk
	limit int64 // up to where the image is seen
	id    [16]byte
	base  string
}

func (h head) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, headLen)
	b = append(b, headMagic...)
	b = le.AppendUint64(b, h.seq)
	b = le.AppendUint64(b, uint64(h.size))
	b = le.AppendUint64(b, uint64(h.limit))
	b = append(b, h.id[:]...)
	b = le.AppendUint16(b, uint16(len(h.base)))
	b = append(b, h.base...)
	b = b[:headLen]
	le.PutUint32(b[headSumAt:], crc32.Checksum(b[:headSumAt], crcTable))
	return b
}

// decodeHead reports false for a copy that is not valid.
func decodeHead(b []byte) (h head, ok bool) {
	le := binary.LittleEndian
	if string(b[:8]) != headMagic || le.Uint32(b[headSumAt:]) != crc32.Checksum(b[:headSumAt], crcTable) {
		return h, false
	}
	n := int(le.Uint16(b[headFixed-2:]))
	h = head{seq: le.Uint64(b[8:]), size: int64(le.Uint64(b[16:])), limit: int64(le.Uint64(b[24:])), id: [16]byte(b[32:48])}
	if n > maxBase || h.size < 0 || h.size > maxSize || h.limit < 0 || h.limit > maxSize {
		return h, false
	}
	h.base = string(b[headFixed : headFixed+n])
	return h, true
}

// readHead gives the newer of the valid copies.
func readHead(f file) (newest head, err error) {
	b := make([]byte, headFileLen)
	if n, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return head{}, err
	} else {
		clear(b[n:])
	}
	found := false
	for i := range headCopies {
		if h, ok := decodeHead(b[i*headLen:][:headLen]); ok && (!found || h.seq > newest.seq) {
			newest, found = h, true
		}
	}
	if !found {
		return head{}, fmt.Errorf("%w: head", ErrDamaged)
	}
	return newest, nil
}

// writeHead writes the copy that is not the newest one.
func writeHead(f file, h head) error {
	if _, err := f.WriteAt(h.encode(), int64(h.seq%headCopies)*headLen); err != nil {
		return err
	}
	return f.Sync()
}
