package store

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/crc32"

	"github.com/klauspost/compress/zstd"
)

// A sealed object is a manifest or the state of verify: a header that ends with a salt of 16
// bytes and the length of what is sealed, then that, one zstd frame, and the CRC-32C of
// everything before; see doc.go, "Manifests". Bytes 12..15 of the header say whether it is encrypted.

const (
	sealedTail  = 24 // bytes of the header from the salt on
	sealedSalt  = 16 // bytes
	sealedCheck = 4  // bytes of the CRC-32C
)

// sealObject completes the header h and seals plain behind it.
func sealObject(h []byte, context string, plain []byte, k *keys) ([]byte, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	packed := enc.EncodeAll(plain, nil)
	if k.sealed {
		h[12] = 1
	}
	tail := h[len(h)-sealedTail:]
	if _, err := rand.Read(tail[:sealedSalt]); err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint64(tail[sealedSalt:], uint64(len(packed)))
	out := append(h, k.sealSmall(context, tail[:sealedSalt], h, packed)...)
	return binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli)), nil
}

// wholeObject reports whether the CRC-32C at the end of b is right. Only then the version
// in its header can be believed.
func wholeObject(b []byte) bool {
	n := len(b) - sealedCheck
	return n >= 0 && crc32.Checksum(b[:n], castagnoli) == binary.LittleEndian.Uint32(b[n:])
}

// openObject undoes sealObject for an object with a header of n bytes, longer than that and a
// tag. What it gives has at most limit bytes.
func openObject(b []byte, n int, context string, limit uint64, k *keys) ([]byte, error) {
	h := b[:n]
	tail := h[n-sealedTail:]
	packed, ok := k.openSmall(context, tail[:sealedSalt], h, b[n:len(b)-sealedCheck])
	if !ok || uint64(len(packed)) != binary.LittleEndian.Uint64(tail[sealedSalt:]) {
		return nil, errors.New("authentication")
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(limit))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	return dec.DecodeAll(packed, nil)
}
