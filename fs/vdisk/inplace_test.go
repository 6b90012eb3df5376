package vdisk

import (
	"errors"
	"io"
	"os"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// moreFormats are the layouts beside the common one of a format. TestFormats
// shows them to QEMU.
func moreFormats() []format {
	vhdx := func(layout VHDXLayout) func(Source, string) (File, error) {
		return func(src Source, _ string) (File, error) { return VHDXAs(src, testID, layout) }
	}
	return []format{
		{"vhdx fixed", vhdx(VHDXLayout{Fixed: true})},
		{"vhdx 4096", vhdx(VHDXLayout{Sector: 4096, Block: mib})},
		{"vhdx fixed 4096", vhdx(VHDXLayout{Fixed: true, Sector: 4096, Block: 2 * mib})},
		{"qcow2 sparse", func(src Source, _ string) (File, error) { return QCOW2Sparse(src) }},
	}
}

// Random reads agree with the file that TestFormats shows to QEMU, and what is
// not listed is zero.
func TestReadsOfLayouts(t *testing.T) {
	for _, l := range layouts() {
		switch l.name {
		case "one byte", "odd size random", "zeros, odd", "last byte only", "sparse", "beyond a chunk", "10 TiB, odd":
		default:
			continue
		}
		for _, f := range moreFormats() {
			t.Run(f.name+"/"+l.name, func(t *testing.T) {
				t.Parallel()
				file, err := f.make(l.disk, "")
				if err != nil {
					t.Fatal(err)
				}
				path := tempPath(t, "file")
				store(t, file, path)
				ref, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				defer ref.Close()
				near := allocated(t, file, 4*kib)
				checkReads(t, 7, file, ref, file.Size(), 60, 200*kib, near)
				checkReads(t, 8, file, ref, file.Size(), 300, 20, near)
				checkReads(t, 9, file, ref, file.Size(), 1, 40*mib, near)
				fine := extent.Total(allocated(t, file, 512))
				for _, g := range []int64{512, 64 * kib, 512 * mib} {
					if total := extent.Total(allocated(t, file, g)); total < fine || total > file.Size() {
						t.Errorf("granularity %d lists %d bytes, 512 lists %d", g, total, fine)
					}
					if file.Size() <= 32*mib {
						checkHoles(t, file, g)
					}
				}
				if total := extent.Total(near); f.name == "qcow2 sparse" && total > extent.Total(l.disk.data)+8*mib {
					t.Errorf("a file with %d bytes for %d of data", total, extent.Total(l.disk.data))
				}
			})
		}
	}
}

// Tables come out the same in pieces that cut entries.
func TestTablesInPieces(t *testing.T) {
	disk := newModel(1, mib, ext(0, 70*kib), ext(200*kib, 1), ext(mib-1, 1))
	file, err := QCOW2Sparse(disk)
	if err != nil {
		t.Fatal(err)
	}
	whole := make([]byte, file.(*inPlace).data)
	if _, err := file.ReadAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	for _, m := range file.(*inPlace).maps {
		for _, n := range []int64{1, 3, 7, 13} {
			for off := m.Off; off < m.Off+200; off++ {
				checkRead(t, file, bytesAt(whole), file.Size(), off, n)
			}
		}
	}
}

// A bad sector is an error of the reads that need it, and a disk that is
// shorter than it says an error of all reads past its end.
func TestErrorsOfLayouts(t *testing.T) {
	for _, f := range moreFormats() {
		disk := newModel(1, 40*mib, ext(0, mib), ext(33*mib, 2*mib))
		file, err := f.make(disk, "")
		if err != nil {
			t.Fatal(err)
		}
		whole, all := make([]byte, file.Size()), make([]byte, file.Size())
		if m, err := file.ReadAt(whole, 0); m != len(whole) || err != nil && err != io.EOF {
			t.Fatal(m, err)
		}
		disk.bad = 33*mib + 100*kib + 7
		n, err := file.ReadAt(all, 0)
		if !errors.Is(err, errBadSector) || n == 0 || mismatch(all[:n], whole[:n]) >= 0 {
			t.Errorf("%s: %d, %v", f.name, n, err)
		}
		if m, err := file.ReadAt(all[:1], int64(n)); m != 0 || !errors.Is(err, errBadSector) {
			t.Errorf("%s: at the bad byte: %d, %v", f.name, m, err)
		}
		if _, err := file.ReadAt(all[:kib], int64(n)+1); err != nil {
			t.Errorf("%s: behind the bad byte: %v", f.name, err)
		}
		if n, err := file.ReadAt(all[:5], -3); n != 0 || err == nil || err == io.EOF {
			t.Errorf("%s: before the beginning: %d, %v", f.name, n, err)
		}
		short, err := f.make(shrunk{newModel(1, 3*mib, ext(0, 3*mib)), 2 * mib}, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err = short.ReadAt(make([]byte, short.Size()), 0); !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			t.Errorf("%s: short disk: %v", f.name, err)
		}
	}
}

// Readers of one image or file do not disturb each other.
func TestConcurrentReadsOfLayouts(t *testing.T) {
	chain := makeChain(3, mib, 512, 4*mib, 3)
	disks := map[string]Source{"vhdx chain": chain.open(t, 2)}
	for _, f := range moreFormats() {
		file, err := f.make(randomModel(11, 8*mib+99, 40, mib), "")
		if err != nil {
			t.Fatal(err)
		}
		disks[f.name] = file
	}
	for name, disk := range disks {
		whole := make([]byte, disk.Size())
		if _, err := disk.ReadAt(whole, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for g := range uint64(4) {
			wg.Go(func() { checkReads(t, g, disk, bytesAt(whole), disk.Size(), 30, 100*kib, nil) })
		}
		wg.Wait()
		if t.Failed() {
			t.Fatalf("%s: concurrent reads differ", name)
		}
	}
}
