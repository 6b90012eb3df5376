package imagefile

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
)

func TestNameOf(t *testing.T) {
	for path, want := range map[string]string{
		"/a/web.vmdk": "web", "web.VHD": "web", "web.vhdx": "web", "web.avhd": "web", "web.qcow2": "web",
		"web-flat.vmdk": "web-flat", "web.tar": "web.tar", ".vmdk": ".vmdk", "web": "web",
	} {
		if got := NameOf(path); got != want {
			t.Errorf("%s: VM %q, want %q", path, got, want)
		}
	}
}

// What a guest writes into its first sector does not choose the format of files
// that are raw by their names. A descriptor is read with its extents.
func TestFormatByName(t *testing.T) {
	dir := t.TempDir()
	guest := make([]byte, 8192)
	copy(guest, "KDMV")
	descriptor := "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 16 VMFS \"web-flat.vmdk\"\n"
	for name, b := range map[string][]byte{"web-flat.vmdk": guest, "web.raw": guest, "web.img": guest, "web.vmdk": []byte(descriptor)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]struct {
		files int
		err   error
	}{
		"web-flat.vmdk": {1, nil},
		"web.raw":       {1, nil},
		"web.img":       {0, vdisk.ErrUnsupported},
		"web.vmdk":      {2, nil},
	} {
		snap, err := New(VM{Name: "web", Files: []string{filepath.Join(dir, name)}}).Freeze(t.Context(), "web")
		if !errors.Is(err, want.err) {
			t.Errorf("%s: %v, want %v", name, err, want.err)
		}
		if err != nil {
			continue
		}
		d := snap.Disks()[0].(*disk)
		if d.Size() != 8192 || len(d.files) != want.files {
			t.Errorf("%s: %d bytes of %v", name, d.Size(), d.Files())
		}
		if err := snap.Close(); err != nil {
			t.Error(err)
		}
	}
}
