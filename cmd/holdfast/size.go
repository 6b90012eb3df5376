package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Bounds of the chunk size, in bytes; DESIGN fixes them.
const (
	minChunk = 64 << 10
	maxChunk = 4 << 20
)

// chunkSize parses a size as users write it: 131072, 128K, 1M, 4MiB, in binary
// units and either case. Anything but a power of two within the bounds is a usage error.
func chunkSize(s string) (bytes int, err error) {
	bad := func() error {
		return withHint(usagef("no such chunk size: %q", s), "a power of two from 64K to 4M, such as 128K or 1MiB")
	}
	n, err := byteSize(s)
	if err != nil || n > maxChunk || n < minChunk || n&(n-1) != 0 {
		return 0, bad()
	}
	return int(n), nil
}

// byteSize parses a number of bytes as users write it, 10G, 512MiB or 4096, in binary units and
// either case. It is more than 0.
func byteSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "KMGTBIkmgtbi")
	shift := 0
	switch strings.ToUpper(s[len(digits):]) {
	case "", "B":
	case "K", "KB", "KIB":
		shift = 10
	case "M", "MB", "MIB":
		shift = 20
	case "G", "GB", "GIB":
		shift = 30
	case "T", "TB", "TIB":
		shift = 40
	default:
		return 0, fmt.Errorf("%q is no number of bytes", s)
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n == 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is no number of bytes", s)
	}
	return int64(n) << shift, nil
}
