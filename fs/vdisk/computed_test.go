package vdisk

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// format is one computed format.
type format struct {
	name string
	make func(src Source, fileName string) (File, error)
}

// qemu is the name QEMU has for it.
func (f format) qemu() string {
	switch f.name {
	case "stream":
		return "vmdk"
	case "fixed":
		return "vpc"
	}
	return f.name
}

// fits says whether the format can hold a disk of that size, and checks the error.
func (f format) fits(t *testing.T, size int64, err error) bool {
	t.Helper()
	want := error(nil)
	switch {
	case size == 0 && f.name != "qcow2" && f.name != "raw":
		want = ErrEmpty
	case size > 2040<<30 && f.qemu() == "vpc":
		want = ErrTooLarge
	}
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
	return want == nil
}

func formats() []format {
	return []format{
		{"vhdx", func(src Source, _ string) (File, error) { return VHDX(src, testID) }},
		{"vmdk", func(src Source, name string) (File, error) { return SparseVMDK(src, testID, name) }},
		{"qcow2", func(src Source, _ string) (File, error) { return QCOW2(src) }},
		{"vpc", func(src Source, _ string) (File, error) { return VHD(src, testID) }},
		{"stream", func(src Source, name string) (File, error) { return StreamVMDK(src, testID, name) }},
		{"raw", func(src Source, _ string) (File, error) { return Flat(src), nil }},
	}
}

// formatsFor has, for small disks, also what hardly differs from another format.
func formatsFor(l layout) []format {
	all := formats()
	if raced && l.disk.size > tib {
		return all[:3] // the others are as slow, and no other code
	}
	if l.disk.size <= 100*mib {
		all = append(all, format{"fixed", func(src Source, _ string) (File, error) { return VHDFixed(src, testID) }})
	}
	return all
}

// QEMU is asked whether each format of each layout is sound and holds the disk.
func TestAgainstQEMU(t *testing.T) {
	needQEMU(t)
	for _, l := range layouts() {
		for _, f := range formatsFor(l) {
			t.Run(f.name+"/"+l.name, func(t *testing.T) {
				t.Parallel()
				askQEMU(t, f, l)
			})
		}
	}
}

func askQEMU(t *testing.T, f format, l layout) {
	dir, name := t.TempDir(), "disk."+f.name
	file, err := f.make(l.disk, name)
	if !f.fits(t, l.disk.size, err) {
		return
	}
	store(t, file, filepath.Join(dir, name))
	checkStored(t, dir, f.qemu(), name, l)
	// Raw and vpc have no check, and that of vmdk looks at every grain.
	if f.qemu() != "raw" && f.qemu() != "vpc" && !(f.qemu() == "vmdk" && l.disk.size > 9*tib) {
		mustQEMU(t, dir, "qemu-img", "check", "-f", f.qemu(), name)
	}
	if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Size() != file.Size() {
		t.Error(st.Size(), err)
	}
}

// checkStored lets QEMU compare the file called name with the disk.
func checkStored(t *testing.T, dir, format, name string, l layout) {
	t.Helper()
	if got, want := virtualSize(t, dir, format, name), roundUp(l.disk.size, sector); got != want {
		t.Errorf("virtual size %d, want %d", got, want)
	}
	if !l.huge {
		store(t, l.disk, filepath.Join(dir, "want.raw"))
		mustQEMU(t, dir, "qemu-img", "compare", "-f", format, "-F", "raw", name, "want.raw")
		return
	}
	// Reading 10 TiB of zeros takes too long: read around the data, and some
	// places without. All but the offset 0 start a little before the data.
	places := []extent.Extent{ext(l.disk.size/3, mib), ext(l.disk.size/5*4, mib)}
	for _, e := range append(places, l.disk.data...) {
		const block = 512 * kib
		from := max(0, e.Off/block-1)
		count := min(divUp(e.End(), block)-from+1, divUp(l.disk.size, block)-from)
		os.Remove(filepath.Join(dir, "part.raw"))
		mustQEMU(t, dir, "qemu-img", "dd", "-f", format, "-O", "raw", "bs=512k", fmt.Sprint("skip=", from),
			fmt.Sprint("count=", from+count), "if="+name, "of=part.raw")
		got, err := os.ReadFile(filepath.Join(dir, "part.raw"))
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, len(got))
		if n := min(count*block, roundUp(l.disk.size, sector)-from*block); int64(len(got)) != n {
			t.Fatalf("qemu-img dd gave %d bytes, want %d", len(got), n)
		}
		l.disk.ReadAt(want, from*block)
		if i := mismatch(got, want); i >= 0 {
			t.Fatalf("byte %d of the disk is %#x, want %#x", from*block+int64(i), got[i], want[i])
		}
	}
}

func virtualSize(t *testing.T, dir, format, name string) int64 {
	t.Helper()
	var info struct {
		VirtualSize int64 `json:"virtual-size"`
	}
	out := mustQEMU(t, dir, "qemu-img", "info", "-f", format, "--output=json", name)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	return info.VirtualSize
}

// A descriptor and its flat file, as QEMU sees them.
func TestDescriptorAgainstQEMU(t *testing.T) {
	needQEMU(t)
	for _, kind := range []VMDKKind{MonolithicFlat, VMFS} {
		for _, l := range layouts() {
			if l.disk.size > 6*mib && l.disk.size < tib {
				continue // the flat file is the disk: only sizes matter
			}
			t.Run(string(kind)+"/"+l.name, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				desc, err := VMDKDescriptor(kind, l.disk.size, "disk-flat.vmdk", testID)
				if l.disk.size == 0 {
					if !errors.Is(err, ErrEmpty) {
						t.Fatalf("got %v, want ErrEmpty", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "disk.vmdk"), desc, 0o600); err != nil {
					t.Fatal(err)
				}
				store(t, Flat(l.disk), filepath.Join(dir, "disk-flat.vmdk"))
				checkStored(t, dir, "vmdk", "disk.vmdk", l)
			})
		}
	}
}

func TestDescriptorText(t *testing.T) {
	desc, err := VMDKDescriptor(VMFS, 10<<30+1, "web-flat.vmdk", testID)
	if err != nil {
		t.Fatal(err)
	}
	want := `# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=5aeb0a06
parentCID=ffffffff
createType="vmfs"

# Extent description
RW 20971521 VMFS "web-flat.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "1305"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.longContentID = "af5fcb3f62b6038d9ddad53b5aeb0a06"
ddb.uuid = "60 00 C2 99 fc 3d 86 83-9d 67 7b 91 8a e2 e4 7c"
ddb.virtualHWVersion = "14"
`
	if string(desc) != want {
		t.Errorf("got\n%s", desc)
	}
	for _, bad := range []string{"", "a\"b", "../x", "a\nb", "a/b", strings.Repeat("x", 300), "a\xffb"} {
		if _, err := VMDKDescriptor(VMFS, 1, bad, testID); err == nil {
			t.Errorf("name %q accepted", bad)
		}
		if _, err := SparseVMDK(newModel(1, 512), testID, bad); err == nil {
			t.Errorf("name %q accepted", bad)
		}
	}
	if _, err := VMDKDescriptor("streamOptimized", 1, "x", testID); err == nil {
		t.Error("createType without a flat extent accepted")
	}
}
