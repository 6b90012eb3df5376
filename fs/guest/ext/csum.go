package ext

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c goes on from seed over p, without the inversions before and after that other users of CRC-32C have: the
// file system chains its checksums through seeds (ext4 doc, Checksums).
func crc32c(seed uint32, p []byte) uint32 { return ^crc32.Update(^seed, castagnoli, p) }

// crc32c32 goes on over a number as the disk has it. It is for every inode, and takes no memory.
func crc32c32(crc, n uint32) uint32 {
	for range 4 {
		crc = castagnoli[byte(crc^n)] ^ crc>>8
		n >>= 8
	}
	return crc
}

// zeros stand for a checksum's own field.
var zeros [4]byte

// crc16 is CRC-16/ARC's polynomial, reflected, that group descriptors without metadata_csum have.
func crc16(crc uint16, p []byte) uint16 {
	for _, b := range p {
		crc ^= uint16(b)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xA001
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}

// crc32be is the CRC-32 of the journal's first kind of checksum: most significant bit first, polynomial 0x04C11DB7.
func crc32be(crc uint32, p []byte) uint32 {
	for _, b := range p {
		crc = crc<<8 ^ beTable[byte(crc>>24)^b]
	}
	return crc
}

var beTable = func() (t [256]uint32) {
	for i := range t {
		c := uint32(i) << 24
		for range 8 {
			if c&(1<<31) != 0 {
				c = c<<1 ^ 0x04C11DB7
			} else {
				c <<= 1
			}
		}
		t[i] = c
	}
	return t
}()
