package backup_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Where the only partition of a swapDisk is, bytes.
const (
	swapAt  = 1 << 20
	swapEnd = 7 << 20
	swapBig = 8 << 20 // the disk
	kept    = 64 << 10
)

// swapDisk is a disk of random data with an MBR and one partition, which has the mark of mkswap(8) when swap is true.
func swapDisk(swap bool) []byte {
	data := make([]byte, swapBig)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 512; i < len(data); i++ {
		data[i] = byte(r.Uint32())
	}
	e := data[446:]
	e[4] = 0x82
	binary.LittleEndian.PutUint32(e[8:], swapAt/512)
	binary.LittleEndian.PutUint32(e[12:], (swapEnd-swapAt)/512)
	data[510], data[511] = 0x55, 0xaa
	mark(data, swap)
	return data
}

func mark(data []byte, swap bool) {
	// mkswap(8): a version of 1 at byte 1024 and the last page's number after it.
	binary.LittleEndian.PutUint32(data[swapAt+1024:], 1)
	binary.LittleEndian.PutUint32(data[swapAt+1028:], (swapEnd-swapAt)/4096-1)
	clear(data[swapAt+1032 : swapAt+4086])
	copy(data[swapAt+4086:], "SOMETHINGX")
	if swap {
		copy(data[swapAt+4086:], "SWAPSPACE2")
	}
}

// withoutSwap is what a point has to hold.
func withoutSwap(data []byte) []byte {
	want := slices.Clone(data)
	clear(want[swapAt+2*kept : swapEnd]) // chunks are of 128 KiB, and the first 64 KiB are kept
	return want
}

func runOnce(t *testing.T, r *store.Repo, d *memDisk, at int, opt backup.Options) *store.Point {
	t.Helper()
	p, err := backup.Run(t.Context(), r, &memSnapshot{name: "vm", at: time.Unix(int64(1e9+at), 0), disks: []*memDisk{d}}, opt)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestExcludeSwap: what is swapped out is not stored and not read, the header stays, and the point says so.
func TestExcludeSwap(t *testing.T) {
	_, r := newRepo(t, store.InitOptions{})
	data := swapDisk(true)
	d := &memDisk{key: "a", data: data, bad: extent.Extent{Off: swapAt + 2*kept, Len: swapEnd - swapAt - 2*kept}, err: bytes.ErrTooLarge}
	p := runOnce(t, r, d, 0, backup.Options{Exclude: backup.Exclude{Swap: true}})
	wantDisk(t, r, p, "disk0", withoutSwap(data))
	if l := p.Disks[0].LeftOut; l == nil || len(l.Items) != 1 || l.Items[0].What != "swap area" || l.Items[0].Volume != "disk0/p1" || l.Items[0].Bytes != swapEnd-swapAt-2*kept {
		t.Errorf("the point says %+v", l)
	}
	d.bad = extent.Extent{}
	wantDisk(t, r, runOnce(t, r, d, 1, backup.Options{}), "disk0", data)
	copy(data[swapAt+4086:], "S1SUSPEND\x00") // a hibernated system
	p = runOnce(t, r, d, 2, backup.Options{Exclude: backup.Exclude{Swap: true}})
	wantDisk(t, r, p, "disk0", data)
	if p.Disks[0].LeftOut != nil {
		t.Errorf("the point says %+v", p.Disks[0].LeftOut)
	}
}

// TestExcludeChanges: with change tracking, too, a point holds what the disk had, but for what is left out: also when that became needed
// without a change, and when it had other content before.
func TestExcludeChanges(t *testing.T) {
	opt := backup.Options{Exclude: backup.Exclude{Swap: true}}
	head := extent.Extent{Off: swapAt, Len: 4096}
	middle := extent.Extent{Off: 4 << 20, Len: 1 << 20}
	_, r := newRepo(t, store.InitOptions{})
	d := &memDisk{key: "a", data: swapDisk(false), change: "0"}
	wantDisk(t, r, runOnce(t, r, d, 0, opt), "disk0", d.data)

	// It becomes swap, and something is written to it.
	mark(d.data, true)
	copy(d.data[middle.Off:], strings.Repeat("new", int(middle.Len/3)))
	d.change, d.changed = "1", map[string][]extent.Extent{"0": {head, middle}}
	p := runOnce(t, r, d, 1, opt)
	wantDisk(t, r, p, "disk0", withoutSwap(d.data))
	if p.Disks[0].Read != "changes" || p.Stats.Read > 1<<20 {
		t.Errorf("%s, %d bytes read", p.Disks[0].Read, p.Stats.Read)
	}
	if want := int64(swapBig - (swapEnd - swapAt - 2*kept)); p.Stats.Data != want {
		t.Errorf("%d bytes of data, want %d", p.Stats.Data, want)
	}

	// Nothing of that changes: nothing is read.
	d.change, d.changed = "2", map[string][]extent.Extent{"1": {}}
	if p = runOnce(t, r, d, 2, opt); p.Stats.Read > 0 {
		t.Errorf("%d bytes read", p.Stats.Read)
	}
	wantDisk(t, r, p, "disk0", withoutSwap(d.data))

	// It is no swap any more, of which only the head knows.
	mark(d.data, false)
	d.change, d.changed = "3", map[string][]extent.Extent{"2": {head}}
	p = runOnce(t, r, d, 3, opt)
	wantDisk(t, r, p, "disk0", d.data)

	// And the other way round: nothing is left out on request.
	mark(d.data, true)
	d.change, d.changed = "4", map[string][]extent.Extent{"3": {head}}
	runOnce(t, r, d, 4, opt)
	d.change, d.changed = "5", map[string][]extent.Extent{"4": {}}
	p = runOnce(t, r, d, 5, backup.Options{})
	wantDisk(t, r, p, "disk0", d.data)
	if p.Disks[0].Read != "changes" || p.Disks[0].LeftOut != nil {
		t.Errorf("%s, left out: %+v", p.Disks[0].Read, p.Disks[0].LeftOut)
	}
}
