package main

import (
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
	digits := strings.TrimRight(s, "KMBIkmbi")
	shift := 0
	switch strings.ToUpper(s[len(digits):]) {
	case "", "B":
	case "K", "KB", "KIB":
		shift = 10
	case "M", "MB", "MIB":
		shift = 20
	default:
		return 0, bad()
	}
	n, err := strconv.ParseUint(digits, 10, 31)
	if err != nil || n == 0 || n > maxChunk>>shift {
		return 0, bad()
	}
	n <<= shift
	if n < minChunk || n&(n-1) != 0 {
		return 0, bad()
	}
	return int(n), nil
}
