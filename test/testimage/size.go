//go:build linux

package testimage

import (
	"fmt"
	"strconv"
	"strings"
)

// ParseSize reads a number of bytes with an optional unit: 4096, 64K, 512M, 4G.
func ParseSize(s string) (int64, error) {
	shift := 0
	switch strings.ToUpper(s[max(0, len(s)-1):]) {
	case "K":
		shift = 10
	case "M":
		shift = 20
	case "G":
		shift = 30
	}
	digits := s
	if shift > 0 {
		digits = s[:len(s)-1]
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > 1<<62>>shift {
		return 0, fmt.Errorf("size %q: want a number with K, M or G", s)
	}
	return n << shift, nil
}

// SizeFlag is a flag.Value that takes what ParseSize reads.
type SizeFlag int64

func (f *SizeFlag) String() string {
	n := int64(*f)
	for i, unit := range []string{"G", "M", "K"} {
		if u := int64(1) << (30 - 10*i); n >= u && n%u == 0 {
			return strconv.FormatInt(n/u, 10) + unit
		}
	}
	return strconv.FormatInt(n, 10)
}

// Set implements flag.Value.
func (f *SizeFlag) Set(s string) error {
	n, err := ParseSize(s)
	*f = SizeFlag(n)
	return err
}
