package ntfs

import (
	"errors"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Tags of reparse points ([MS-FSCC] §2.1.2.1).
const (
	tagMountPoint = 0xa0000003
	tagSymlink    = 0xa000000c
	tagLXSymlink  = 0xa000001d
	tagSocket     = 0x80000023
	tagLXFIFO     = 0x80000024
	tagLXChar     = 0x80000025
	tagLXBlock    = 0x80000026
	tagWOF        = 0x80000017
	tagDedup      = 0x80000013
	tagHSM        = 0xc0000004
	tagHSM2       = 0x80000006
	tagSIS        = 0x80000007
	tagWIM        = 0x80000008
	tagAppLink    = 0x8000001b
	tagNFS        = 0x80000014
	tagCloud      = 0x9000001a // and 0x9000101a … 0x9000f01a
	cloudMask     = 0xffff0fff
)

// maxReparse is what a reparse point may take, bytes ([MS-FSCC] §2.1.2).
const maxReparse = 16 << 10

// reparse gives tag and data of a file's reparse point ([MS-FSCC] §2.1.2.2): tag (4), length (2), reserved (2), data. The tag is 0 when there is none.
func (f *FS) reparse(i *inode) (tag uint32, data []byte, err error) {
	a := i.find(attrReparse, "")
	if a == nil {
		return 0, nil, nil
	}
	b, err := f.stream(a).all(maxReparse + 64)
	if err != nil {
		return 0, nil, err
	}
	if len(b) < 8 || 8+int(le.Uint16(b[4:])) > len(b) {
		return 0, nil, guest.Damaged("record %d of the MFT: a reparse point of %d bytes", i.number, len(b))
	}
	return le.Uint32(b), b[8 : 8+int(le.Uint16(b[4:]))], nil
}

// target gives where a link leads.
func (f *FS) target(i *inode, tag uint32, data []byte) (string, error) {
	if tag == tagLXSymlink { // version (4), then UTF-8
		if len(data) < 4 {
			return "", guest.Damaged("record %d of the MFT: a link of %d bytes", i.number, len(data))
		}
		return string(data[4:]), nil
	}
	// [MS-FSCC] §2.1.2.4 and §2.1.2.5: where the name is and its length, that for people the same; flags of a symbolic link; then both names.
	head := 8
	if tag == tagSymlink {
		head = 12
	}
	if len(data) < head {
		return "", guest.Damaged("record %d of the MFT: a link of %d bytes", i.number, len(data))
	}
	off, n := head+int(le.Uint16(data)), int(le.Uint16(data[2:]))
	if off+n > len(data) {
		return "", guest.Damaged("record %d of the MFT: a link's name of %d bytes", i.number, n)
	}
	name := strings.ReplaceAll(text(data[off:off+n]), `\`, "/")
	relative := tag == tagSymlink && le.Uint32(data[8:])&1 != 0
	if relative && !strings.HasPrefix(name, "/") {
		return f.relative(i, name)
	}
	if relative {
		return f.fromRoot(i, name, name)
	}
	name = strings.TrimPrefix(name, "/??/")
	if len(name) >= 2 && name[1] == ':' {
		return f.fromRoot(i, name[2:], name)
	}
	return strings.TrimLeft(name, "/"), nil
}

// relative gives the target of a link that is relative to its own directory.
func (f *FS) relative(i *inode, name string) (string, error) {
	dir, err := f.parent(i)
	if err != nil {
		return "", err
	}
	parts, ok, err := f.resolve(dir, strings.Split(name, "/"))
	if err != nil || !ok {
		return name, err
	}
	return strings.Join(parts, "/"), nil
}

// fromRoot gives the target of a link to a path from the root of a volume: of this one when the path is there, and else otherwise, which leads nowhere.
func (f *FS) fromRoot(i *inode, name, otherwise string) (string, error) {
	parts, ok, err := f.resolve(f.Root(), strings.FieldsFunc(name, func(r rune) bool { return r == '/' }))
	if err != nil {
		return "", err
	}
	if !ok {
		return strings.TrimLeft(otherwise, "/"), nil
	}
	up, err := f.depth(i)
	if err != nil {
		return "", err
	}
	for range up {
		parts = append([]string{".."}, parts...)
	}
	if len(parts) == 0 {
		return ".", nil
	}
	return strings.Join(parts, "/"), nil
}

// resolve gives the names of a path as directories have them; ok is whether all of it is there. What is behind another link is
// taken as it stands.
func (f *FS) resolve(dir guest.Ino, parts []string) (names []string, ok bool, err error) {
	for n, part := range parts {
		names = append(names, part)
		if part == "" || part == "." {
			continue
		}
		i, err := f.inode(dir)
		if err != nil {
			return nil, false, err
		}
		if i.find(attrReparse, "") != nil {
			return append(names, parts[n+1:]...), true, nil
		}
		if part == ".." {
			if dir, err = f.parent(i); err != nil {
				return nil, false, err
			}
			continue
		}
		dir, names[n], err = f.lookupFold(dir, part)
		if errors.Is(err, guest.ErrNotExist) || errors.Is(err, guest.ErrNotDir) {
			return nil, false, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
	return names, true, nil
}

// lookupFold finds a name as Windows does, and gives it as the directory has it.
func (f *FS) lookupFold(dir guest.Ino, name string) (guest.Ino, string, error) {
	ino, err := f.Lookup(dir, name)
	if err == nil || !errors.Is(err, guest.ErrNotExist) {
		return ino, name, err
	}
	x, err := f.directory(dir)
	if err != nil {
		return 0, "", err
	}
	units, ok := encode(name)
	if !ok {
		return 0, "", guest.ErrNotExist
	}
	x.compare = func(a, _ []byte) int {
		if n := fileName(a); n.ok() {
			return f.upcase.fold(n.units(), units)
		}
		return 0
	}
	e, err := x.lookup(nil)
	if err != nil || !fileName(e.key).ok() {
		return 0, "", errors.Join(err, guest.ErrNotExist)
	}
	return guest.Ino(le.Uint64(e.head)), text(fileName(e.key).units()), nil
}

// parent gives the directory that has the first name of a file.
func (f *FS) parent(i *inode) (guest.Ino, error) {
	var dir guest.Ino
	err := f.names(i, func(n fileName) bool {
		dir = n.dir()
		return false
	})
	if err == nil && dir == 0 {
		err = guest.Damaged("record %d of the MFT: no name", i.number)
	}
	return dir, err
}

// names gives the names of a file, until yield says that it is enough.
func (f *FS) names(i *inode, yield func(fileName) bool) error {
	for _, a := range i.attrs {
		if a.kind == attrFileName && fileName(a.value).ok() && !yield(fileName(a.value)) {
			return nil
		}
	}
	for _, r := range i.names {
		h, err := f.attribute(i.number, r.record, attrFileName, r.id)
		if err != nil {
			return err
		}
		a, err := h.parse(i.number, r.record)
		if err != nil {
			return err
		}
		if fileName(a.value).ok() && !yield(fileName(a.value)) {
			return nil
		}
	}
	return nil
}

// maxUp is how deep a directory may be.
const maxUp = 4 << 10

// depth gives how many directories are between a file and the root.
func (f *FS) depth(i *inode) (int, error) {
	for up := range maxUp {
		dir, err := f.parent(i)
		if err != nil {
			return 0, err
		}
		if dir&refMask == recordRoot {
			return up, nil
		}
		if i, err = f.inode(dir); err != nil {
			return 0, err
		}
	}
	return 0, guest.Damaged("a directory that is in itself")
}

// Readlink implements guest.FS.
func (f *FS) Readlink(ino guest.Ino) (string, error) {
	i, err := f.inode(ino)
	if err != nil {
		return "", err
	}
	n, err := f.nature(i)
	if err == nil && n.mode != guest.ModeLink {
		err = errors.New("ntfs: not a symbolic link")
	}
	return n.target, err
}
