package ntfs

import (
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// run is n clusters of a stream, from cluster vcn of it on, that lie one after the other from cluster lcn of the volume on.
type run struct {
	vcn, lcn, n int64
}

const (
	hole = -1 // lcn of a run that is nowhere and reads as zeros
	// maxVCN keeps offsets in bytes within an int64.
	maxVCN = 1 << 41
)

// decodeRuns reads mapping pairs (NTFS doc, "Data Runs"), those of the clusters from low to high of a stream, on a volume of so
// many clusters. Each pair is a byte with the sizes of both numbers, a length, and the signed distance from the run before.
func decodeRuns(pairs []byte, low, high, clusters int64) ([]run, error) {
	var runs []run
	vcn, lcn := low, int64(0)
	for len(pairs) > 0 && pairs[0] != 0 {
		lenSize, offSize := int(pairs[0]&15), int(pairs[0]>>4)
		if lenSize == 0 || lenSize > 8 || offSize > 8 || len(pairs) < 1+lenSize+offSize {
			return nil, guest.Damaged("run list: a header of %#02x with %d bytes left", pairs[0], len(pairs))
		}
		r := run{vcn, hole, signed(pairs[1 : 1+lenSize])}
		if r.n <= 0 || r.n > maxVCN-vcn {
			return nil, guest.Damaged("run list: a run of %d clusters", r.n)
		}
		if offSize > 0 {
			lcn += signed(pairs[1+lenSize : 1+lenSize+offSize])
			if r.lcn = lcn; lcn < 0 || lcn > clusters-r.n {
				return nil, guest.Damaged("run list: clusters %d+%d of a volume of %d", lcn, r.n, clusters)
			}
		}
		runs = appendRun(runs, r)
		vcn += r.n
		pairs = pairs[1+lenSize+offSize:]
	}
	if vcn != high+1 {
		return nil, guest.Damaged("run list: ends at %d and not %d", vcn, high+1)
	}
	return runs, nil
}

// appendRun merges a run with the last when they touch.
func appendRun(runs []run, r run) []run {
	if n := len(runs); n > 0 {
		last := &runs[n-1]
		if r.lcn == hole && last.lcn == hole || r.lcn != hole && last.lcn != hole && r.lcn == last.lcn+last.n {
			last.n += r.n
			return runs
		}
	}
	return append(runs, r)
}

// signed is a little-endian number of 1 to 8 bytes.
func signed(b []byte) int64 {
	v := int64(int8(b[len(b)-1]))
	for i := len(b) - 2; i >= 0; i-- {
		v = v<<8 | int64(b[i])
	}
	return v
}

// find gives the place in runs of the run that has the cluster vcn, or where it would be.
func find(runs []run, vcn int64) int {
	i, ok := slices.BinarySearchFunc(runs, vcn, func(r run, vcn int64) int { return int(min(1, max(-1, r.vcn-vcn))) })
	if !ok {
		i--
	}
	return i
}
