package fs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/machine"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// guestSide is what all nodes of one volume or view of a point have in common.
type guestSide struct {
	point *pointDir
	view  int // from 1; 0 for a volume by itself
	seed  uint64
}

// guestNode is a file, directory or anything else of a guest. It keeps no reader open: the kernel remembers what it has
// looked at for long.
type guestNode struct {
	side *guestSide
	vol  int // of the machine's volumes; noVolume for that of the view's own top
	ino  guest.Ino
}

// The kinds of guest nodes.
type (
	guestDir     struct{ guestNode }
	guestFile    struct{ guestNode }
	guestLink    struct{ guestNode }
	guestSpecial struct{ guestNode }
)

// inode mixes the bits of what the node is (splitmix64): looking up a million files hashes a million times.
func (n *guestNode) inode() uint64 {
	x := n.side.seed + uint64(n.vol)*0x9e3779b97f4a7c15 + uint64(n.ino)*0xbf58476d1ce4e5b9
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return (x^x>>31)>>1 | 2
}

// noVolume is what slices.Index says of the volume that a view made up for its root.
const noVolume = -1

// volume gives the volume that the node is on.
func (n *guestNode) volume(m *machine.Machine) *machine.Volume {
	if n.vol == noVolume {
		return m.Views()[n.side.view-1].Root.Vol
	}
	return m.Volumes[n.vol]
}

// open gives the volume and its file system.
func (n *guestNode) open(ctx context.Context) (*machine.Machine, guest.FS, error) {
	m, err := n.side.point.tree.machine(ctx, n.side.point)
	if err != nil {
		return nil, nil, err
	}
	f, err := n.volume(m).FS()
	return m, f, n.located(m, err)
}

// located says of an error where it was.
func (n *guestNode) located(m *machine.Machine, err error) error {
	if err == nil || errors.Is(err, guest.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%s/%s: files/%s: inode %d: %w", n.side.point.sum.VM, n.side.point.sum.Name, n.volume(m).Name, n.ino, err)
}

// guestKinds maps a file type to a kind.
var guestKinds = map[uint32]Kind{
	guest.ModeDir: KindDir, guest.ModeRegular: KindFile, guest.ModeLink: KindLink, guest.ModeChar: KindChar,
	guest.ModeBlock: KindBlock, guest.ModeFIFO: KindFIFO, guest.ModeSocket: KindSocket,
}

// node makes the node of an inode.
func (g *guestSide) node(ctx context.Context, vol int, ino guest.Ino, where string) (Node, error) {
	n := guestNode{side: g, vol: vol, ino: ino}
	st, err := n.stat(ctx)
	if err != nil {
		return nil, err
	}
	kind, ok := guestKinds[st.Mode&guest.ModeType]
	switch {
	case !ok:
		return nil, guest.Damaged("%s: inode %d has the type %o", where, ino, st.Mode&guest.ModeType)
	case kind == KindDir:
		return &guestDir{n}, nil
	case kind == KindFile:
		return &guestFile{n}, nil
	case kind == KindLink:
		return &guestLink{n}, nil
	}
	return &guestSpecial{n}, nil
}

func (n *guestNode) stat(ctx context.Context) (guest.Stat, error) {
	m, f, err := n.open(ctx)
	if err != nil {
		return guest.Stat{}, err
	}
	st, err := f.Stat(n.ino)
	return st, n.located(m, err)
}

// Attr implements Node.
func (n *guestNode) Attr(ctx context.Context) (Attr, error) {
	st, err := n.stat(ctx)
	if err != nil {
		return Attr{}, err
	}
	return Attr{Kind: guestKinds[st.Mode&guest.ModeType], Inode: n.inode(), Size: st.Size, Blocks: st.Allocated, Time: st.Mtime, Immutable: true, Guest: &st}, nil
}

// Xattrs implements Xattrer.
func (n *guestNode) Xattrs(ctx context.Context) ([]guest.Xattr, error) {
	m, f, err := n.open(ctx)
	if err != nil {
		return nil, err
	}
	list, err := f.Xattrs(n.ino)
	return list, n.located(m, err)
}

// at is what a guest sees at an inode: another volume, where one is mounted.
func (n *guestNode) at(m *machine.Machine, ino guest.Ino) (vol int, at guest.Ino) {
	if n.side.view == 0 {
		return n.vol, ino
	}
	p := m.Views()[n.side.view-1].At(machine.Place{Vol: n.volume(m), Ino: ino})
	if p.Vol == n.volume(m) {
		return n.vol, p.Ino
	}
	return slices.Index(m.Volumes, p.Vol), p.Ino
}

// Lookup implements Dir.
func (d *guestDir) Lookup(ctx context.Context, name string) (Node, error) {
	m, f, err := d.open(ctx)
	if err != nil {
		return nil, err
	}
	ino, err := f.Lookup(d.ino, name)
	if errors.Is(err, guest.ErrNotExist) {
		s, err := d.stream(f, name)
		if errors.Is(err, guest.ErrNotExist) {
			return nil, notExist(name)
		}
		return s, d.located(m, err)
	}
	if err != nil {
		return nil, d.located(m, err)
	}
	vol, at := d.at(m, ino)
	return d.side.node(ctx, vol, at, name)
}

// stream finds FILE:STREAM, as Windows names what a file has besides its content.
func (d *guestDir) stream(f guest.FS, name string) (Node, error) {
	s, ok := f.(guest.Streamer)
	first, stream, colon := strings.Cut(name, ":")
	if !ok || !colon {
		return nil, guest.ErrNotExist
	}
	ino, err := f.Lookup(d.ino, first)
	if err != nil {
		return nil, err
	}
	if _, err := s.OpenStream(ino, stream); err != nil {
		return nil, err
	}
	return &guestStream{guestNode{d.side, d.vol, ino}, stream}, nil
}

// List implements Lister.
func (d *guestDir) List(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		m, f, err := d.open(ctx)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		for e, err := range f.ReadDir(d.ino, 0) {
			if err != nil {
				yield(Entry{}, d.located(m, err))
				return
			}
			kind, known := guestKinds[e.Type]
			vol, at := d.at(m, e.Ino)
			child := guestNode{d.side, vol, at}
			if !known {
				a, err := child.Attr(ctx)
				if err != nil {
					yield(Entry{}, err)
					return
				}
				kind = a.Kind
			}
			if !yield(Entry{Name: e.Name, Kind: kind, Inode: child.inode(), Guest: GuestID{GuestVolume{d.side, vol}, at}}, nil) {
				return
			}
		}
	}
}

// Entries implements Dir.
func (d *guestDir) Entries(ctx context.Context) ([]Entry, error) {
	var es []Entry
	for e, err := range d.List(ctx) {
		if err != nil {
			return nil, err
		}
		es = append(es, e)
	}
	return es, nil
}

// Target implements Link.
func (l *guestLink) Target(ctx context.Context) (string, error) {
	m, f, err := l.open(ctx)
	if err != nil {
		return "", err
	}
	target, err := f.Readlink(l.ino)
	return target, l.located(m, err)
}

// linger is how long a point stays held after the last of a guest's files was closed: to hold it takes longer than to read
// most files.
const linger = 5 * time.Second

// Hold implements File.
func (n *guestNode) Hold(ctx context.Context) (release func(), err error) {
	return n.side.point.hold(ctx, linger)
}

// Image implements File.
func (n *guestFile) Image(ctx context.Context) (Image, error) {
	m, f, err := n.open(ctx)
	if err != nil {
		return nil, err
	}
	file, err := f.Open(n.ino)
	if err != nil {
		return nil, n.located(m, err)
	}
	return &guestImage{file, n, m}, nil
}

// guestImage says of errors where they were.
type guestImage struct {
	guest.File
	node interface {
		located(*machine.Machine, error) error
	}
	m *machine.Machine
}

func (i *guestImage) ReadAt(p []byte, off int64) (int, error) {
	n, err := i.File.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		return n, io.EOF
	}
	return n, i.node.located(i.m, err)
}

func (i *guestImage) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		for e, err := range i.File.Allocated(granularity) {
			if !yield(e, i.node.located(i.m, err)) {
				return
			}
		}
	}
}

// guestStream is a further content of a file.
type guestStream struct {
	guestNode
	name string
}

func (s *guestStream) Attr(ctx context.Context) (Attr, error) {
	a, err := s.guestNode.Attr(ctx)
	if err != nil {
		return a, err
	}
	img, err := s.Image(ctx)
	if err != nil {
		return a, err
	}
	st := *a.Guest
	st.Mode, st.Nlink, st.Size, st.Allocated = guest.ModeRegular|st.Mode&0o666, 1, img.Size(), img.Size()
	a.Kind, a.Inode, a.Size, a.Blocks, a.Guest = KindFile, inodeOf("stream", fmt.Sprint(a.Inode), s.name), st.Size, st.Allocated, &st
	return a, nil
}

func (s *guestStream) Image(ctx context.Context) (Image, error) {
	m, f, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
	streams, ok := f.(guest.Streamer)
	if !ok {
		return nil, notExist(s.name)
	}
	file, err := streams.OpenStream(s.ino, s.name)
	if err != nil {
		return nil, s.located(m, err)
	}
	return &guestImage{file, &s.guestNode, m}, nil
}

var (
	_ Lister  = (*guestDir)(nil)
	_ Link    = (*guestLink)(nil)
	_ File    = (*guestFile)(nil)
	_ File    = (*guestStream)(nil)
	_ Node    = (*guestSpecial)(nil)
	_ Xattrer = (*guestFile)(nil)
	_ Dir     = (*filesDir)(nil)
)

// OfGuest reports whether a node is of what the file systems of a guest hold: files/ of a point, or a folder, volume, view,
// directory, file, link or device below it.
func OfGuest(n Node) bool {
	switch n.(type) {
	case *filesDir, *guestRoot, *guestDir, *guestFile, *guestLink, *guestSpecial, *guestStream:
		return true
	}
	return false
}
