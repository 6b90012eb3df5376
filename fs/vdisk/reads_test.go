package vdisk

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Random reads agree with the file that TestAgainstQEMU shows to QEMU.
func TestReadsAnywhere(t *testing.T) {
	for _, l := range layouts() {
		for _, f := range formatsFor(l) {
			t.Run(f.name+"/"+l.name, func(t *testing.T) {
				t.Parallel()
				file, err := f.make(l.disk, "x.vmdk")
				if !f.fits(t, l.disk.size, err) {
					t.Skip("the format has no such disks")
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
			})
		}
	}
}

func TestAllocatedOfComputed(t *testing.T) {
	for _, l := range layouts() {
		for _, f := range formatsFor(l) {
			t.Run(f.name+"/"+l.name, func(t *testing.T) {
				t.Parallel()
				file, err := f.make(l.disk, "x.vmdk")
				if !f.fits(t, l.disk.size, err) {
					t.Skip("the format has no such disks")
				}
				fine := extent.Total(allocated(t, file, 512))
				if most := file.AllocatedBytes(); fine > roundUp(most, 512)+512*64 || most > file.Size() {
					t.Errorf("AllocatedBytes %d, listed %d, size %d", most, fine, file.Size())
				}
				for _, g := range []int64{512, 4 * kib, 64 * kib, mib, 512 * mib} {
					if total := extent.Total(allocated(t, file, g)); total < fine {
						t.Errorf("granularity %d lists %d bytes, 512 lists %d", g, total, fine)
					}
					if file.Size() <= 16*mib || file.Size() <= 128*mib && g == 64*kib {
						checkHoles(t, file, g)
					}
				}
			})
		}
	}
}

// Listing a sparse disk's file costs its data, not its size.
func TestSparseStaysSparse(t *testing.T) {
	disk := newModel(1, 10*tib, ext(5*tib, mib))
	for _, f := range formats()[:3] {
		file, err := f.make(disk, "x.vmdk")
		if err != nil {
			t.Fatal(err)
		}
		if total := extent.Total(allocated(t, file, 64*kib)); total > 8*mib {
			t.Errorf("%s: a disk with 1 MiB of data takes %d bytes", f.name, total)
		}
	}
}

// A bad sector is an error of every read that needs it, with the bytes before
// it, and of no other read.
func TestSourceErrors(t *testing.T) {
	for _, f := range formats() {
		disk := newModel(1, 40*mib, ext(0, mib), ext(33*mib, 2*mib))
		disk.bad = 33*mib + 100*kib + 7
		file, err := f.make(disk, "x.vmdk")
		if err != nil {
			t.Fatal(err)
		}
		all := make([]byte, file.Size())
		n, err := file.ReadAt(all, 0)
		if !errors.Is(err, errBadSector) || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", f.name, err)
		}
		disk.bad = -1
		whole := make([]byte, file.Size())
		if m, err := file.ReadAt(whole, 0); m != len(whole) || err != nil && err != io.EOF {
			t.Fatal(m, err)
		}
		disk.bad = 33*mib + 100*kib + 7
		if !bytes.Equal(all[:n], whole[:n]) || n == 0 {
			t.Errorf("%s: the %d bytes before the error differ", f.name, n)
		}
		if m, err := file.ReadAt(all[:1], int64(n)); m != 0 || !errors.Is(err, errBadSector) {
			t.Errorf("%s: at the bad byte: %d, %v", f.name, m, err)
		}
		if f.name == "stream" {
			continue // a grain has a checksum over all of it
		}
		if _, err := file.ReadAt(all[:kib], int64(n)+1); err != nil {
			t.Errorf("%s: behind the bad byte: %v", f.name, err)
		}
	}
}

// shrunk claims more than it has.
type shrunk struct {
	*model
	have int64
}

func (s shrunk) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, s.have)
	n, err := s.model.ReadAt(p, off)
	return n, errors.Join(err, end)
}

func TestShortSource(t *testing.T) {
	for _, f := range formats() {
		file, err := f.make(shrunk{newModel(1, 3*mib, ext(0, 3*mib)), 2 * mib}, "x.vmdk")
		if err != nil {
			t.Fatal(err)
		}
		_, err = file.ReadAt(make([]byte, file.Size()), 0)
		if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", f.name, err)
		}
	}
}

func TestNegativeOffset(t *testing.T) {
	for _, f := range formats() {
		file, _ := f.make(newModel(1, mib), "x.vmdk")
		if n, err := file.ReadAt(make([]byte, 5), -3); n != 0 || err == nil || err == io.EOF {
			t.Errorf("%s: %d, %v", f.name, n, err)
		}
		if n, err := file.ReadAt(nil, 5); n != 0 || err != nil {
			t.Errorf("%s: empty read: %d, %v", f.name, n, err)
		}
	}
}

// Reading allocates nothing, asks the disk once for neighbouring blocks, and
// not at all for tables.
func TestReadsAreCheap(t *testing.T) {
	disk := newModel(1, tib+5*mib, ext(mib, 10*mib), ext(tib, 5*mib))
	for _, f := range formats()[:3] {
		file, err := f.make(disk, "x.vmdk")
		if err != nil {
			t.Fatal(err)
		}
		data := file.(*computed).data
		p := make([]byte, min(data-1, mib-3))
		disk.reads.Store(0)
		disk.walks.Store(0)
		offs := []int64{0, 3*mib + 5, data/2 + 1, data - int64(len(p))}
		if n := testing.AllocsPerRun(20, func() {
			for _, off := range offs {
				if _, err := file.ReadAt(p, min(off, data-int64(len(p)))); err != nil {
					t.Fatal(err)
				}
			}
		}); n != 0 {
			t.Errorf("%s: tables: %v allocations", f.name, n)
		}
		if r, w := disk.reads.Load(), disk.walks.Load(); r != 0 || w != 0 {
			t.Errorf("%s: tables took %d reads and %d walks of the disk", f.name, r, w)
		}
		at := data + mib + 100
		if f.name == "vhdx" {
			at = data + 2*mib
		}
		if n := testing.AllocsPerRun(20, func() {
			if _, err := file.ReadAt(p, at); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: data: %v allocations", f.name, n)
		}
		if r := disk.reads.Load(); r != 21 { // AllocsPerRun runs once more to warm up
			t.Errorf("%s: 21 reads of neighbouring blocks took %d reads of the disk", f.name, r)
		}
	}
}

func TestConcurrentReads(t *testing.T) {
	disk := randomModel(11, 300*mib+99, 400, mib)
	if raced {
		disk = randomModel(11, 40*mib+99, 50, mib)
	}
	for _, f := range formats() {
		file, err := f.make(disk, "x.vmdk")
		if err != nil {
			t.Fatal(err)
		}
		whole := make([]byte, file.Size())
		file.ReadAt(whole, 0)
		var wg sync.WaitGroup
		for g := range uint64(4) {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(g, 3))
				for range 30 {
					off := rnd.Int64N(file.Size())
					p := make([]byte, min(rnd.Int64N(mib), file.Size()-off))
					if _, err := file.ReadAt(p, off); err != nil && err != io.EOF {
						t.Error(err)
					}
					if !bytes.Equal(p, whole[off:off+int64(len(p))]) {
						t.Errorf("%s: %d bytes at %d differ", f.name, len(p), off)
					}
				}
			})
		}
		wg.Wait()
	}
}

func TestIdentity(t *testing.T) {
	disk := newModel(1, mib, ext(0, mib))
	read := func(f File, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, f.Size())
		f.ReadAt(p, 0)
		return p
	}
	other := Identity{9}
	if !bytes.Equal(read(VHDX(disk, testID)), read(VHDX(disk, testID))) || bytes.Equal(read(VHDX(disk, testID)), read(VHDX(disk, other))) {
		t.Error("vhdx: ids do not follow the identity")
	}
	for _, f := range formats() {
		if !bytes.Equal(read(f.make(disk, "x.vmdk")), read(f.make(disk, "x.vmdk"))) {
			t.Errorf("%s: not the same again", f.name)
		}
	}
	if bytes.Equal(read(VHD(disk, testID)), read(VHD(disk, other))) || bytes.Equal(read(StreamVMDK(disk, testID, "a")), read(StreamVMDK(disk, other, "a"))) {
		t.Error("vhd, stream: ids do not follow the identity")
	}
	if !bytes.Equal(read(SparseVMDK(disk, testID, "a")), read(SparseVMDK(disk, testID, "a"))) || bytes.Equal(read(SparseVMDK(disk, testID, "a")), read(SparseVMDK(disk, other, "a"))) {
		t.Error("vmdk: ids do not follow the identity")
	}
}

func TestLimits(t *testing.T) {
	if _, err := VHDX(newModel(1, 64*tib, ext(64*tib-1, 1)), testID); err != nil {
		t.Errorf("vhdx of 64 TiB: %v", err)
	}
	if _, err := VHDX(newModel(1, 64*tib+1), testID); !errors.Is(err, ErrTooLarge) {
		t.Errorf("vhdx above 64 TiB: %v", err)
	}
	if _, err := QCOW2(newModel(1, 64*tib, ext(0, 64*tib))); err != nil {
		t.Errorf("full qcow2 of 64 TiB: %v", err)
	}
	if _, err := QCOW2(newModel(1, 1<<51+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("qcow2 above 2 PiB: %v", err)
	}
	if _, err := SparseVMDK(newModel(1, 3*tib, ext(0, 3*tib)), testID, "x"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("vmdk of 3 TiB: %v", err)
	}
	if _, err := SparseVMDK(newModel(1, 1<<62), testID, "x"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("vmdk of 4 EiB: %v", err)
	}
	if _, err := VHD(newModel(1, 2040<<30, ext(0, 2040<<30)), testID); err != nil {
		t.Errorf("full vhd of 2040 GiB: %v", err)
	}
	if _, err := VHD(newModel(1, 2040<<30+1), testID); !errors.Is(err, ErrTooLarge) {
		t.Errorf("vhd above 2040 GiB: %v", err)
	}
	if _, err := StreamVMDK(newModel(1, 2*tib, ext(0, 2*tib)), testID, "x"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("full stream of 2 TiB: %v", err)
	}
	if _, err := StreamVMDK(newModel(1, 60*tib, ext(tib, tib)), testID, "x"); err != nil {
		t.Errorf("stream of 60 TiB with 1 TiB of data: %v", err)
	}
	// The last grain that fits: 2^32-128 is the last sector number a grain may have.
	disk := newModel(1, 3*tib, ext(0, 1))
	one, err := SparseVMDK(disk, testID, "x")
	if err != nil {
		t.Fatal(err)
	}
	grains := 1 + (2*tib-one.Size())/(64*kib)
	disk.data[0].Len = grains * 64 * kib
	full, err := SparseVMDK(disk, testID, "x")
	if err != nil || full.Size() != 2*tib {
		t.Errorf("vmdk of %d grains: %v", grains, err)
	}
	disk.data[0].Len++
	if _, err := SparseVMDK(disk, testID, "x"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("vmdk of %d grains: %v", grains+1, err)
	}
}
