package machine

import (
	"iter"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// letters is the top of what Windows shows: a directory with one for each drive letter, all of them empty. A view mounts the volumes over
// them.
type letters struct {
	list string     // "CD": the letter i is the inode lettersRoot+1+i
	stat guest.Stat // of the top
}

const lettersRoot guest.Ino = 1

func (l *letters) ino(i int) guest.Ino { return lettersRoot + 1 + guest.Ino(i) }

func (l *letters) has(ino guest.Ino) bool {
	return ino == lettersRoot || ino > lettersRoot && ino <= lettersRoot+guest.Ino(len(l.list))
}

func (l *letters) Info() guest.Info { return guest.Info{} }
func (l *letters) Root() guest.Ino  { return lettersRoot }

func (l *letters) Stat(ino guest.Ino) (guest.Stat, error) {
	if !l.has(ino) {
		return guest.Stat{}, guest.ErrNotExist
	}
	st := l.stat
	if st.Nlink = 2; ino == lettersRoot {
		st.Nlink += uint32(len(l.list))
	}
	return st, nil
}

func (l *letters) Lookup(dir guest.Ino, name string) (guest.Ino, error) {
	if i := strings.Index(l.list, name); dir == lettersRoot && len(name) == 1 && i >= 0 {
		return l.ino(i), nil
	}
	return 0, guest.ErrNotExist
}

func (l *letters) ReadDir(dir guest.Ino, from uint64) iter.Seq2[guest.Entry, error] {
	return func(yield func(guest.Entry, error) bool) {
		if dir != lettersRoot {
			return
		}
		for i := int(min(from, uint64(len(l.list)))); i < len(l.list); i++ {
			if !yield(guest.Entry{Name: l.list[i : i+1], Ino: l.ino(i), Type: guest.ModeDir, Next: uint64(i) + 1}, nil) {
				return
			}
		}
	}
}

func (l *letters) Readlink(guest.Ino) (string, error)      { return "", guest.ErrNotExist }
func (l *letters) Open(guest.Ino) (guest.File, error)      { return nil, guest.ErrNotExist }
func (l *letters) Xattrs(guest.Ino) ([]guest.Xattr, error) { return nil, nil }

// Letter gives the drive letter that volumes are mounted over at p; "" for another place.
func (v *View) Letter(p Place) string {
	g, _ := v.Root.Vol.fs.(guarded)
	l, ok := g.fs.(*letters)
	if !ok || p.Vol != v.Root.Vol || p.Ino <= lettersRoot || !l.has(p.Ino) {
		return ""
	}
	return l.list[p.Ino-lettersRoot-1:][:1]
}

var _ guest.FS = (*letters)(nil)
