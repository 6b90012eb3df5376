package vdisk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// diskFormat is a row of the table that TestFormats goes through: what can be
// computed of a format, and what can be read.
type diskFormat struct {
	name   string
	driver string // what QEMU calls it

	// make computes the file called name; nil: the format is only read.
	make func(src Source, name string) (File, error)
	// make4096 does so with logical sectors of 4096 bytes; nil: the format has none.
	make4096 func(src Source, name string) (File, error)
	// descriptor: what make computes goes beside a descriptor of that kind.
	descriptor VMDKKind
	noEmpty    bool // it cannot hold a disk of no sectors
	no3TiB     bool // it cannot hold 3 TiB
	check      bool // qemu-img check knows it
	slow       bool // QEMU needs minutes or hours to go through TiB of holes
	// own is a checker of ours, written from the format's document. Nil: there is
	// nothing to check.
	own func(f File, src Source, sector int64) error

	// write makes a file of d for us to read, in dir, and gives its name and who
	// says what disk it is; nil: "qemu-img convert -o options" makes it.
	write   func(t *testing.T, d tableDisk, dir string) (name string, says judge)
	options string
	skip3   string // why nobody is asked to write 3 TiB
}

// judge makes sure that the file called name in dir holds d, which raw is; of a
// disk with tableDisk.data it may look at no more than that.
type judge struct {
	word string
	ask  func(t *testing.T, d tableDisk, dir, name, raw string)
}

func qemuSays(driver string) judge {
	return judge{"identical", func(t *testing.T, d tableDisk, dir, name, raw string) {
		if d.data == nil {
			mustQEMU(t, dir, "qemu-img", "compare", "-f", driver, "-F", "raw", name, raw)
			return
		}
		size := roundUp(d.src.Size(), sector)
		for _, e := range append([]extent.Extent{ext(size/3, mib)}, d.data...) {
			comparePart(t, dir, driver, name, d.src, e, size)
		}
	}}
}

func diskFormats() []diskFormat {
	ownVHDX := func(f File, src Source, sector int64) error {
		rep, err := checkVHDX(f, f.Size())
		return errors.Join(err, sameSize(rep.disk, src, sector))
	}
	ownQCOW2 := func(f File, src Source, sector int64) error {
		rep, err := checkQCOW2(f, f.Size())
		return errors.Join(err, sameSize(rep.disk, src, sector))
	}
	vhdx := func(layout VHDXLayout) func(Source, string) (File, error) {
		return func(src Source, _ string) (File, error) { return VHDXAs(src, testID, layout) }
	}
	flat := func(src Source, _ string) (File, error) { return Flat(src), nil }
	const tooManyFiles = "QEMU takes a minute for 1536 files"
	return []diskFormat{{
		name: "raw", driver: "raw", make: flat,
	}, {
		name: "qcow2", driver: "qcow2", check: true, own: ownQCOW2,
		make: func(src Source, _ string) (File, error) { return QCOW2(src) },
	}, {
		name: "qcow2 sparse", driver: "qcow2", check: true, own: ownQCOW2,
		make: func(src Source, _ string) (File, error) { return QCOW2Sparse(src) },
		// The nearest that QEMU has: all clusters have their places.
		options: "preallocation=metadata", skip3: "QEMU writes 400 MB",
	}, {
		name: "qcow2 over qcow2", driver: "qcow2", write: overlay("qcow2", "", ""),
	}, {
		name: "vhdx dynamic", driver: "vhdx", check: true, noEmpty: true, slow: true, own: ownVHDX,
		make: vhdx(VHDXLayout{}), make4096: vhdx(VHDXLayout{Sector: 4096}),
		options: "subformat=dynamic",
	}, {
		name: "vhdx fixed", driver: "vhdx", check: true, noEmpty: true, slow: true, own: ownVHDX,
		make: vhdx(VHDXLayout{Fixed: true}), make4096: vhdx(VHDXLayout{Fixed: true, Sector: 4096, Block: 2 * mib}),
		options: "subformat=fixed",
	}, {
		name: "vhdx differencing", driver: "vhdx", noEmpty: true, write: differencingVHDX,
	}, {
		name: "vhd dynamic", driver: "vpc", noEmpty: true, no3TiB: true,
		make: func(src Source, _ string) (File, error) { return VHD(src, testID) },
		own: func(f File, src Source, sector int64) error {
			return checkVHD(f, f.Size(), roundUp(src.Size(), sector))
		},
		options: "subformat=dynamic,force_size=on",
	}, {
		name: "vhd fixed", driver: "vpc", noEmpty: true, no3TiB: true,
		make:    func(src Source, _ string) (File, error) { return VHDFixed(src, testID) },
		own:     checkFixedVHD,
		options: "subformat=fixed,force_size=on",
	}, {
		name: "vhd differencing", driver: "vpc", noEmpty: true, no3TiB: true, write: differencingVHD,
	}, {
		name: "vmdk sparse", driver: "vmdk", check: true, noEmpty: true, slow: true,
		make: func(src Source, name string) (File, error) { return SparseVMDK(src, testID, name) },
		own: func(f File, src Source, sector int64) error {
			return checkSparseVMDK(f, f.Size(), roundUp(src.Size(), sector))
		},
		options: "subformat=monolithicSparse",
	}, {
		name: "vmdk stream", driver: "vmdk", check: true, noEmpty: true, slow: true,
		make:    func(src Source, name string) (File, error) { return StreamVMDK(src, testID, name) },
		own:     func(f File, src Source, _ int64) error { return checkStream(f, f.Size(), src) },
		options: "subformat=streamOptimized",
	}, {
		name: "vmdk flat", driver: "vmdk", noEmpty: true, make: flat, descriptor: MonolithicFlat,
		options: "subformat=monolithicFlat",
	}, {
		name: "vmdk vmfs", driver: "vmdk", noEmpty: true, make: flat, descriptor: VMFS, write: vmfsDisk,
	}, {
		name: "vmdk split sparse", driver: "vmdk", noEmpty: true,
		options: "subformat=twoGbMaxExtentSparse", skip3: tooManyFiles,
	}, {
		name: "vmdk split flat", driver: "vmdk", noEmpty: true,
		options: "subformat=twoGbMaxExtentFlat",
	}, {
		name: "vmdk delta", driver: "vmdk", noEmpty: true, write: overlay("vmdk", "subformat=monolithicFlat", "zeroed_grain=on"),
	}, {
		name: "vmfsSparse delta", driver: "vmdk", noEmpty: true, no3TiB: true, write: esxDelta("vmfsSparse"),
	}, {
		name: "seSparse delta", driver: "vmdk", noEmpty: true, write: esxDelta("seSparse"),
		skip3: "too large for the writer",
	}}
}

func sameSize(disk int64, src Source, sector int64) error {
	if want := roundUp(src.Size(), sector); disk != want {
		return fmt.Errorf("a disk of %d bytes, want %d", disk, want)
	}
	return nil
}

func checkFixedVHD(f File, src Source, sector int64) error {
	return caught(func() {
		c, disk := &formatChecker{f, f.Size()}, roundUp(src.Size(), sector)
		c.must(f.Size() == disk+512, "%d bytes for a disk of %d", f.Size(), disk)
		c.vhdFooter(c.read(disk, 512), disk, 2, 1<<64-1)
	})
}

// tableDisk is a column of the table.
type tableDisk struct {
	name string
	src  Source
	data []extent.Extent // where to look when all of it is too much; nil: all
	only string          // "4096": only what has such sectors
}

func tableDisks(t *testing.T) []tableDisk {
	large := newModel(3, 3*tib, ext(0, 2*mib+77), ext(2*tib-5*mib, 11*mib+3), ext(3*tib-mib-1, mib+1))
	return []tableDisk{
		{name: "empty", src: newModel(1, 0)},
		{name: "1 sector", src: newModel(1, 512, ext(0, 512))},
		{name: "odd size", src: newModel(2, 70*mib+12345, ext(0, 3*mib), ext(33*mib+1, 4*mib), ext(70*mib, 12345))},
		{name: "4096-byte sectors", src: newModel(2, 70*mib+12345, ext(0, 3*mib), ext(33*mib+1, 4*mib), ext(70*mib, 12345)), only: "4096"},
		{name: "3 TiB sparse", src: large, data: large.data},
		{name: "ext4 with files", src: ext4Disk(t)},
	}
}

// ext4Disk is a file system with a tree of this machine.
func ext4Disk(t *testing.T) Source {
	for _, dir := range []string{"/usr/share/perl", "/usr/sbin", "/usr/share/doc", "/usr/share", "/usr/bin"} {
		size := int64(0)
		filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if err != nil || size > 200*mib {
				return errors.Join(err, fs.SkipAll)
			}
			if info, err := d.Info(); err == nil {
				size += roundUp(info.Size(), 4096) + 512
			}
			return nil
		})
		if size < 10*mib || size > 200*mib {
			continue
		}
		path := tempPath(t, "ext4")
		cmd := exec.Command("mkfs.ext4", "-q", "-d", dir, path, fmt.Sprintf("%dM", size*5/4/mib+64))
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		raw, err := OpenRaw(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		return raw
	}
	t.Fatal("no directory of a suitable size")
	return nil
}

// Every format, computed and read, with every kind of disk; -v prints what is
// proven. "identical" is qemu-img compare with the raw disk; where we read, of
// all that we read with the disk whose file qemu-img convert made, or that
// qemu-img compare found in what a writer of these tests made. "clean" is
// qemu-img check and, where there is one, a checker of ours.
func TestFormats(t *testing.T) {
	needQEMU(t)
	if raced {
		t.Skip("comparing hundreds of MiB takes too long with the race detector")
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		if _, err := os.Stat("/usr/sbin/mkfs.ext4"); err != nil {
			t.Skipf("Debian package e2fsprogs: %v", err)
		}
	}
	disks, all := tableDisks(t), diskFormats()
	var mu sync.Mutex
	cells := map[string]string{} // "row/column" => word
	t.Run("cells", func(t *testing.T) {
		for _, d := range disks {
			raw := tempPath(t, "disk.raw")
			store(t, d.src, raw)
			for _, f := range all {
				for kind, do := range map[string]func(*testing.T, diskFormat, tableDisk, string) string{"computed": computedCell, "read": readCell} {
					name := f.name + ", " + kind + "/" + d.name
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						word := do(t, f, d, raw)
						mu.Lock()
						defer mu.Unlock()
						cells[name] = word
					})
				}
			}
		}
	})
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, d := range disks {
		fmt.Fprint(w, "\t", d.name)
	}
	for _, f := range all {
		for _, kind := range []string{"computed", "read"} {
			name := f.name + ", " + kind
			fmt.Fprint(w, "\n", name)
			for _, d := range disks {
				fmt.Fprint(w, "\t", cells[name+"/"+d.name])
			}
		}
	}
	w.Flush()
	t.Logf("\n%s", b.String())
}

func computedCell(t *testing.T, f diskFormat, d tableDisk, raw string) string {
	compute, pad := f.make, int64(512)
	if compute == nil {
		return "is not computed"
	}
	if d.only == "4096" {
		compute, pad = f.make4096, 4096
	}
	if compute == nil {
		return "format has none"
	}
	dir, name := t.TempDir(), "disk."+f.driver
	file, err := f.computed(compute, d.src, dir, name)
	if want := f.refuses(d); want != nil {
		if !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
		return "format has none"
	}
	if err != nil {
		t.Fatal(err)
	}
	if f.own != nil {
		if err := f.own(file, d.src, pad); err != nil {
			t.Errorf("own checker: %v", err)
		}
	}
	if pad == 4096 {
		// QEMU 7.2 says "Operation not supported".
		says := libvhdiSays()
		says.ask(t, d, dir, name, raw)
		return says.word + ", own checker: clean"
	}
	size := roundUp(d.src.Size(), pad)
	if got := virtualSize(t, dir, f.driver, name); got != size {
		t.Errorf("virtual size %d, want %d", got, size)
	}
	word := "identical"
	if f.slow && d.data != nil {
		word = "identical around the data"
	} else {
		d.data = nil
	}
	qemuSays(f.driver).ask(t, d, dir, name, raw)
	switch {
	case f.check:
		mustQEMU(t, dir, "qemu-img", "check", "-f", f.driver, name)
		word += ", clean"
	case f.own != nil:
		word += ", own checker: clean"
	}
	return word
}

// refuses is the error with which d cannot be computed.
func (f diskFormat) refuses(d tableDisk) error {
	switch size := d.src.Size(); {
	case size == 0 && f.noEmpty:
		return ErrEmpty
	case size >= 3*tib && f.no3TiB:
		return ErrTooLarge
	}
	return nil
}

// computed stores what is computed as dir/name.
func (f diskFormat) computed(compute func(Source, string) (File, error), src Source, dir, name string) (File, error) {
	file, err := compute(src, name)
	if err == nil && f.descriptor != "" {
		var text []byte
		if text, err = VMDKDescriptor(f.descriptor, src.Size(), "disk-flat.vmdk", testID); err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o600)
		}
		name = "disk-flat.vmdk"
	}
	if err != nil {
		return nil, err
	}
	return file, storeFile(file, filepath.Join(dir, name))
}

// comparePart lets QEMU read e, and some of what is around it.
func comparePart(t *testing.T, dir, driver, name string, src Source, e extent.Extent, size int64) {
	t.Helper()
	const block = 512 * kib
	from := max(0, e.Off/block-1)
	end := min(divUp(e.End(), block)+1, divUp(size, block))
	os.Remove(filepath.Join(dir, "part.raw"))
	mustQEMU(t, dir, "qemu-img", "dd", "-f", driver, "-O", "raw", "bs=512k", fmt.Sprint("skip=", from),
		fmt.Sprint("count=", end), "if="+name, "of=part.raw")
	got, err := os.ReadFile(filepath.Join(dir, "part.raw"))
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, min(end*block, size)-from*block)
	if _, err := readPadded(src, want, from*block); err != nil {
		t.Fatal(err)
	}
	if i := mismatch(got, want); len(got) != len(want) || i >= 0 {
		t.Errorf("byte %d of the disk differs (%d bytes, want %d)", from*block+int64(i), len(got), len(want))
	}
}

func readCell(t *testing.T, f diskFormat, d tableDisk, raw string) string {
	if f.refuses(d) != nil {
		return "format has none"
	}
	if d.only == "4096" {
		if f.driver != "vhdx" {
			return "format has none"
		}
		return "QEMU makes none"
	}
	if d.data != nil && f.skip3 != "" {
		return f.skip3
	}
	dir, name, says := t.TempDir(), "disk."+f.driver, judge{word: "identical"}
	if f.write != nil {
		name, says = f.write(t, d, dir)
		if says.ask != nil {
			says.ask(t, d, dir, name, raw)
		}
	} else {
		args := []string{"convert", "-f", "raw", "-O", f.driver}
		if f.options != "" {
			args = append(args, "-o", f.options)
		}
		mustQEMU(t, dir, "qemu-img", append(args, raw, name)...)
	}
	img, err := OpenChain(filepath.Join(dir, name), Policy{Format: f.driver})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	compareRead(t, img, Flat(d.src), d.data)
	if d.data != nil {
		return says.word + " around the data"
	}
	return says.word
}

// compareRead compares all of img with want, or only around data, and looks
// for data that img does not list.
func compareRead(t *testing.T, img, want Source, data []extent.Extent) {
	t.Helper()
	size := want.Size()
	if img.Size() != size {
		t.Fatalf("size %d, want %d", img.Size(), size)
	}
	places := []extent.Extent{ext(0, size)}
	if data != nil {
		places = append([]extent.Extent{ext(size/3, mib)}, data...)
	}
	listed := allocated(t, img, 512)
	got, ref := make([]byte, 4*mib), make([]byte, 4*mib)
	for _, e := range places {
		e = extent.Intersect(extent.Align(e, 64*kib), ext(0, size))
		for off := e.Off; off < e.End(); off += int64(len(got)) {
			g, r := got[:min(int64(len(got)), e.End()-off)], ref[:min(int64(len(ref)), e.End()-off)]
			for src, p := range map[Source][]byte{img: g, want: r} {
				if n, err := src.ReadAt(p, off); n != len(p) || err != nil && err != io.EOF {
					t.Fatalf("%d bytes at %d: %d, %v", len(p), off, n, err)
				}
			}
			if i := mismatch(g, r); i >= 0 {
				t.Fatalf("byte %d is %#x, want %#x", off+int64(i), g[i], r[i])
			}
			for _, l := range listed {
				if part := extent.Intersect(l, ext(off, int64(len(r)))); !part.Empty() {
					clear(r[part.Off-off : part.End()-off])
				}
			}
			if bytes.Count(r, []byte{0}) != len(r) {
				t.Fatalf("there is data from %d on that is not listed", off)
			}
		}
	}
}
