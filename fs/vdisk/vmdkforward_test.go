package vdisk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zlib"
)

// madeStream says how madeStream.make makes a stream: as VMware's writer does it, but for what is set.
type madeStream struct {
	grain       int64 // bytes; 0: 64 KiB
	tablesLast  bool  // all tables behind all grains
	allTables   bool  // also those that name no grains
	zeroEntries bool  // 1 for a grain of zeros
	progress    bool  // markers of progress here and there, and what is left of them in all others
	named       bool  // the header names the directory, and there is no footer
	capacity    bool  // the header rounds the capacity up to a grain
	order       []int // of the grains; nil: ascending
	lose        int   // the grain with that number in order does not come; 0: none
}

// make makes the stream of disk, whose grains of zeros do not come.
func (m madeStream) make(disk memSource) []byte {
	if m.grain == 0 {
		m.grain = vmdkGrain
	}
	sectors := int64(len(disk)) / sector
	tables := divUp(sectors*sector, m.grain*vmdkTableGrains)
	b := make([]byte, 512)
	copy(b, "KDMV")
	flags := int64(0x30001)
	if m.zeroEntries {
		flags |= 4
	}
	put32(b, 4, 3)
	put32(b, 8, flags)
	put64(b, 12, sectors)
	if m.capacity {
		put64(b, 12, roundUp(sectors*sector, m.grain)/sector)
	}
	put64(b, 20, m.grain/sector)
	put64(b, 28, 1)
	put64(b, 36, 2)
	put32(b, 44, 512)
	put64(b, 56, -1)
	put64(b, 64, 5)
	copy(b[73:], "\n \r\n\x01")
	header := bytes.Clone(b)
	b = append(b, deltaText("streamOptimized", "1", "ffffffff", "", fmt.Sprintf(`RDONLY %d SPARSE "generated-stream.vmdk"`, sectors))...)
	b = append(b, make([]byte, 5*sector-len(b))...)

	mark := make([]byte, sector)
	marker := func(n, kind int64) {
		put64(mark, 0, n)
		put32(mark, 12, kind)
		b = append(b, mark...)
	}
	entries := make([]byte, tables*vmdkTable)
	directory := make([]byte, roundUp(tables*4, sector))
	table := func(i int64) {
		e := entries[i*vmdkTable:][:vmdkTable]
		if !m.allTables && bytes.Equal(e, zeroGrain[:vmdkTable]) {
			return
		}
		marker(4, 1)
		put32(directory, int(i*4), int64(len(b)/sector))
		b = append(b, e...)
	}
	var numbers []int64
	for i := int64(0); i*m.grain < int64(len(disk)); i++ {
		if g := disk[i*m.grain : min((i+1)*m.grain, int64(len(disk)))]; bytes.Count(g, []byte{0}) < len(g) {
			numbers = append(numbers, i)
		} else if m.zeroEntries {
			put32(entries, int(i*4), 1)
		}
	}
	done := int64(0) // tables
	for k := range numbers {
		if m.order != nil {
			k = m.order[k]
		}
		i := numbers[k]
		for ; done < i/vmdkTableGrains && !m.tablesLast; done++ {
			table(done)
		}
		if m.progress && i%3 == 0 {
			put64(mark, 16, i*m.grain/sector)
			for range 4 {
				marker(0, 4)
			}
		}
		var z bytes.Buffer
		w, _ := zlib.NewWriterLevel(&z, zlib.BestSpeed)
		whole := make([]byte, m.grain)
		copy(whole, disk[i*m.grain:])
		w.Write(whole)
		w.Close()
		put32(entries, int(i*4), int64(len(b)/sector))
		if m.lose != 0 && k == m.lose {
			continue
		}
		head := make([]byte, 12)
		put64(head, 0, i*m.grain/sector)
		put32(head, 8, int64(z.Len()))
		b = append(append(b, head...), z.Bytes()...)
		b = append(b, make([]byte, (sector-len(b)%sector)%sector)...)
	}
	for ; done < tables; done++ {
		table(done)
	}
	marker(int64(len(directory))/sector, 2)
	at := int64(len(b) / sector)
	b = append(b, directory...)
	put64(header, 56, at)
	if m.named {
		copy(b, header)
	} else {
		marker(1, 3)
		b = append(b, header...)
	}
	marker(0, 0)
	return b
}

var madeStreams = map[string]madeStream{
	"made":            {},
	"tables last":     {tablesLast: true},
	"all tables":      {allTables: true},
	"zero entries":    {zeroEntries: true},
	"progress":        {progress: true},
	"header names it": {named: true},
	"capacity":        {capacity: true},
	"grains of 4 KiB": {grain: 4 * kib, tablesLast: true, allTables: true},
	"grains of 1 MiB": {grain: mib},
}

// unstream reads a whole stream.
func unstream(r io.Reader) (disk memSource, err error) {
	s, err := ReadStreamVMDK(r, "x")
	if err != nil {
		return nil, err
	}
	if s.Size() > 1<<30 {
		return nil, fmt.Errorf("%d bytes", s.Size())
	}
	disk = make(memSource, s.Size())
	p := make([]byte, s.GrainSize())
	last := int64(-1)
	for {
		off, n, err := s.Next(p)
		if err == io.EOF {
			if !s.Complete() {
				return nil, errors.New("not complete at its end")
			}
			return disk, nil
		}
		if err != nil {
			return nil, err
		}
		if off <= last || off+int64(n) > s.Size() {
			return nil, fmt.Errorf("%d bytes at %d behind %d", n, off, last)
		}
		last = off
		copy(disk[off:], p[:n])
	}
}

func streamDisks() map[string]Source {
	return map[string]Source{
		"one sector":  newModel(1, 512, ext(0, 512)),
		"zeros":       newModel(1, 5*mib),
		"noise":       newModel(2, 5*mib+512*3, ext(0, 6*mib)),
		"sparse":      compressible{randomModel(3, 40*mib+512, 40, 100*kib)},
		"two tables":  newModel(4, 70*mib, ext(32*mib-512, 1024), ext(69*mib, 10*kib)),
		"last table":  newModel(5, 100*mib, ext(99*mib, 10*kib)),
		"compression": compressible{newModel(6, 9*mib, ext(0, 9*mib))},
	}
}

func inMemory(disk Source) memSource {
	p := make(memSource, disk.Size())
	disk.ReadAt(p, 0)
	return p
}

// What qemu-img and we write, and streams made after what VMware's writer does, which qemu-img reads, too.
func TestReadStream(t *testing.T) {
	for name, d := range streamDisks() {
		disk := inMemory(d)
		check := func(t *testing.T, r io.Reader) {
			t.Helper()
			if got, err := unstream(r); err != nil || !bytes.Equal(got, disk) {
				t.Errorf("%d of %d bytes: %v", len(got), len(disk), err)
			}
		}
		t.Run("ours/"+name, func(t *testing.T) {
			var b bytes.Buffer
			if _, err := WriteStreamOptimized(context.Background(), &b, disk, testID, "x", nil); err != nil {
				t.Fatal(err)
			}
			check(t, bytes.NewReader(b.Bytes()))
			if raced && len(disk) > 6*mib {
				return
			}
			check(t, iotest.HalfReader(bytes.NewReader(b.Bytes())))
			check(t, io.MultiReader(bytes.NewReader(b.Bytes()), bytes.NewReader(make([]byte, mib))))
			f, err := StreamVMDK(disk, testID, "x")
			if err != nil {
				t.Fatal(err)
			}
			check(t, io.NewSectionReader(f, 0, f.Size()))
		})
		t.Run("qemu/"+name, func(t *testing.T) {
			if raced && len(disk) > 6*mib {
				t.Skip("large, with the race detector")
			}
			dir := t.TempDir()
			writeFiles(t, dir, map[string][]byte{"raw": disk})
			for _, options := range []string{"subformat=streamOptimized", "subformat=streamOptimized,zeroed_grain=on"} {
				mustQEMU(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, "raw", "x.vmdk")
				f, err := os.Open(filepath.Join(dir, "x.vmdk"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				check(t, f)
			}
		})
		for kind, m := range madeStreams {
			if raced && len(disk) > 6*mib {
				continue
			}
			t.Run(kind+"/"+name, func(t *testing.T) {
				b := m.make(disk)
				check(t, bytes.NewReader(b))
				if testing.Short() || m.named && strings.Contains(name, "zeros") {
					return
				}
				dir := t.TempDir()
				writeFiles(t, dir, map[string][]byte{"raw": disk, "x.vmdk": b})
				if !m.capacity { // QEMU goes by the header
					mustQEMU(t, dir, "qemu-img", "compare", "-f", "vmdk", "-F", "raw", "x.vmdk", "raw")
				}
			})
		}
	}
}

// A disk of 3 TiB, of which little is data.
func TestReadLargeStream(t *testing.T) {
	disk := newModel(1, 3*tib, ext(0, 5000), ext(tib+77, 300*kib), ext(3*tib-512, 512))
	r, w := io.Pipe()
	go func() {
		_, err := WriteStreamOptimized(context.Background(), w, disk, testID, "x", nil)
		w.CloseWithError(err)
	}()
	s, err := ReadStreamVMDK(r, "x")
	if err != nil || s.Size() != disk.size {
		t.Fatal(s, err)
	}
	p, want := make([]byte, s.GrainSize()), make([]byte, s.GrainSize())
	grains := 0
	for ; ; grains++ {
		off, n, err := s.Next(p)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if disk.ReadAt(want[:n], off); !bytes.Equal(p[:n], want[:n]) {
			t.Errorf("other bytes at %d", off)
		}
	}
	if grains < 7 || grains > 8 {
		t.Errorf("%d grains", grains)
	}
}

// sameStream reads a whole stream and holds it against disk, grain by grain.
func sameStream(r io.Reader, disk memSource) (same bool, err error) {
	s, err := ReadStreamVMDK(r, "x")
	if err != nil {
		return false, err
	}
	same = s.Size() == disk.Size()
	p := make([]byte, s.GrainSize())
	holes := func(from, to int64) bool { return from >= to || bytes.Count(disk[from:to], []byte{0}) == int(to-from) }
	next := int64(0)
	for {
		off, n, err := s.Next(p)
		if err == io.EOF {
			return same && holes(next, disk.Size()), nil
		}
		if err != nil {
			return false, err
		}
		same = same && holes(next, min(off, disk.Size())) && off+int64(n) <= disk.Size() && bytes.Equal(disk[off:off+int64(n)], p[:n])
		next = off + int64(n)
	}
}

// smallStreams are streams of one small disk, by who makes such.
func smallStreams(t testing.TB) (memSource, map[string][]byte) {
	disk := inMemory(compressible{newModel(7, 5*mib-512, ext(100, 3000), ext(200*kib, 40*kib), ext(3*mib, 5000), ext(5*mib-2048, 1536))})
	all := map[string][]byte{}
	for _, kind := range []string{"made", "progress", "zero entries", "header names it"} {
		m := madeStreams[kind]
		m.grain = 4 * kib // so that there are three tables
		all[kind] = m.make(disk)
	}
	var b bytes.Buffer
	if _, err := WriteStreamOptimized(context.Background(), &b, disk, testID, "x", nil); err != nil {
		t.Fatal(err)
	}
	all["ours"] = b.Bytes()
	all["in front"] = frontStream(all["made"])
	return disk, all
}

// frontStream makes of a made stream without other markers one as QEMU does: its tables before its grains.
func frontStream(b []byte) []byte {
	le := binary.LittleEndian
	tables := int(divUp(int64(le.Uint64(b[12:])), vmdkTableGrains*int64(le.Uint64(b[20:]))))
	front := 5*sector + int(roundUp(int64(tables)*4, sector)) + tables*vmdkTable
	out := make([]byte, front)
	copy(out, b[:5*sector])
	le.PutUint64(out[56:], 5)
	le.PutUint64(out[64:], uint64(front/sector))
	for i := range tables {
		le.PutUint32(out[5*sector+i*4:], uint32(front/sector-4*(tables-i)))
	}
	for at := 5 * sector; ; {
		if n := int(le.Uint32(b[at+8:])); n > 0 {
			number := le.Uint64(b[at:]) / le.Uint64(b[20:])
			le.PutUint32(out[front-tables*vmdkTable+int(number)*4:], uint32(len(out)/sector))
			n = int(roundUp(int64(12+n), sector))
			out = append(out, b[at:at+n]...)
			at += n
			continue
		}
		if le.Uint32(b[at+12:]) == 0 {
			return append(out, make([]byte, sector)...)
		}
		at += sector + int(le.Uint64(b[at:]))*sector
	}
}

// Whatever byte is wrong, and wherever the stream ends: an error, or the disk.
func TestReadDamagedStream(t *testing.T) {
	disk, all := smallStreams(t)
	for kind, b := range all {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			if same, err := sameStream(bytes.NewReader(b), disk); err != nil || !same {
				t.Fatal(err)
			}
			refused := 0
			try := func(what string, b []byte) {
				same, err := sameStream(bytes.NewReader(b), disk)
				if err == nil && !same {
					t.Errorf("%s: another disk", what)
				}
				if err != nil {
					refused++
				}
			}
			for n := 0; n < len(b); n += sector / 2 {
				try(fmt.Sprintf("cut to %d", n), b[:n])
				if n%sector == 0 && n+sector < len(b) {
					try(fmt.Sprintf("without sector %d", n/sector), slices.Concat(b[:n], b[n+sector:]))
				}
			}
			bad := bytes.Clone(b)
			step := 7
			if raced || testing.Short() {
				step = 101
			}
			tries := 0
			for i := 0; i < len(b); i++ {
				// Not the number of sectors in the descriptor: within a grain nothing else says it.
				number := bytes.Index(b[:3*sector], []byte(" 10239 "))
				if number <= i && i < number+7 || i%step != 0 && i >= 80 || kind == "ours" && i >= 4*sector && i < streamData {
					continue
				}
				flip := []byte{1, 0x80, 0xff, byte(1 << (i % 8))}[i/step%4]
				bad[i] ^= flip
				try(fmt.Sprintf("byte %d ^ %#x", i, flip), bad)
				bad[i] = b[i]
				tries++
			}
			if refused < tries/4 { // much of it is padding
				t.Errorf("%d refusals of %d", refused, tries)
			}
		})
	}
}

func TestReadStreamChecks(t *testing.T) {
	disk, all := smallStreams(t)
	le := binary.LittleEndian
	at := func(b []byte, kind uint32) int { // the first marker of a kind
		for i := 5 * sector; ; i += sector {
			if le.Uint64(b[i:]) < 100 && le.Uint32(b[i+8:]) == 0 && le.Uint32(b[i+12:]) == kind {
				return i
			}
		}
	}
	cut := func(kind uint32, sectors int) func(b []byte) []byte {
		return func(b []byte) []byte { i := at(b, kind); return slices.Delete(b, i, i+sectors*sector) }
	}
	u32 := func(i int, v uint32) func(b []byte) []byte {
		return func(b []byte) []byte { le.PutUint32(b[i:], v); return b }
	}
	replace := func(old, new string) func(b []byte) []byte {
		return func(b []byte) []byte {
			text := bytes.Replace(b[sector:3*sector], []byte(old), []byte(new), 1)
			text = append(text, make([]byte, 2*sector)...)
			return slices.Concat(b[:sector], text[:2*sector], b[3*sector:])
		}
	}
	grain := 5 * sector // the first one
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		want   error
		text   string
	}{
		{"sound", func(b []byte) []byte { return b }, nil, ""},
		{"no table", cut(1, 5), ErrCorrupt, "no grain table"},
		{"no directory", cut(2, 2), ErrCorrupt, "a footer where none belongs"},
		{"no footer", cut(3, 2), ErrCorrupt, "no footer"},
		{"no directory and no footer", func(b []byte) []byte { return slices.Delete(b, at(b, 2), len(b)-sector) }, ErrCorrupt, "no grain directory"},
		{"no end", func(b []byte) []byte { return b[:len(b)-sector] }, io.ErrUnexpectedEOF, ""},
		{"half an end", func(b []byte) []byte { return b[:len(b)-1] }, io.ErrUnexpectedEOF, ""},
		{"padding", func(b []byte) []byte { return append(b, make([]byte, 1000)...) }, nil, ""},
		{"more behind it", func(b []byte) []byte { return append(b, 0, 0, 1) }, ErrCorrupt, "something behind the end"},
		{"zeros without end", func(b []byte) []byte { return append(b, make([]byte, 3*mib)...) }, ErrCorrupt, "behind the end"},
		{"grain behind the directory", func(b []byte) []byte { return slices.Insert(b, at(b, 3), b[grain:grain+2*sector]...) }, ErrCorrupt, "behind the grain directory"},
		{"a grain twice", func(b []byte) []byte { return slices.Insert(b, grain, b[grain:grain+sector]...) }, ErrCorrupt, "two grains"},
		{"grain past the end", u32(grain, 5*mib/sector), ErrCorrupt, "of a disk of"},
		{"grain far past the end", func(b []byte) []byte { le.PutUint64(b[grain:], 1<<63); return b }, ErrCorrupt, "of a disk of"},
		{"grain in a grain", u32(grain, 1), ErrCorrupt, "in the middle"},
		{"long grain", u32(grain+8, 1<<31), ErrCorrupt, "compressed bytes"},
		{"marker of type 5", func(b []byte) []byte { return u32(at(b, 1)+12, 5)(b) }, ErrUnsupported, "type 5"},
		{"table of 5 sectors", func(b []byte) []byte { return u32(at(b, 1), 5)(b) }, ErrCorrupt, "instead of 4"},
		{"footer of 2 sectors", func(b []byte) []byte { return u32(at(b, 3), 2)(b) }, ErrCorrupt, "instead of 1"},
		{"table names another", func(b []byte) []byte { return u32(at(b, 1)+sector, 6)(b) }, ErrCorrupt, "grain table 0"},
		{"table names one more", func(b []byte) []byte { return u32(at(b, 1)+sector+500, 6)(b) }, ErrCorrupt, "grain table 0"},
		{"directory names another", func(b []byte) []byte { i := at(b, 2) + sector; return u32(i, le.Uint32(b[i:])+1)(b) }, ErrCorrupt, "no grain table"},
		{"directory forgets one", func(b []byte) []byte { return u32(at(b, 2)+sector, 0)(b) }, ErrCorrupt, "grain table 0"},
		{"directory swaps two", func(b []byte) []byte {
			i := at(b, 2) + sector
			a, c := le.Uint32(b[i:]), le.Uint32(b[i+4:])
			return u32(i, c)(u32(i+4, a)(b))
		}, ErrCorrupt, "grain table 0"},
		{"footer names another directory", func(b []byte) []byte { return u32(at(b, 3)+sector+56, 9)(b) }, ErrCorrupt, "the footer says"},
		{"footer of another disk", func(b []byte) []byte { return u32(at(b, 3)+sector+12, 9)(b) }, ErrCorrupt, "differ"},
		{"footer names none", func(b []byte) []byte { copy(b[at(b, 3)+sector:], b[:sector]); return b }, ErrCorrupt, "does not say"},
		{"not packed", func(b []byte) []byte { b[77] = 0; return u32(8, 1)(b) }, ErrUnsupported, "not a streamOptimized"},
		{"no markers", u32(8, 0x10001), ErrUnsupported, "not a streamOptimized"},
		{"tables of 256", u32(44, 256), ErrUnsupported, "256 entries"},
		{"small grains", u32(20, 4), ErrUnsupported, "2048 bytes"},
		{"large grains", u32(20, 1<<13), ErrUnsupported, "4194304 bytes"},
		{"huge", func(b []byte) []byte { le.PutUint64(b[12:], 1<<40); return b }, ErrUnsupported, "a disk of"},
		{"short", u32(12, 5*mib/sector-2), ErrCorrupt, "the descriptor says"},
		{"long", u32(12, 6*mib/sector), ErrCorrupt, "the descriptor says"},
		{"no descriptor", u32(28, 0), ErrUnsupported, "without a descriptor"},
		{"descriptor far away", u32(28, 1<<30), io.ErrUnexpectedEOF, ""},
		{"createType", replace("streamOptimized", "monolithicSparse"), ErrUnsupported, "monolithicSparse"},
		{"parent", replace("ffffffff\n", "12345678\nparentFileNameHint=\"x\"\n"), ErrUnsupported, "parent"},
		{"flat extent", replace("SPARSE", "FLAT"), ErrUnsupported, "other extents"},
		{"descriptor file", func(b []byte) []byte { return b[sector : 3*sector] }, ErrUnsupported, "not a streamOptimized"},
		{"raw", func(b []byte) []byte { return make([]byte, 10000) }, ErrCorrupt, "not a VMDK"},
		{"nothing", func(b []byte) []byte { return nil }, io.ErrUnexpectedEOF, ""},
		{"out of order", func([]byte) []byte { return madeStream{order: []int{1, 0, 2, 3}, tablesLast: true}.make(disk) }, ErrUnsupported, "comes behind"},
		{"a lost grain", func([]byte) []byte { return madeStream{lose: 2}.make(disk) }, ErrCorrupt, "grain table 0"},
	} {
		got, err := unstream(bytes.NewReader(c.change(bytes.Clone(all["made"]))))
		if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil && !bytes.Equal(got, disk) {
			t.Errorf("%s: another disk", c.name)
		}
	}

	// With the tables in front, what they name is the end, too.
	front := all["in front"]
	if _, err := unstream(bytes.NewReader(front[:len(front)-sector])); err != nil {
		t.Errorf("no marker of the end: %v", err)
	}
	last := len(front) - 2*sector
	if _, err := unstream(bytes.NewReader(front[:last])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("no last grain: %v", err)
	}
	if _, err := unstream(bytes.NewReader(append(front[:last:last], make([]byte, sector)...))); !errors.Is(err, ErrCorrupt) {
		t.Errorf("no last grain, but an end: %v", err)
	}
	// An error of the connection stays that error.
	if _, err := unstream(io.MultiReader(bytes.NewReader(all["ours"][:7000]), iotest.ErrReader(os.ErrDeadlineExceeded))); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an error of the reader: %v", err)
	}
}

// A header alone takes little memory, whatever it says, and an endless stream ends.
func TestReadStreamMemory(t *testing.T) {
	_, all := smallStreams(t)
	b := bytes.Clone(all["in front"])
	binary.LittleEndian.PutUint64(b[12:], 1<<47/sector)
	b = bytes.Replace(b, fmt.Appendf(nil, "RDONLY %d", (5*mib-512)/sector), fmt.Appendf(nil, "RDONLY %d", 1<<47/sector), 1)[:len(b)]
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := unstream(bytes.NewReader(b)); err == nil {
		t.Error("a disk of 128 TiB was read")
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2*mib {
		t.Errorf("%d bytes allocated", n)
	}
}

// Nothing is allocated for a grain.
func TestReadStreamAllocates(t *testing.T) {
	if raced {
		t.Skip("-race: a pool drops what it holds")
	}
	disk := inMemory(text{newModel(6, 8*mib, ext(0, 8*mib))})
	s, err := ReadStreamVMDK(bytes.NewReader(madeStreams["made"].make(disk)), "x")
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, s.GrainSize())
	if n := testing.AllocsPerRun(100, func() {
		if _, _, err := s.Next(p); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations a grain", n)
	}
}

func FuzzReadStreamVMDK(f *testing.F) {
	b := packedVMDK()
	f.Add(b[:80], b[1024:])
	front := make([]byte, 10*sector)
	put64(front, 0, 0)
	f.Add(b[:64], front)
	f.Fuzz(func(t *testing.T, header, rest []byte) {
		b := bytes.Clone(b[:2*sector])
		copy(b, header[:min(len(header), 80)])
		b = append(b, rest...)
		s, err := ReadStreamVMDK(bytes.NewReader(b), "x")
		if err != nil {
			return
		}
		p := make([]byte, s.GrainSize())
		for next := int64(0); ; {
			off, n, err := s.Next(p)
			if err != nil {
				return
			}
			if off < next || off+int64(n) > s.Size() || n > len(p) {
				t.Fatalf("%d bytes at %d behind %d", n, off, next)
			}
			next = off + int64(n)
		}
	})
}

// A stream of 64 MiB of each sort, read by one goroutine.
func BenchmarkReadStream(b *testing.B) {
	disk := newModel(1, 64*mib, ext(0, 64*mib))
	for name, src := range map[string]Source{"noise": disk, "runs": compressible{disk}, "text": text{disk}} {
		b.Run(name, func(b *testing.B) {
			var stream bytes.Buffer
			if _, err := WriteStreamOptimized(context.Background(), &stream, inMemory(src), testID, "x", nil); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(stream.Len())/float64(disk.size), "size")
			b.SetBytes(disk.size)
			for b.Loop() {
				s, err := ReadStreamVMDK(bytes.NewReader(stream.Bytes()), "x")
				p := make([]byte, vmdkGrain)
				for err == nil {
					_, _, err = s.Next(p)
				}
				if err != io.EOF {
					b.Fatal(err)
				}
			}
		})
	}
}

// text makes of noise what shrinks to about half.
type text struct{ *model }

func (x text) ReadAt(p []byte, off int64) (int, error) {
	n, err := x.model.ReadAt(p, off)
	for i := range p[:n] {
		p[i] = "etaoin shrdluETA"[p[i]&15]
	}
	return n, err
}
