// Package overlaytest is what a disk may hold after a crash, for the tests of package overlay.
//
//	s := overlaytest.New(content)
//	s.Add(off, p) // before the write
//	s.Settle()    // after a flush that returned
//	err := s.Check(contentAfterTheCrash)
//
// A disk writes a sector whole or not at all, and those of one write in any order. So a sector holds what it held
// at the last flush that returned, or anything that was written to it later.
package overlaytest

import (
	"bytes"
	"fmt"
	"slices"
)

// Sector is what a disk writes whole or not at all, bytes.
const Sector = 512

// Sectors is what each sector of a disk may hold. Not safe for concurrent use.
type Sectors struct {
	may   [][][]byte // by sector; the newest last
	added []int      // sectors with more than one; may name one twice
}

// New is of a disk that holds b for sure. b may be reused.
func New(b []byte) *Sectors {
	s := &Sectors{may: make([][][]byte, 0, (len(b)+Sector-1)/Sector)}
	for p := range slices.Chunk(b, Sector) {
		s.may = append(s.may, [][]byte{bytes.Clone(p)})
	}
	return s
}

// Add puts down a write that may come to pass or not; what is past the end is left out. p may be
// reused.
func (s *Sectors) Add(off int64, p []byte) {
	for len(p) > 0 && off/Sector < int64(len(s.may)) {
		i, in := int(off/Sector), off%Sector
		next := bytes.Clone(s.newest(i))
		if in >= int64(len(next)) {
			return
		}
		n := copy(next[in:], p)
		s.may[i] = append(s.may[i], next)
		s.added = append(s.added, i)
		off, p = off+int64(n), p[n:]
	}
}

func (s *Sectors) newest(i int) []byte { return s.may[i][len(s.may[i])-1] }

// Settle says that what was added last is there for sure.
func (s *Sectors) Settle() {
	for _, i := range s.added {
		s.may[i] = [][]byte{s.newest(i)}
	}
	s.added = s.added[:0]
}

// Check is an error when a sector of got, the whole disk, holds what it may not.
func (s *Sectors) Check(got []byte) error {
	n := 0
	for p := range slices.Chunk(got, Sector) {
		if n < len(s.may) && !s.Holds(n, p) {
			return fmt.Errorf("sector %d holds none of the %d things it may hold", n, len(s.may[n]))
		}
		n++
	}
	if n != len(s.may) {
		return fmt.Errorf("%d sectors, not %d", n, len(s.may))
	}
	return nil
}

// Holds reports whether p is something that sector i may hold.
func (s *Sectors) Holds(i int, p []byte) bool {
	return slices.ContainsFunc(s.may[i], func(b []byte) bool { return bytes.Equal(b, p) })
}
