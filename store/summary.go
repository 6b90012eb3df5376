package store

import (
	"encoding/binary"
	"errors"
	"time"
)

// The summary of a point in the index is binary, since a mount of a repository
// with 10,000 points decodes all of them before its first byte: a version byte,
// then the fields in order, strings and lists with a uvarint length before them.
// Format 1 ends with the tags; 2 has LockedUntil after them, in seconds since 1970, 0 for none.
const summaryFormat = 2

func (s *Summary) encode() []byte {
	b := []byte{summaryFormat}
	str := func(v string) { b = append(binary.AppendUvarint(b, uint64(len(v))), v...) }
	str(s.VM)
	str(s.Name)
	str(s.Damaged)
	b = binary.AppendVarint(b, s.Time.Unix())
	for _, v := range []int64{int64(s.Disks), s.Total, s.New, s.Stored, int64(s.Warnings)} {
		b = binary.AppendVarint(b, v)
	}
	b = binary.AppendUvarint(b, uint64(len(s.Tags)))
	for _, t := range s.Tags {
		str(t)
	}
	locked := int64(0)
	if !s.LockedUntil.IsZero() {
		locked = s.LockedUntil.Unix()
	}
	return binary.AppendVarint(b, locked)
}

func decodeSummary(b []byte) (s Summary, err error) {
	bad := errors.New("summary: format")
	if len(b) == 0 || b[0] < 1 || b[0] > summaryFormat {
		return s, bad
	}
	format := b[0]
	b = b[1:]
	str := func() (v string) {
		n, k := binary.Uvarint(b)
		if k <= 0 || n > uint64(len(b)-k) {
			err = bad
			return ""
		}
		v, b = string(b[k:k+int(n)]), b[k+int(n):]
		return v
	}
	num := func() int64 {
		n, k := binary.Varint(b)
		if k <= 0 {
			err = bad
			return 0
		}
		b = b[k:]
		return n
	}
	s.VM, s.Name, s.Damaged = str(), str(), str()
	s.Time = time.Unix(num(), 0).UTC()
	s.Disks, s.Total, s.New, s.Stored, s.Warnings = int(num()), num(), num(), num(), int(num())
	n, k := binary.Uvarint(b)
	if k <= 0 || n > uint64(len(b)) {
		return s, bad
	}
	b = b[k:]
	for range n {
		s.Tags = append(s.Tags, str())
	}
	if format >= 2 {
		if locked := num(); locked != 0 {
			s.LockedUntil = time.Unix(locked, 0).UTC()
		}
	}
	if err == nil && len(b) != 0 {
		err = bad
	}
	return s, err
}
