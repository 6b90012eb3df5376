package volume

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"math/bits"
)

// elephantSectors is BitLocker's first mode: CBC, then two diffusers over the whole sector, then a key of the sector's own (N.
// Ferguson, "AES-CBC + Elephant diffuser", Microsoft 2006, §4). Sectors have a power of two of bytes, 512 to 4096.
type elephantSectors struct {
	cbcSectors
	tweak cipher.Block
}

func (e elephantSectors) decrypt(b []byte, size int, number, step uint64) {
	e.cbcSectors.decrypt(b, size, number, step)
	key := make([]byte, 2*aes.BlockSize)
	words := make([]uint32, size/4)
	for ; len(b) >= size; b, number = b[size:], number+step {
		sector := b[:size]
		for i := range words {
			words[i] = binary.LittleEndian.Uint32(sector[4*i:])
		}
		diffuserB(words)
		diffuserA(words)
		for i, w := range words {
			binary.LittleEndian.PutUint32(sector[4*i:], w)
		}
		clear(key)
		binary.LittleEndian.PutUint64(key, number)
		binary.LittleEndian.PutUint64(key[aes.BlockSize:], number)
		key[len(key)-1] = 0x80
		e.tweak.Encrypt(key[:aes.BlockSize], key[:aes.BlockSize])
		e.tweak.Encrypt(key[aes.BlockSize:], key[aes.BlockSize:])
		for ; len(sector) > 0; sector = sector[len(key):] {
			subtle.XORBytes(sector, sector[:len(key)], key)
		}
	}
}

// diffuserA undoes diffuser A, whose words depend on those before them.
func diffuserA(d []uint32) {
	mask := len(d) - 1
	for range 5 {
		for i := 0; i < len(d); i += 4 {
			d[i] += d[(i-2)&mask] ^ bits.RotateLeft32(d[(i-5)&mask], 9)
			d[i+1] += d[(i-1)&mask] ^ d[(i-4)&mask]
			d[i+2] += d[i] ^ bits.RotateLeft32(d[(i-3)&mask], 13)
			d[i+3] += d[i+1] ^ d[(i-2)&mask]
		}
	}
}

// diffuserB undoes diffuser B, whose words depend on those behind them.
func diffuserB(d []uint32) {
	mask := len(d) - 1
	for range 3 {
		for i := 0; i < len(d); i += 4 {
			d[i] += d[i+2] ^ d[(i+5)&mask]
			d[i+1] += d[i+3] ^ bits.RotateLeft32(d[(i+6)&mask], 10)
			d[i+2] += d[(i+4)&mask] ^ d[(i+7)&mask]
			d[i+3] += d[(i+5)&mask] ^ bits.RotateLeft32(d[(i+8)&mask], 25)
		}
	}
}
