package ntfs

import (
	"errors"
	"iter"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Records of system files (NTFS doc, "System Files").
const (
	recordVolume    = 3
	recordRoot      = 5
	recordBitmap    = 6
	recordSecure    = 9
	recordUpcase    = 10
	recordLog       = 2
	recordFirstUser = 24 // those before are the system's
)

// fileName is the value of $FILE_NAME (NTFS doc), which is also the key of a directory's entry:
//
//	0x00  reference to the directory (8)   0x08  four times, two sizes   0x38  flags (4)
//	0x40  length, UTF-16 units (1)   0x41  name space (1): 0 POSIX, 1 Windows, 2 DOS, 3 both   0x42  the name
type fileName []byte

const (
	dosName  = 2
	bothName = 3
)

func (n fileName) ok() bool       { return len(n) >= 0x42 && len(n) >= 0x42+2*int(n[0x40]) }
func (n fileName) units() []byte  { return n[0x42 : 0x42+2*int(n[0x40])] }
func (n fileName) space() byte    { return n[0x41] }
func (n fileName) flags() uint32  { return le.Uint32(n[0x38:]) }
func (n fileName) dir() guest.Ino { return guest.Ino(le.Uint64(n)) }
func (u upcase) names(a, b []byte) int {
	x, y := fileName(a), fileName(b)
	if !x.ok() || !y.ok() {
		return 0 // an entry without a name: out of order
	}
	return u.compare(x.units(), y.units())
}

// directory gives the index of a directory.
func (f *FS) directory(ino guest.Ino) (*index, error) {
	i, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	if !i.dir {
		return nil, guest.ErrNotDir
	}
	return f.index(i, "$I30", f.upcase.names)
}

// Lookup implements guest.FS. It finds short names and those of system files too, as ntfs-3g does.
func (f *FS) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	x, err := f.directory(dir)
	if err != nil {
		return 0, err
	}
	units, ok := encode(name)
	if !ok || name == "." {
		return 0, guest.ErrNotExist
	}
	key := make([]byte, 0x42, 0x42+len(units))
	key[0x40] = byte(len(units) / 2)
	e, err := x.lookup(append(key, units...))
	if err != nil {
		return 0, err
	}
	ino := guest.Ino(le.Uint64(e.head))
	return ino, f.child(x.number, ino)
}

// child makes sure that a directory which is found in another is known to be there: otherwise directories could go in a circle.
func (f *FS) child(dir int64, ino guest.Ino) error {
	i, err := f.inode(ino)
	if errors.Is(err, guest.ErrNotExist) {
		return guest.Damaged("record %d of the MFT is in a directory, and not in use", ino&refMask)
	}
	if err != nil || !i.dir || ino&refMask < recordFirstUser && dir == recordRoot {
		return err
	}
	known := false
	err = f.names(i, func(n fileName) bool {
		known = int64(n.dir()&refMask) == dir
		return !known
	})
	if err == nil && !known {
		err = guest.Damaged("directory %d does not know that it is in directory %d", i.number, dir)
	}
	return err
}

// ReadDir implements guest.FS. The names come in the order of Windows.
func (f *FS) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		x, err := f.directory(dir)
		var after []byte
		if err == nil && from != 0 {
			after, err = x.at(from)
		}
		var bad error
		if err == nil {
			stopped := false
			err = x.walk(after, func(number int64, e entry) bool {
				listed, ok, err := f.listing(x.number, e)
				if err != nil {
					bad = err // for the end: the others are good
				}
				if !ok {
					return true
				}
				listed.Next = cookie(number, e.off)
				stopped = !yield(listed, nil)
				return !stopped
			})
			if stopped {
				return
			}
		}
		if err == nil {
			err = bad
		}
		if err != nil {
			yield(guest.Entry{}, err)
		}
	}
}

// cookie names an entry of an index.
func cookie(number int64, off int) uint64 { return uint64(number+2)<<16 | uint64(off) }

// at gives the key of the entry that a cookie names.
func (x *index) at(cookie uint64) ([]byte, error) {
	n, err := x.node(int64(cookie>>16) - 2)
	if err != nil {
		return nil, err
	}
	e, _, err := n.entry(int(cookie & 0xffff))
	if err == nil && !fileName(e.key).ok() {
		err = guest.Damaged("record %d of the MFT: no entry %#x", x.number, cookie)
	}
	return e.key, err
}

// listing makes what is listed of an entry; ok is false for what is not.
func (f *FS) listing(dir int64, e entry) (listed guest.Entry, ok bool, err error) {
	n := fileName(e.key)
	if !n.ok() {
		return listed, false, guest.Damaged("an entry of a directory without a name")
	}
	ino := guest.Ino(le.Uint64(e.head))
	if n.space() == dosName || ino&refMask < recordFirstUser {
		return listed, false, nil
	}
	name := text(n.units())
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return listed, false, guest.Damaged("a file with the name %q", name)
	}
	listed = guest.Entry{Name: name, Ino: ino}
	switch flags := n.flags(); {
	case flags&flagReparse != 0:
	case flags&flagDirectory != 0:
		listed.Type = guest.ModeDir
	case flags&flagSystem == 0:
		listed.Type = guest.ModeRegular
	}
	if listed.Type != guest.ModeRegular {
		if _, loadErr := f.inode(ino); loadErr == nil { // else Stat tells
			err = f.child(dir, ino)
		}
	}
	return listed, err == nil, err
}
