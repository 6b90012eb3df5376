package xfs

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// withSuper is the golden disk with the superblock changed and its checksum made good.
func withSuper(t *testing.T, change func(sb []byte)) *memory {
	t.Helper()
	disk := goldenDisk(t)
	sb := disk.page(0)[:512]
	change(sb)
	le.PutUint32(sb[224:], checksum(sb, 224))
	return disk
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(sb []byte)
		err    error
		text   string
	}{
		"metadir":     {func(sb []byte) { sb[218] |= 1 }, guest.ErrUnsupported, "metadir"},
		"zoned":       {func(sb []byte) { sb[218] |= 6 }, guest.ErrUnsupported, "zoned, zone gaps"},
		"unknown":     {func(sb []byte) { sb[216] = 0x80 }, guest.ErrUnsupported, "bit 1f"},
		"version 3":   {func(sb []byte) { sb[101] = sb[101]&0xf0 | 3 }, guest.ErrUnsupported, "version 3"},
		"block size":  {func(sb []byte) { sb[7] = 1 }, guest.ErrDamaged, "sizes"},
		"no XFS":      {func(sb []byte) { sb[0] = 'Y' }, guest.ErrUnknown, ""},
		"no XFS, all": {func(sb []byte) { clear(sb) }, guest.ErrUnknown, ""},
	} {
		_, err := Open(withSuper(t, c.change), guest.Options{})
		if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWarned opens disks that can be read, but not as they should be.
func TestWarned(t *testing.T) {
	for name, c := range map[string]struct {
		change func(sb []byte)
		text   string
	}{
		"needs repair":  {func(sb []byte) { sb[219] |= incompatNeedsRepair }, "xfs_repair"},
		"log elsewhere": {func(sb []byte) { clear(sb[48:56]) }, "another device"},
		"newer log":     {func(sb []byte) { sb[223] |= 0x10 }, "newer log"},
	} {
		fs, err := Open(withSuper(t, c.change), guest.Options{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if w := fs.Info().Warnings; len(w) != 1 || !strings.Contains(w[0], c.text) {
			t.Errorf("%s: %q", name, w)
		}
		if _, err := fs.Stat(fs.Root()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, err := range fs.Free() {
			if err == nil && !fs.info.Replayed {
				t.Errorf("%s: free space is told", name)
			}
			break
		}
	}
}

func TestEndMissing(t *testing.T) {
	base := goldenDisk(t).base
	fs, err := Open(&memory{base[:len(base)-8192], map[int64][]byte{}}, guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if w := fs.Info().Warnings; len(w) != 1 || !strings.Contains(w[0], "its end is missing") {
		t.Errorf("%q", w)
	}
}

// TestBrokenLog damages a record that cannot have been in flight: the log is not replayed, as the kernel would not mount it.
func TestBrokenLog(t *testing.T) {
	m := newMangler(t)
	if len(m.recs) < inFlight+2 {
		t.Skipf("only %d records", len(m.recs))
	}
	disk := goldenDisk(t)
	off := m.ring.off + (m.recs[0].at+m.recs[0].heads)*sector + 50
	disk.page(off)[off%memoryPage] ^= 1
	fs, err := Open(disk, guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if i := fs.Info(); i.Replayed || len(i.Warnings) != 1 || !strings.Contains(i.Warnings[0], "not replayed") {
		t.Errorf("%+v", i)
	}
}

func TestJournalTooLarge(t *testing.T) {
	for _, room := range []int64{1, 1000, 100000} {
		if _, err := Open(goldenDisk(t), guest.Options{Journal: room}); !errors.Is(err, guest.ErrUnsupported) {
			t.Errorf("%d bytes: %v", room, err)
		}
	}
}

// TestUnfinished carries out transactions that announce changes of a file's mapping or attributes and do not make them.
func TestUnfinished(t *testing.T) {
	fs, err := Open(goldenDisk(t), guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ino, err := guesttest.Find(fs, "churn/last")
	if err != nil {
		t.Fatal(err)
	}
	words := func(kind, regions uint16, rest ...uint64) item {
		b := binary.LittleEndian.AppendUint16(nil, kind)
		b = binary.LittleEndian.AppendUint16(b, regions)
		b = binary.LittleEndian.AppendUint32(b, 1)
		for _, w := range rest {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		return item{regions: [][]byte{b}, want: int(regions)}
	}
	for _, c := range []struct {
		items       []item
		open, xattr bool // can be read
	}{
		{nil, true, true},
		{[]item{words(itemBUI, 1, 77, uint64(ino), 5, 0, 1)}, false, false},           // of no type
		{[]item{words(itemBUI, 1, 77, uint64(ino), 5, 0, 1|1<<32)}, true, true},       // carried out
		{[]item{words(itemBUI, 1, 77, uint64(ino), 1<<40, 0, 1|1<<32)}, false, false}, // past the end
		{[]item{words(itemBUI, 1, 77, uint64(ino), 5, 0, 1), words(itemBUD, 1, 77)}, true, true},
		{[]item{words(itemBUI, 1, 77, uint64(ino), 5, 0, 1), words(itemBUD, 1, 78)}, false, false},
		{[]item{words(itemATTRI, 1, 9, uint64(ino), 0)}, true, false},
		{[]item{words(itemXMI, 1, 9, 3, uint64(ino))}, false, false},
		{[]item{words(itemEFI, 1, 9, 3, 4)}, true, true},
	} {
		r := &replayer{fs: fs, over: guest.NewOverlay(fs.dev, 1024, 1<<20), replayed: newReplayed(), intents: map[intentKey]*intent{}}
		if err := r.transaction(&trans{lsn: 1, items: c.items}); err != nil {
			t.Fatal(err)
		}
		fs.log = replayed{}
		if err := r.finish(); err != nil {
			t.Fatal(err)
		}
		_, err := fs.Open(ino)
		_, xerr := fs.Xattrs(ino)
		if (err == nil) != c.open || (xerr == nil) != c.xattr || err != nil && !errors.Is(err, guest.ErrUnsupported) {
			t.Errorf("%v: %v, %v", c.items, err, xerr)
		}
	}
}

// TestSplit puts transactions together of regions that go on in another record.
func TestSplit(t *testing.T) {
	op := func(flags byte, data []byte) []byte {
		b := be.AppendUint32(nil, 7)
		b = be.AppendUint32(b, uint32(len(data)))
		return append(append(b, 0x69, flags, 0, 0), data...)
	}
	head := make([]byte, transHeader)
	le.PutUint32(head, transMagic)
	region := []byte{0x3c, 0x12, 2, 0, 5, 6, 7, 8}
	var got *trans
	a := assembler{open: map[uint32]*trans{}, room: 10000, commit: func(t *trans) error { got = t; return nil }}
	for i, data := range [][][]byte{
		{op(opStart, nil), op(opContinue, head[:10])},
		{op(opWasCont|opEnd, head[10:]), op(0, region), op(opContinue, []byte("one "))},
		{op(opWasCont|opContinue, []byte("two "))},
		{op(opWasCont|opEnd, []byte("three")), op(opCommit, nil)},
	} {
		if err := a.record(&record{lsn: uint64(i + 1), ops: len(data)}, slices.Concat(data...)); err != nil {
			t.Fatal(err)
		}
	}
	if got == nil || got.lsn != 1 || len(got.items) != 1 || !bytes.Equal(got.items[0].regions[1], []byte("one two three")) {
		t.Errorf("%+v", got)
	}
	if a.room != 10000 {
		t.Errorf("%d bytes of room left of 10000", a.room)
	}
}

// FuzzRecord takes in records.
func FuzzRecord(f *testing.F) {
	f.Add([]byte{0, 0, 0, 7, 0, 0, 0, 0, 0x69, opStart, 0, 0}, 1)
	fs, err := Open(goldenDisk(f), guest.Options{})
	if err != nil {
		f.Fatal(err)
	}
	m := newMangler(f)
	slices.SortFunc(m.recs, func(a, b record) int { return cmp.Compare(a.size, b.size) })
	for _, rec := range m.recs[:3] {
		data, err := m.ring.load(&rec, true)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, rec.ops)
	}
	f.Fuzz(func(t *testing.T, data []byte, ops int) {
		r := &replayer{fs: fs, over: guest.NewOverlay(fs.dev, 1024, 1<<20), pages: map[int64][]byte{}, cancelled: map[place]int{}, cancelledAt: map[uint64]int{},
			replayed: newReplayed(), intents: map[intentKey]*intent{}}
		a := assembler{open: map[uint32]*trans{}, room: 1 << 20, commit: func(t *trans) error {
			if err := r.cancels(t); err != nil {
				return err
			}
			return r.transaction(t)
		}}
		_ = a.record(&record{lsn: 1 << 40, ops: min(max(ops, 0), 1000)}, data)
	})
}
