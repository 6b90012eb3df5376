package registry

import (
	"bytes"
	"encoding/hex"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestMarvin: the heads of two entries that Windows 10 wrote, each with the hash of its first 32 bytes behind them.
func TestMarvin(t *testing.T) {
	for _, head := range []string{
		"48764c45005e00000000000002000000005000000100000031e40718666c8667027f65a7cff344cd",
		"48764c45001e0000000000000300000000500000010000005d1e700717a84647677287f6afdc37e6",
	} {
		b, err := hex.DecodeString(head)
		if err != nil {
			t.Fatal(err)
		}
		if got := marvin32(b[:32]); got != le.Uint64(b[32:]) {
			t.Errorf("%x", got)
		}
	}
}

// page is a page of the bins that differs.
type page struct {
	off  int
	data []byte
}

// changed gives the pages of size bytes in which two hives differ, all behind the end of the first.
func changed(before, after []byte, size int) (list []page) {
	for off := 0; off < len(after)-baseSize; off += size {
		at := baseSize + off
		if at >= len(before) || !bytes.Equal(before[at:at+size], after[at:at+size]) {
			list = append(list, page{off, after[at : at+size]})
		}
	}
	return list
}

// logBase makes the first sector of a log.
func logBase(of []byte, kind, sequence uint32) []byte {
	b := bytes.Clone(of[:512])
	for at, v := range map[int]uint32{4: sequence, 8: sequence, 28: kind} {
		le.PutUint32(b[at:], v)
	}
	guesttest.SumHive(b)
	return b
}

// oldLog makes a log of the old format that changes one hive into another.
func oldLog(before, after []byte) []byte {
	pages := changed(before, after, 512)
	bitmap := make([]byte, (4+(len(after)-baseSize)/512/8+511)/512*512)
	copy(bitmap, "DIRT")
	log := append(logBase(after, typeLog, 2), bitmap...)
	for _, p := range pages {
		log[512+4+p.off/512/8] |= 1 << (p.off / 512 % 8)
		log = append(log, p.data...)
	}
	return append(log, "what an earlier log left"...)
}

// entry makes an entry of a log of the new format.
func entry(pages []page, bins int, sequence uint32) []byte {
	e := append([]byte("HvLE"), make([]byte, entryHead-4)...)
	for _, p := range pages {
		e = le.AppendUint32(le.AppendUint32(e, uint32(p.off)), uint32(len(p.data)))
	}
	for _, p := range pages {
		e = append(e, p.data...)
	}
	e = append(e, make([]byte, -len(e)&511)...)
	for at, v := range map[int]uint32{4: uint32(len(e)), 12: sequence, 16: uint32(bins), 20: uint32(len(pages))} {
		le.PutUint32(e[at:], v)
	}
	le.PutUint64(e[24:], marvin32(e[entryHead:]))
	le.PutUint64(e[32:], marvin32(e[:32]))
	return e
}

// states are a hive as hivex has it after each of some changes, and lines of its dump.
func states(t *testing.T) (images [][]byte, dumps [][]string) {
	t.Helper()
	all := sample()
	for n := 1; n <= 4; n++ {
		b, err := os.ReadFile(guesttest.Hive(t, all[:len(all)*n/4]))
		if err != nil {
			t.Fatal(err)
		}
		bins := int(le.Uint32(b[40:]))
		b = b[:baseSize+bins]
		le.PutUint64(b[12:], 77)
		le.PutUint32(b[4:], 10)
		le.PutUint32(b[8:], 10)
		guesttest.SumHive(b)
		images = append(images, b)
		dumps = append(dumps, dumped(t, memory(b)))
	}
	return images, dumps
}

func dumped(t *testing.T, primary guest.Device, logs ...guest.Device) []string {
	t.Helper()
	h, err := Open(primary, logs...)
	if err != nil {
		t.Fatal(err)
	}
	list, err := dump(h)
	if err != nil {
		t.Fatal(err)
	}
	if len(h.Warnings) > 0 {
		list = append(list, h.Warnings...)
	}
	return list
}

// dirty makes a hive that was being written.
func dirty(b []byte) memory {
	b = bytes.Clone(b)
	le.PutUint32(b[4:], le.Uint32(b[8:])+1)
	guesttest.SumHive(b)
	return memory(b)
}

// TestLogs: what logs hold is applied when the hive is dirty, and only then.
func TestLogs(t *testing.T) {
	image, want := states(t)
	log := func(kind int, first uint32, states ...int) memory { // the changes from each state to the next
		b := logBase(image[0], typeLogEntry, first)
		for i := 1; i < len(states); i++ {
			from, to := image[states[i-1]], image[states[i]]
			b = append(b, entry(changed(from, to, kind), len(to)-baseSize, first+uint32(i-1))...)
		}
		return append(b, "HvLE and what is left of others"...)
	}
	noBase := memory(bytes.Clone(dirty(image[0])))
	noBase[20] ^= 0xff
	le.PutUint64(noBase[baseSize+20:], 77)
	damaged := log(4096, 10, 0, 1, 2)
	damaged[len(damaged)-600] ^= 1
	old := memory(oldLog(image[0], image[2]))
	for name, c := range map[string]struct {
		primary memory
		logs    []guest.Device
		want    []string
	}{
		"clean":             {memory(image[0]), []guest.Device{log(512, 10, 0, 1)}, want[0]},
		"one":               {dirty(image[0]), []guest.Device{log(512, 10, 0, 1)}, want[1]},
		"many":              {dirty(image[0]), []guest.Device{log(4096, 10, 0, 1, 2, 3)}, want[3]},
		"two logs":          {dirty(image[0]), []guest.Device{log(512, 11, 1, 2, 3), log(512, 10, 0, 1)}, want[3]},
		"a log is missing":  {dirty(image[0]), []guest.Device{log(512, 12, 2, 3), log(512, 10, 0, 1)}, want[1]},
		"damaged second":    {dirty(image[0]), []guest.Device{damaged}, want[1]},
		"of before":         {dirty(image[1]), []guest.Device{log(512, 7, 0, 1)}, append(slices.Clone(want[1]), "a registry hive was being changed, and no log has these changes: it is read without them")},
		"empty":             {dirty(image[1]), []guest.Device{memory{}, memory(make([]byte, 4096))}, append(slices.Clone(want[1]), "a registry hive was being changed, and no log has these changes: it is read without them")},
		"old":               {dirty(image[0]), []guest.Device{memory{}, old}, want[2]},
		"no base":           {noBase, []guest.Device{log(512, 10, 0, 1)}, want[1]},
		"no base, two logs": {noBase, []guest.Device{log(512, 10, 0, 1), log(512, 11, 0, 2)}, want[2]},
		"no base, old log":  {noBase, []guest.Device{old}, want[2]},
	} {
		if got := dumped(t, c.primary, c.logs...); !slices.Equal(got, c.want) {
			t.Errorf("%s: %d lines, not %d", name, len(got), len(c.want))
		}
	}
	if _, err := Open(noBase); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Error(err)
	}
}

// TestBroken: whatever a hive and its log say, reading them ends.
func TestBroken(t *testing.T) {
	image := build()
	log := append(logBase(image, typeLogEntry, 1), entry(changed(make([]byte, len(image)), image, 4096), len(image)-baseSize, 1)...)
	rnd := rand.New(rand.NewPCG(3, 3))
	for range 3000 {
		a, b := dirty(image), bytes.Clone(log)
		for range rnd.IntN(6) {
			a[rnd.IntN(len(a))] = byte(rnd.Uint32())
			a[baseSize+rnd.IntN(3000)] = byte(rnd.Uint32())
			b[rnd.IntN(700)] = byte(rnd.Uint32())
		}
		guesttest.SumHive(a)
		guesttest.SumHive(b)
		if rnd.IntN(4) == 0 {
			b = b[:rnd.IntN(len(b))]
		}
		walk(t, a, memory(b))
	}
}

func walk(t *testing.T, primary memory, log memory) {
	h, err := Open(primary, log)
	if err != nil {
		return
	}
	lines, _ := dump(h)
	if len(lines) >= maxDump {
		t.Fatal("no end")
	}
	h.Key(`lf020\x`)
	h.Key(`lh020\x`)
}

func FuzzHive(f *testing.F) {
	image := build()[:baseSize+8192]
	f.Add([]byte(dirty(image)), []byte{})
	f.Add([]byte(dirty(image)), append(logBase(image, typeLogEntry, 1), entry([]page{{0, image[baseSize:]}}, 8192, 1)...))
	f.Add([]byte(dirty(image)), oldLog(make([]byte, len(image)), image))
	f.Fuzz(func(t *testing.T, hive, log []byte) {
		for _, b := range [][]byte{hive, log} {
			if len(b) >= 512 {
				guesttest.SumHive(b)
			}
		}
		walk(t, hive, log)
	})
}
