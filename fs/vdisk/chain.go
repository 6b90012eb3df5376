package vdisk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxDepth is how many images a chain of backing files or parents may have.
const maxDepth = 64

// Policy says what OpenChain may do. The zero value is the safe one.
//
// An image comes from people who are not trusted with what this process may
// read: without the restrictions, a backing file name of "/etc/shadow" would
// put that file into the backup of whoever made the image.
type Policy struct {
	// Format of the top file: "raw", "qcow2", "vmdk", "vhd" (or "vpc", as QEMU
	// says), "vhdx", or "" to tell by the magic. A raw disk whose owner writes a
	// qcow2 header to its first sector is taken for a qcow2 when it is "".
	Format string
	// AllowOutside permits absolute names of backing files, parents and extents,
	// and those that leave the directory tree of the top file, by ".." or by a
	// symbolic link.
	AllowOutside bool
	// AllowDevices permits block devices as backing files and extents. The top
	// file may always be one.
	AllowDevices bool
}

// Chain is a disk read through an image file, and its extents, backing files
// and parents.
type Chain struct {
	Source
	files []*RawFile // the top first
}

// OpenChain opens the disk image at path, raw, qcow2, VMDK, VHD or VHDX, with
// the files it names, relative to the file that names them: backing files,
// parents, extents. A backing file whose format is not recorded is told by its
// magic.
//
// A chain that comes back to an image (by device and inode) or is longer than 64
// is ErrCorrupt; what the policy forbids is ErrRefused: names outside of the
// directory, devices, anything else that is no regular file, and, in a qcow2,
// names of the form "protocol:…". Memory: up to 5 MiB of caches per image of the
// chain, and 8 KiB for each extent above 512.
func OpenChain(path string, policy Policy) (*Chain, error) {
	base, name := filepath.Split(path) // not Dir, which takes link/.. out
	if base == "" {
		base = "./"
	}
	root, err := os.OpenRoot(base)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	o := &chainOpener{policy: policy, root: root, base: base, chain: new(Chain), seen: map[fileID]string{}}
	f, err := openFile(path)
	if err == nil {
		o.chain.Source, err = o.open(image{file: f, name: name, format: policy.Format})
	}
	if err != nil {
		o.chain.Close()
		return nil, err
	}
	return o.chain, nil
}

// Files lists the paths of all files of the chain, the top first.
func (c *Chain) Files() []string {
	names := make([]string, len(c.files))
	for i, f := range c.files {
		names[i] = f.f.Name()
	}
	return names
}

// Close may be called twice.
func (c *Chain) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

type fileID struct{ dev, ino uint64 }

// chainOpener is the state of one OpenChain.
type chainOpener struct {
	policy Policy
	root   *os.Root // the directory of the top file
	base   string   // its path, ending in a slash
	chain  *Chain
	seen   map[fileID]string // file => its path
}

// image is a file of the chain and how it was found.
type image struct {
	file   *os.File
	name   string // relative to chainOpener.base, or absolute
	format string // "": tell by the magic
	depth  int    // images above it
}

// open takes over the file.
func (o *chainOpener) open(i image) (Source, error) {
	raw, err := o.add(i.file)
	if err != nil {
		return nil, err
	}
	if i.depth == maxDepth {
		return nil, corrupt("a chain of more than %d backing files", maxDepth)
	}
	if err := o.once(i.file); err != nil {
		return nil, err
	}
	if i.format == "" {
		if i.format, err = probe(raw, i.name); err != nil {
			return nil, err
		}
	}
	switch i.format {
	case "raw":
		return raw, nil
	case "qcow2":
		return o.qcow2(i, raw)
	case "vmdk":
		return o.vmdk(i, raw)
	case "vhd", "vpc":
		return o.vhd(i, raw)
	case "vhdx":
		return o.vhdx(i, raw)
	}
	return nil, unsupported("%s: format %q", i.file.Name(), i.format)
}

// add takes over f, as a file of the chain.
func (o *chainOpener) add(f *os.File) (*RawFile, error) {
	raw, err := newRaw(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	o.chain.files = append(o.chain.files, raw)
	return raw, nil
}

func (o *chainOpener) qcow2(i image, raw *RawFile) (Source, error) {
	return OpenQCOW2(raw, raw.Size(), QCOW2Options{
		Name: i.file.Name(),
		Backing: func(name, format string) (Source, error) {
			// QEMU takes anything with a colon before the first slash for a protocol.
			if head, _, _ := strings.Cut(name, "/"); strings.Contains(head, ":") {
				return nil, refused("is not a path (file names with a colon are written ./a:b)")
			}
			return o.backing(i, name, format)
		},
	})
}

func (o *chainOpener) vmdk(i image, raw *RawFile) (Source, error) {
	return OpenVMDK(raw, raw.Size(), VMDKOptions{
		Name: i.file.Name(),
		Extent: func(name string) (io.ReaderAt, int64, error) {
			f, _, err := o.named(i, slashes(name))
			if err != nil {
				return nil, 0, err
			}
			raw, err := o.add(f)
			if err != nil {
				return nil, 0, err
			}
			return raw, raw.Size(), nil
		},
		Parent: func(hint string) (*VMDKImage, error) {
			src, err := o.backing(i, slashes(hint), "vmdk")
			parent, _ := src.(*VMDKImage)
			return parent, err
		},
	})
}

func (o *chainOpener) vhd(i image, raw *RawFile) (Source, error) {
	return OpenVHD(raw, raw.Size(), VHDOptions{
		Name: i.file.Name(),
		Parent: func(name string) (*VHDImage, error) {
			src, err := o.backing(i, name, "vhd")
			parent, _ := src.(*VHDImage)
			return parent, err
		},
	})
}

func (o *chainOpener) vhdx(i image, raw *RawFile) (Source, error) {
	return OpenVHDX(raw, raw.Size(), VHDXOptions{
		Name:   i.file.Name(),
		Parent: func(l ParentLocator) (Source, error) { return o.vhdxParent(i, l) },
	})
}

// vhdxParent tries all names of a parent: a wrong file shows by its id.
func (o *chainOpener) vhdxParent(i image, l ParentLocator) (src Source, err error) {
	err = corrupt("no file is named")
	for n, name := range l.names() {
		src, e := o.backing(i, name, "vhdx")
		if n == 0 || !errors.Is(e, os.ErrNotExist) {
			err = e
		}
		if !errors.Is(e, os.ErrNotExist) {
			return src, err
		}
	}
	return nil, err
}

func (o *chainOpener) once(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t) // always so on Linux
	id := fileID{uint64(sys.Dev), sys.Ino}
	if before, ok := o.seen[id]; ok {
		return corrupt("%s is in its own chain of backing files (as %s)", f.Name(), before)
	}
	o.seen[id] = f.Name()
	return nil
}

// probe tells the format of a file by its magic. What a fixed VHD has at its
// start is its owner's, and so is what an image of another format may have at
// its end: the name decides which of the two is looked at first.
func probe(raw *RawFile, name string) (string, error) {
	head := make([]byte, min(raw.Size(), kib))
	if _, err := readFull(raw, head, 0); err != nil {
		return "", err
	}
	_, err := readVHDFooter(raw, raw.Size())
	isVHD := err == nil || hasPrefix(head, vhdMagic)
	switch ext := strings.ToLower(filepath.Ext(name)); {
	case isVHD && (ext == ".vhd" || ext == ".avhd"):
		return "vhd", nil
	case hasPrefix(head, qcowMagic):
		return "qcow2", nil
	case hasPrefix(head, vmdkMagic), hasPrefix(head, cowdMagic), hasPrefix(head, seSparseMagic), isVMDKText(head):
		return "vmdk", nil
	case hasPrefix(head, "vhdxfile"):
		return "vhdx", nil
	case isVHD:
		return "vhd", nil
	}
	return "raw", nil
}

// backing opens an image that another one names.
func (o *chainOpener) backing(from image, name, format string) (Source, error) {
	f, rel, err := o.named(from, name)
	if err != nil {
		return nil, err
	}
	return o.open(image{f, rel, format, from.depth + 1})
}

// named opens a file that an image names, and gives its path as image.name.
func (o *chainOpener) named(from image, name string) (*os.File, string, error) {
	rel := name
	if !filepath.IsAbs(name) {
		dir, _ := filepath.Split(from.name)
		rel = dir + name // not cleaned: what .. means after a link is for the kernel to say
	}
	f, err := o.openBacking(rel)
	if err != nil {
		return nil, "", err
	}
	if err := o.checkType(f); err != nil {
		f.Close()
		return nil, "", err
	}
	return f, rel, nil
}

func (o *chainOpener) openBacking(rel string) (*os.File, error) {
	if o.policy.AllowOutside {
		if !filepath.IsAbs(rel) {
			rel = o.base + rel
		}
		return openFile(rel)
	}
	if filepath.IsAbs(rel) {
		return nil, refused("is an absolute path, which could be any file of this host")
	}
	f, err := o.root.OpenFile(rel, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.As(err, new(syscall.Errno)) {
		return nil, refused("leaves the directory of the top image, %s (%v)", o.base, err)
	}
	return f, err
}

func (o *chainOpener) checkType(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	switch mode := st.Mode(); {
	case mode.IsRegular():
		return nil
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0 && o.policy.AllowDevices:
		return nil
	default:
		return refused("is no regular file (%v)", mode.Type())
	}
}

func refused(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrRefused)...)
}
