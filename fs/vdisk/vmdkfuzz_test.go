package vdisk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/klauspost/compress/zlib"
)

// smallESX has a grain of each sort.
func smallESX(sectors, grain int64) esxDisk {
	d := esxDisk{sectors: sectors, grain: grain, seed: 1, states: make([]esxState, (sectors+grain-1)/grain)}
	copy(d.states, []esxState{esxData, esxZero, esxAbsent, esxData, esxData, esxAbsent, esxData})
	for i := range d.states {
		if d.states[i] == esxZero && grain == 1 {
			d.states[i] = esxAbsent // COWD
		}
	}
	return d
}

// packedVMDK is a stream with two grains, whose directory the footer knows.
func packedVMDK() []byte {
	return packedVMDKOf(func(n int) []byte { return bytes.Repeat([]byte("grain!! "), 1024)[:n] })
}

// packedVMDKOf takes what the grains of n bytes unpack to.
func packedVMDKOf(grain func(n int) []byte) []byte {
	text := deltaText("streamOptimized", "1", "ffffffff", "", `RW 40 SPARSE "x"`)
	b := make([]byte, 512)
	copy(b, "KDMV")
	put32(b, 4, 3)
	put32(b, 8, 0x30001)
	put64(b, 12, 40)
	put64(b, 20, 16)
	put64(b, 28, 1)
	put64(b, 36, 1)
	put32(b, 44, 512)
	put64(b, 56, -1)
	put64(b, 64, 2)
	copy(b[73:], "\n \r\n\x01")
	header := bytes.Clone(b)
	b = append(b, text...)
	b = append(b, make([]byte, 2*512-len(b))...)
	pad := func() { b = append(b, make([]byte, (512-len(b)%512)%512)...) }
	marker := func(n int64, kind int64) {
		m := make([]byte, 512)
		put64(m, 0, n)
		put32(m, 12, kind)
		b = append(b, m...)
	}
	table := make([]byte, 2048)
	for _, i := range []int64{0, 2} {
		var z bytes.Buffer
		w := zlib.NewWriter(&z)
		w.Write(grain(int(min(16*512, 40*512-i*16*512)))) // the last one ends with the disk
		w.Close()
		put32(table, int(i)*4, int64(len(b)/512))
		m := make([]byte, 12)
		put64(m, 0, i*16)
		put32(m, 8, int64(z.Len()))
		b = append(append(b, m...), z.Bytes()...)
		pad()
	}
	marker(4, 1)
	at := int64(len(b) / 512)
	b = append(b, table...)
	marker(1, 2)
	dir := int64(len(b) / 512)
	b = append(b, make([]byte, 512)...)
	put32(b, int(dir*512), at)
	marker(1, 3)
	put64(header, 56, dir)
	b = append(b, header...)
	marker(0, 0)
	return b
}

func vmdkSeeds() [][]byte {
	line := `RW 7 SPARSE "x"`
	small := smallESX(7, 1)
	small.states[2] = esxZero
	return [][]byte{
		writeHosted(small, deltaText("monolithicSparse", "1", "ffffffff", "", line)),
		writeHosted(small, deltaText("monolithicSparse", "1", "2", "base", line)),
		packedVMDK(),
	}
}

// parentVMDK is a disk with the content id 2.
func parentVMDK(t testing.TB) *VMDKImage {
	text := deltaText("monolithicFlat", "2", "ffffffff", "", `RW 70 FLAT "x" 0`)
	v, err := OpenVMDK(bytes.NewReader(text), int64(len(text)), VMDKOptions{
		Extent: func(string) (io.ReaderAt, int64, error) { return newModel(1, 70*512, ext(100, 20000)), 70 * 512, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func tryVMDK(t *testing.T, b []byte, off uint64, n uint16, extents func(name string) []byte) {
	img, err := OpenVMDK(bytes.NewReader(b), int64(len(b)), VMDKOptions{
		TableCache: 16 * kib,
		Parent:     func(string) (*VMDKImage, error) { return parentVMDK(t), nil },
		Extent: func(name string) (io.ReaderAt, int64, error) {
			b := extents(name)
			return bytes.NewReader(b), int64(len(b)), nil
		},
	})
	tryReads(t, img, err, off, n)
}

// Beside the descriptor, the header and what is behind it are anything.
func FuzzVMDK(f *testing.F) {
	all := vmdkSeeds()
	for i, b := range all {
		f.Add(byte(i), b[:80], b[1024:min(len(b), 1024+8*512)], uint64(100), uint16(9000))
	}
	f.Fuzz(func(t *testing.T, i byte, header, rest []byte, off uint64, n uint16) {
		b := bytes.Clone(all[int(i)%len(all)])
		copy(b, header[:min(len(header), 80)])
		copy(b[1024:], rest)
		tryVMDK(t, b, off, n, func(string) []byte { return b })
	})
}

func FuzzVMDKDescriptor(f *testing.F) {
	f.Add(deltaText("twoGbMaxExtentFlat", "1", "2", "base", `RW 10 FLAT "x" 0`, `RDONLY 10 ZERO`, `RW 20 FLAT "x" 10`), uint64(7), uint16(100))
	f.Add(deltaText("seSparse", "1", "ffffffff", "", `RW 60 SESPARSE "se"`), uint64(7), uint16(9000))
	f.Add(deltaText("vmfsSparse", "1", "2", "base", `RW 60 VMFSSPARSE "cowd"`), uint64(7), uint16(9000))
	f.Add(deltaText("custom", "1", "2", "base", `RW 60 VMFSRDM "x"`), uint64(7), uint16(9000))
	cowd, hosted := writeCOWD(smallESX(60, 1)), writeHosted(smallESX(60, 8), nil)
	f.Fuzz(func(t *testing.T, b []byte, off uint64, n uint16) {
		tryVMDK(t, b, off, n, func(name string) []byte {
			switch name {
			case "cowd":
				return cowd
			case "hosted":
				return hosted
			}
			return make([]byte, 30*512)
		})
	})
}

// The header and directory, and the table, are given apart: a table has 16 KiB.
func FuzzCOWD(f *testing.F) {
	whole := writeCOWD(smallESX(60, 1))
	f.Add(whole[:2048+16], whole[2560:2560+64], uint64(100), uint16(9000))
	text := deltaText("vmfsSparse", "1", "2", "base", `RW 60 VMFSSPARSE "x"`)
	f.Fuzz(func(t *testing.T, header, table []byte, off uint64, n uint16) {
		b := bytes.Clone(whole)
		copy(b, header[:min(len(header), 2560)])
		copy(b[2560:], table[:min(len(table), 4096)])
		tryVMDK(t, text, off, n, func(string) []byte { return b })
	})
}

// The header and the directory and tables are given apart: between them is a MiB.
func FuzzSESparse(f *testing.F) {
	whole := writeSESparse(smallESX(60, 8))
	directory, tables := 4096*512, 6144*512
	f.Add(whole[:1024], whole[directory:directory+16], whole[tables:tables+64], uint64(100), uint16(9000))
	text := deltaText("seSparse", "1", "2", "base", `RW 60 SESPARSE "x"`)
	f.Fuzz(func(t *testing.T, header, dir, table []byte, off uint64, n uint16) {
		b := bytes.Clone(whole)
		copy(b, header[:min(len(header), 1024)])
		copy(b[directory:], dir[:min(len(dir), 4096)])
		copy(b[tables:], table[:min(len(table), 4096)])
		tryVMDK(t, text, off, n, func(string) []byte { return b })
	})
}

// The seeds can be read, but for the one that is to be refused.
func TestVMDKSeeds(t *testing.T) {
	for i, b := range vmdkSeeds() {
		img, err := OpenVMDK(bytes.NewReader(b), int64(len(b)), VMDKOptions{Parent: func(string) (*VMDKImage, error) { return parentVMDK(t), nil }})
		if err != nil {
			t.Fatal(i, err)
		}
		p := make([]byte, img.Size())
		if n, err := img.ReadAt(p, 0); n != len(p) || err != nil && err != io.EOF {
			t.Errorf("seed %d: %d bytes, %v", i, n, err)
		}
	}
	whole := writeSESparse(smallESX(60, 8))
	for _, kind := range []string{"SESPARSE", "VMFSSPARSE"} {
		text := deltaText("vmfsSparse", "1", "2", "base", fmt.Sprintf(`RW 60 %s "x"`, kind))
		img, err := OpenVMDK(bytes.NewReader(text), int64(len(text)), VMDKOptions{
			Parent: func(string) (*VMDKImage, error) { return parentVMDK(t), nil },
			Extent: func(string) (io.ReaderAt, int64, error) {
				if kind == "VMFSSPARSE" {
					whole = writeCOWD(smallESX(60, 1))
				}
				return bytes.NewReader(whole), int64(len(whole)), nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		if n, err := img.ReadAt(make([]byte, 60*512), 0); n != 60*512 || err != nil && err != io.EOF {
			t.Errorf("%s: %d, %v", kind, n, err)
		}
	}
}

// A grain unpacks to a grain, but for the last, which may end with the disk.
func TestPackedGrains(t *testing.T) {
	for _, c := range []struct {
		name   string
		grain  func(n int) []byte
		change func(b []byte)
		want   error
	}{
		{"good", func(n int) []byte { return make([]byte, n) }, nil, nil},
		{"padded", func(int) []byte { return make([]byte, 16*512) }, nil, nil},
		{"short", func(n int) []byte { return make([]byte, n-1) }, nil, ErrCorrupt},
		{"long", func(int) []byte { return make([]byte, 16*512+1) }, nil, ErrCorrupt},
		{"bomb", func(int) []byte { return make([]byte, 5*mib) }, nil, ErrCorrupt},
		{"checksum", func(n int) []byte { return make([]byte, n) }, func(b []byte) {
			b[1024+12+int(b[1024+8])-1] ^= 1
		}, ErrCorrupt},
		{"other grain", func(n int) []byte { return make([]byte, n) }, func(b []byte) { b[1024] = 16 }, ErrCorrupt},
		{"no length", func(n int) []byte { return make([]byte, n) }, func(b []byte) { b[1024+8] = 0 }, ErrCorrupt},
		{"long as the file", func(n int) []byte { return make([]byte, n) }, func(b []byte) { b[1024+9] = 0x40 }, ErrCorrupt},
		{"long as 2 GiB", func(n int) []byte { return make([]byte, n) }, func(b []byte) { b[1024+11] = 0x7f }, ErrCorrupt},
	} {
		b := packedVMDKOf(c.grain)
		if c.change != nil {
			c.change(b)
		}
		img, err := OpenVMDK(bytes.NewReader(b), int64(len(b)), VMDKOptions{})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		for _, n := range []int{40 * 512, 100} { // whole grains, and through the cache
			_, err := img.ReadAt(make([]byte, n), 0)
			if err == io.EOF {
				err = nil
			}
			if !errors.Is(err, c.want) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
}
