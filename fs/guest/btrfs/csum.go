package btrfs

import (
	"bytes"
	"crypto/sha256"
	"hash/crc32"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/crypto/blake2b"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A csumType is how blocks are summed. The sums of the file system's own blocks have 32 bytes, filled up with zeros; those of
// data are as long as they are.
type csumType struct {
	size int
	sum  func(dst, b []byte) []byte // appends the sum of b to dst
}

// csumTypes are by number in the superblock.
var csumTypes = []csumType{
	{4, func(dst, b []byte) []byte { return le.AppendUint32(dst, crc32.Checksum(b, castagnoli)) }},
	{8, func(dst, b []byte) []byte { return le.AppendUint64(dst, xxhash.Sum64(b)) }},
	{32, func(dst, b []byte) []byte { s := sha256.Sum256(b); return append(dst, s[:]...) }},
	{32, func(dst, b []byte) []byte { s := blake2b.Sum256(b); return append(dst, s[:]...) }},
}

const csumField = 32 // bytes of the sum at the start of a superblock or node

func csumOf(number uint16) (csumType, error) {
	if int(number) >= len(csumTypes) {
		return csumType{}, guest.Unsupported("checksums of kind %d", number)
	}
	return csumTypes[number], nil
}

// matches reports whether b has the sum want.
func (c csumType) matches(want, b []byte) bool {
	if c.size == 4 { // the usual, without an allocation
		return le.Uint32(want) == crc32.Checksum(b, castagnoli)
	}
	var room [32]byte
	return bytes.Equal(want[:c.size], c.sum(room[:0], b))
}

// nameHash is the offset of the key of a name's DIR_ITEM or XATTR_ITEM: CRC-32C, begun with ~1 and not inverted at its end.
func nameHash(name string) uint64 {
	return uint64(^crc32.Update(1, castagnoli, []byte(name)))
}
