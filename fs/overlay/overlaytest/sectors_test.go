package overlaytest

import (
	"bytes"
	"testing"
)

// TestSectors: old and new are fine until the flush, new alone after it; anything else never is.
func TestSectors(t *testing.T) {
	old := bytes.Repeat([]byte{1}, 2*Sector+100)
	write := bytes.Repeat([]byte{2}, Sector)
	now := bytes.Clone(old)
	copy(now[300:], write)
	half := bytes.Clone(old) // the first sector written, the second not
	copy(half[300:], write[:Sector-300])
	other := bytes.Clone(now)
	other[2*Sector+99]++

	s := New(old)
	s.Add(300, write)
	s.Add(2*Sector+100, write) // past the end
	for _, ok := range [][]byte{old, now, half} {
		if err := s.Check(ok); err != nil {
			t.Error(err)
		}
	}
	s.Settle()
	if err := s.Check(now); err != nil {
		t.Error(err)
	}
	for _, bad := range [][]byte{old, half, other, now[:2*Sector], now[:2*Sector+99], append(bytes.Clone(now), write...)} {
		if s.Check(bad) == nil {
			t.Errorf("%d bytes are fine", len(bad))
		}
	}
}
