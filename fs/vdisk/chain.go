package vdisk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxDepth is how many files a chain of backing files may have.
const maxDepth = 64

// Policy says what OpenChain may do. The zero value is the safe one.
//
// An image comes from people who are not trusted with what this process may
// read: without the restrictions, a backing file name of "/etc/shadow" would
// put that file into the backup of whoever made the image.
type Policy struct {
	// Format of the top file: "raw", "qcow2", or "" to tell by the magic.
	// A raw disk whose owner writes a qcow2 header to its first sector is
	// taken for a qcow2 when it is "".
	Format string
	// AllowOutside permits absolute backing names and those that leave the
	// directory tree of the top file, by ".." or by a symbolic link.
	AllowOutside bool
	// AllowDevices permits block devices as backing files. The top file may
	// always be one.
	AllowDevices bool
}

// Chain is a disk read through an image file and its backing files.
type Chain struct {
	Source
	files []*RawFile // the top first
}

// OpenChain opens the disk image at path, raw or qcow2, with the backing files
// it names, relative to the file that names them. A backing file whose format
// is not recorded is told by its magic.
//
// A chain that comes back to a file (by device and inode) or is longer than 64
// is ErrCorrupt; what the policy forbids is ErrRefused: names outside of the
// directory, devices, anything else that is no regular file, and names of the
// form "protocol:…". Memory: up to 5 MiB of caches per qcow2 file of the chain.
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
		o.chain.Source, err = o.open(f, name, policy.Format)
	}
	if err != nil {
		o.chain.Close()
		return nil, err
	}
	return o.chain, nil
}

// Files lists the paths of the chain, the top first.
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

// open takes over f. name is its path relative to base, or absolute.
func (o *chainOpener) open(f *os.File, name, format string) (Source, error) {
	raw, err := newRaw(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	o.chain.files = append(o.chain.files, raw)
	if len(o.chain.files) > maxDepth {
		return nil, corrupt("a chain of more than %d backing files", maxDepth)
	}
	if err := o.once(f); err != nil {
		return nil, err
	}
	if format == "" {
		if format, err = probe(raw); err != nil {
			return nil, err
		}
	}
	switch format {
	case "raw":
		return raw, nil
	case "qcow2":
		return OpenQCOW2(raw, raw.Size(), QCOW2Options{
			Name: f.Name(),
			Backing: func(backing, format string) (Source, error) {
				return o.backing(name, backing, format)
			},
		})
	}
	return nil, unsupported("%s: format %q", f.Name(), format)
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

func probe(raw *RawFile) (string, error) {
	magic := make([]byte, min(raw.Size(), int64(len(qcowMagic))))
	if _, err := readFull(raw, magic, 0); err != nil {
		return "", err
	}
	if string(magic) == qcowMagic {
		return "qcow2", nil
	}
	return "raw", nil
}

// backing opens what the image called from names.
func (o *chainOpener) backing(from, name, format string) (Source, error) {
	// QEMU takes anything with a colon before the first slash for a protocol.
	if head, _, _ := strings.Cut(name, "/"); strings.Contains(head, ":") {
		return nil, refused("is not a path (file names with a colon are written ./a:b)")
	}
	rel := name
	if !filepath.IsAbs(name) {
		dir, _ := filepath.Split(from)
		rel = dir + name // not cleaned: what .. means after a link is for the kernel to say
	}
	f, err := o.openBacking(rel)
	if err != nil {
		return nil, err
	}
	if err := o.checkType(f); err != nil {
		f.Close()
		return nil, err
	}
	return o.open(f, rel, format)
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
