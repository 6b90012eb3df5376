// Package imagefile is a backup source of disk image files: raw files, block
// devices, and qcow2, VMDK and VHD with the files they name.
//
// It tracks no changes: every run reads all that is allocated, and the engine
// recognises what the last point has already. A file in use by a running VM is
// read as it is, part by part: take a snapshot below it first.
package imagefile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// VM is a name and the image files that are its disks, in order.
type VM struct {
	Name  string
	Files []string
	// Attached are files that describe the VM, such as a .vmx: they are kept with its configuration.
	Attached []string
}

// Source gives VMs that are made of image files.
type Source struct {
	vms []VM
	// AllowOutsideBacking permits absolute names of backing files, parents and
	// extents, and those that lead out of the image's directory.
	AllowOutsideBacking bool
}

var _ backup.Source = (*Source)(nil)

// New makes a source of these VMs.
func New(vms ...VM) *Source { return &Source{vms: vms} }

// NameOf is the VM name that an image file has by default: the base name of the
// file without the ending of a known image format.
func NameOf(path string) string {
	name := filepath.Base(path)
	switch ext := filepath.Ext(name); strings.ToLower(ext) {
	case ".raw", ".img", ".qcow2", ".qcow", ".vmdk", ".vhdx", ".vhd", ".avhdx", ".avhd", ".dd":
		if len(ext) < len(name) {
			return name[:len(name)-len(ext)]
		}
	}
	return name
}

// VMs lists the names.
func (s *Source) VMs(context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for _, vm := range s.vms {
			if !yield(vm.Name, nil) {
				return
			}
		}
	}
}

// Freeze opens the files of a VM. Nothing is made that would have to be removed.
func (s *Source) Freeze(_ context.Context, name string) (backup.Snapshot, error) {
	for _, vm := range s.vms {
		if vm.Name != name {
			continue
		}
		snap := &snapshot{name: name, at: time.Now(), attached: vm.Attached}
		for _, file := range vm.Files {
			d, err := s.open(file)
			if err != nil {
				snap.Close()
				return nil, err
			}
			for n := 2; snap.has(d.key); n++ {
				d.key = fmt.Sprintf("%s#%d", filepath.Base(file), n)
			}
			snap.disks = append(snap.disks, d)
		}
		return snap, nil
	}
	return nil, fmt.Errorf("imagefile: no VM %q: %w", name, fs.ErrNotExist)
}

func (s *Source) open(file string) (*disk, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("imagefile: %w", err)
	}
	if !st.Mode().IsRegular() && (st.Mode()&fs.ModeDevice == 0 || st.Mode()&fs.ModeCharDevice != 0) {
		return nil, fmt.Errorf("imagefile: %s is neither a file nor a block device", file)
	}
	format := ""
	if isRaw(file) || !st.Mode().IsRegular() {
		// What a guest writes into its first sector must not choose the format.
		format = "raw"
	}
	chain, err := vdisk.OpenChain(file, vdisk.Policy{Format: format, AllowOutside: s.AllowOutsideBacking})
	if err != nil {
		return nil, fmt.Errorf("imagefile: %w", err)
	}
	d := &disk{Chain: chain, path: file, key: filepath.Base(file)}
	for _, f := range chain.Files() {
		st, err := os.Stat(f)
		if err != nil {
			chain.Close()
			return nil, fmt.Errorf("imagefile: %w", err)
		}
		d.files = append(d.files, fileState{f, st})
	}
	return d, nil
}

// isRaw tells by the name of a file that it is raw.
func isRaw(file string) bool {
	name := strings.ToLower(file)
	return strings.HasSuffix(name, ".raw") || strings.HasSuffix(name, "-flat.vmdk")
}

type snapshot struct {
	name     string
	at       time.Time
	disks    []*disk
	attached []string
}

var _ backup.Snapshot = (*snapshot)(nil)

func (s *snapshot) has(key string) bool {
	for _, d := range s.disks {
		if d.key == key {
			return true
		}
	}
	return false
}

func (s *snapshot) VM() backup.VM       { return backup.VM{Name: s.name, Source: "imagefile"} }
func (s *snapshot) Time() time.Time     { return s.at }
func (s *snapshot) Consistency() string { return "crash" }

func (s *snapshot) Disks() []backup.Disk {
	ds := make([]backup.Disk, len(s.disks))
	for i, d := range s.disks {
		ds[i] = d
	}
	return ds
}

// sourceFile and sourceDisk are what imagefile.json says.
type sourceFile struct {
	Path     string    `json:"path"`
	Size     int64     `json:"file_bytes"`
	Modified time.Time `json:"modified"`
}

type sourceDisk struct {
	Disk  string       `json:"disk"`
	Size  int64        `json:"disk_bytes"`
	Files []sourceFile `json:"files"` // the image first, then those it names
}

// Config says which files the disks were.
func (s *snapshot) Config(context.Context) ([]backup.ConfigFile, error) {
	out := struct {
		VM    string       `json:"vm"`
		Disks []sourceDisk `json:"disks"`
	}{VM: s.name}
	for i, d := range s.disks {
		sd := sourceDisk{Disk: fmt.Sprintf("disk%d", i), Size: d.Size()}
		for _, f := range d.files {
			path, err := filepath.Abs(f.path)
			if err != nil {
				path = f.path
			}
			sd.Files = append(sd.Files, sourceFile{path, f.info.Size(), f.info.ModTime().UTC()})
		}
		out.Disks = append(out.Disks, sd)
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return nil, err
	}
	files := []backup.ConfigFile{{Name: sourceName, Data: append(b, '\n')}}
	for _, path := range s.attached {
		f, err := readAttached(path)
		if err != nil {
			return nil, fmt.Errorf("imagefile: %w", err)
		}
		if slices.ContainsFunc(files, func(o backup.ConfigFile) bool { return o.Name == f.Name }) {
			return nil, fmt.Errorf("imagefile: two files of the configuration would be called %s", f.Name)
		}
		files = append(files, f)
	}
	return files, nil
}

// sourceName is the file of the configuration that says where the disks are from.
const sourceName = "imagefile.json"

// maxAttached is the largest file that may be attached, bytes: it is held in memory.
const maxAttached = 64 << 20

func readAttached(path string) (backup.ConfigFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return backup.ConfigFile{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxAttached+1))
	if err == nil && len(data) > maxAttached {
		err = fmt.Errorf("%s is larger than %d MiB", path, maxAttached>>20)
	}
	return backup.ConfigFile{Name: filepath.Base(path), Data: data}, err
}

// Close closes the files.
func (s *snapshot) Close() error {
	var errs []error
	for _, d := range s.disks {
		errs = append(errs, d.Chain.Close())
	}
	return errors.Join(errs...)
}

// disk is one image file with its chain.
type disk struct {
	*vdisk.Chain
	path  string
	key   string
	files []fileState // as they were when opened
}

type fileState struct {
	path string
	info os.FileInfo
}

var _ backup.Disk = (*disk)(nil)

func (d *disk) Key() string      { return d.key }
func (d *disk) ChangeID() string { return "" }

// ReadAt names the file in errors.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Chain.ReadAt(p, off)
	switch {
	case n == len(p):
		return n, err
	case err == nil || errors.Is(err, io.EOF):
		return n, fmt.Errorf("%s ends at byte %d of the disk, though it was longer when it was opened", d.path, off+int64(n))
	default:
		return n, fmt.Errorf("%s: %w", d.path, err)
	}
}

func (d *disk) Extents(_ context.Context, since string) iter.Seq2[extent.Extent, error] {
	if since != "" {
		return func(yield func(extent.Extent, error) bool) { yield(extent.Extent{}, backup.ErrChangesLost) }
	}
	return d.Chain.Allocated(4096)
}

// Verify compares the files with what they were when they were opened.
func (d *disk) Verify() (string, error) {
	for _, f := range d.files {
		now, err := os.Stat(f.path)
		if err != nil {
			return "", fmt.Errorf("imagefile: %w", err)
		}
		if !now.Mode().IsRegular() {
			continue
		}
		if now.Size() != f.info.Size() {
			return "", fmt.Errorf("imagefile: %s changed its size from %d to %d bytes while it was read", f.path, f.info.Size(), now.Size())
		}
		if !now.ModTime().Equal(f.info.ModTime()) || !os.SameFile(now, f.info) {
			return f.path + " was written to while it was read: the point may mix two states", nil
		}
	}
	return "", nil
}
