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
	noEmpty  bool // it cannot hold a disk of no sectors
	check    bool // qemu-img check knows it
	slow     bool // QEMU needs minutes or hours to go through TiB of holes
	// own is a checker of ours, written from the format's document; it returns
	// the size of the disk. Nil: there is nothing to check.
	own func(r io.ReaderAt, size int64) (int64, error)

	// open reads what "qemu-img convert -o options" wrote; nil: see noRead.
	open    func(r *RawFile) (Source, error)
	options string
	noRead  string // why there is nothing to read
	no3TiB  string // why QEMU is not asked to write 3 TiB
}

func diskFormats() []diskFormat {
	ownVHDX := func(r io.ReaderAt, size int64) (int64, error) {
		rep, err := checkVHDX(r, size)
		return rep.disk, err
	}
	ownQCOW2 := func(r io.ReaderAt, size int64) (int64, error) {
		rep, err := checkQCOW2(r, size)
		return rep.disk, err
	}
	openVHDX := func(r *RawFile) (Source, error) { return OpenVHDX(r, r.Size(), VHDXOptions{}) }
	openQCOW2 := func(r *RawFile) (Source, error) { return OpenQCOW2(r, r.Size(), QCOW2Options{}) }
	vhdx := func(layout VHDXLayout) func(Source, string) (File, error) {
		return func(src Source, _ string) (File, error) { return VHDXAs(src, testID, layout) }
	}
	return []diskFormat{{
		name: "raw", driver: "raw",
		make: func(src Source, _ string) (File, error) { return Flat(src), nil },
		open: func(r *RawFile) (Source, error) { return r, nil },
	}, {
		name: "qcow2", driver: "qcow2", check: true, own: ownQCOW2,
		make: func(src Source, _ string) (File, error) { return QCOW2(src) },
		open: openQCOW2,
	}, {
		name: "qcow2 sparse", driver: "qcow2", check: true, own: ownQCOW2,
		make: func(src Source, _ string) (File, error) { return QCOW2Sparse(src) },
		// The nearest that QEMU has: all clusters have their places.
		open: openQCOW2, options: "preallocation=metadata", no3TiB: "QEMU writes 400 MB",
	}, {
		name: "vhdx", driver: "vhdx", check: true, noEmpty: true, slow: true, own: ownVHDX,
		make: vhdx(VHDXLayout{}), make4096: vhdx(VHDXLayout{Sector: 4096}),
		open: openVHDX, options: "subformat=dynamic",
	}, {
		name: "vhdx fixed", driver: "vhdx", check: true, noEmpty: true, slow: true, own: ownVHDX,
		make: vhdx(VHDXLayout{Fixed: true}), make4096: vhdx(VHDXLayout{Fixed: true, Sector: 4096, Block: 2 * mib}),
		open: openVHDX, options: "subformat=fixed",
	}, {
		name: "vmdk sparse", driver: "vmdk", check: true, noEmpty: true, slow: true,
		make:   func(src Source, name string) (File, error) { return SparseVMDK(src, testID, name) },
		noRead: "no reader",
	}}
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
	for _, dir := range []string{"/usr/share/doc", "/usr/share", "/usr/lib", "/usr/bin"} {
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
		if size < 20*mib || size > 200*mib {
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
// proven. "identical" is qemu-img compare with the raw disk, or its qemu-img
// convert read back by us; "clean" is qemu-img check and a checker of ours.
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
	if d.only == "4096" {
		compute, pad = f.make4096, 4096
	}
	if compute == nil {
		return "format has none"
	}
	dir, name := t.TempDir(), "disk."+f.driver
	file, err := compute(d.src, name)
	if d.src.Size() == 0 && f.noEmpty {
		if !errors.Is(err, ErrEmpty) {
			t.Errorf("got %v, want ErrEmpty", err)
		}
		return "format has none"
	}
	if err != nil {
		t.Fatal(err)
	}
	size := roundUp(d.src.Size(), pad)
	if f.own != nil {
		if disk, err := f.own(file, file.Size()); err != nil || disk != size {
			t.Errorf("own checker: disk of %d bytes, %v", disk, err)
		}
	}
	if pad == 4096 {
		return "QEMU reads none, clean" // 7.2: "Operation not supported"
	}
	store(t, file, filepath.Join(dir, name))
	if got := virtualSize(t, dir, f.driver, name); got != size {
		t.Errorf("virtual size %d, want %d", got, size)
	}
	word := "identical"
	if f.slow && d.data != nil {
		word = "identical around the data"
		for _, e := range append([]extent.Extent{ext(size/3, mib)}, d.data...) {
			comparePart(t, dir, f.driver, name, d.src, e, size)
		}
	} else {
		mustQEMU(t, dir, "qemu-img", "compare", "-f", f.driver, "-F", "raw", name, raw)
	}
	if f.check {
		mustQEMU(t, dir, "qemu-img", "check", "-f", f.driver, name)
		word += ", clean"
	}
	return word
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
	if f.open == nil {
		return f.noRead
	}
	if d.src.Size() == 0 && f.noEmpty {
		return "format has none"
	}
	if d.only == "4096" {
		if f.make4096 == nil {
			return "format has none"
		}
		return "QEMU makes none"
	}
	if d.data != nil && f.no3TiB != "" {
		return f.no3TiB
	}
	dir := t.TempDir()
	args := []string{"convert", "-f", "raw", "-O", f.driver}
	if f.options != "" {
		args = append(args, "-o", f.options)
	}
	mustQEMU(t, dir, "qemu-img", append(args, raw, "disk")...)
	file, err := OpenRaw(filepath.Join(dir, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	img, err := f.open(file)
	if err != nil {
		t.Fatal(err)
	}
	compareRead(t, img, Flat(d.src), d.data)
	return "identical"
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
