// Package fs is the one address space of a repository: VMs, their restore
// points, and in each point its description, configuration and disks in several formats.
// FUSE, NFS and the command line show the same tree.
//
//	VM/latest                    -> 2026-11-21T063000Z
//	VM/2026-11-21T063000Z/point.json
//	VM/2026-11-21T063000Z/config/…
//	VM/2026-11-21T063000Z/files/disk0/p1/…  files/VG-LV/…  files/root/…   what the guest's file systems hold
//	VM/2026-11-21T063000Z/disk0.raw  disk0.qcow2  disk0.vmdk + disk0-flat.vmdk  disk0.vhdx
//
// Nothing is stored twice: disk formats are computed over the point's image.
// Everything below a point is immutable and has the same identity after every
// restart. Looking around reads manifests and chunk maps, never chunks.
package fs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Image is the content of a file: bytes that never change.
type Image interface {
	io.ReaderAt
	Size() int64 // bytes
	// Allocated yields ascending ranges outside of which all bytes are zero,
	// aligned to granularity (bytes). It reads no chunk.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
}

// Kind of a node.
type Kind uint8

// The kinds of nodes.
const (
	KindDir Kind = iota
	KindFile
	KindLink
	// Of guests only: what is shown, and never opened.
	KindChar
	KindBlock
	KindFIFO
	KindSocket
)

// Attr describes a node.
type Attr struct {
	Kind Kind
	// Inode is the same for the same thing after every restart.
	Inode uint64
	Size  int64 // bytes
	// Blocks is the bytes that the file would take up if stored sparsely.
	Blocks int64
	Time   time.Time
	// Immutable: neither the node nor, for a directory, its entries ever change.
	Immutable bool
	// Guest is what the guest's own file system says; nil outside of files/.
	Guest *guest.Stat
}

// Entry is a line of a directory.
type Entry struct {
	Name  string
	Kind  Kind
	Inode uint64
	Guest GuestID // of an entry of a guest's directory
}

// Node is one place in the tree. Dir, File and Link say what can be done with it.
type Node interface {
	Attr(ctx context.Context) (Attr, error)
}

// Dir is a directory.
type Dir interface {
	Node
	// Lookup gives an entry; store.ErrNotExist when there is none.
	Lookup(ctx context.Context, name string) (Node, error)
	// Entries lists the directory in order.
	Entries(ctx context.Context) ([]Entry, error)
}

// Lister is a directory that may be too large to be listed at once.
type Lister interface {
	Dir
	// List yields the entries as the file system has them. An error ends it.
	List(ctx context.Context) iter.Seq2[Entry, error]
}

// Xattrer is a node with extended attributes.
type Xattrer interface {
	Node
	Xattrs(ctx context.Context) ([]guest.Xattr, error)
}

// File is a file.
type File interface {
	Node
	// Hold keeps the content readable until release is called, even if its point is
	// forgotten and collected meanwhile. store.ErrNotExist when it is gone already.
	Hold(ctx context.Context) (release func(), err error)
	// Image gives the content. It needs no closing.
	Image(ctx context.Context) (Image, error)
}

// Link is a symbolic link.
type Link interface {
	Node
	Target(ctx context.Context) (string, error)
}

// maxLinks is how many symbolic links a path may lead through, as in path_resolution(7).
const maxLinks = 40

// Walk resolves a slash-separated path from the root, following the tree's own links (`latest`), and those of a guest within
// the volume or view that they are in: an absolute one starts there. The last component is not followed when it is a guest's
// link. Components may name a point the way the command line does.
func (t *Tree) Walk(ctx context.Context, p string) (Node, error) {
	trail := []Node{t.Root()} // from the root to here
	base := 1                 // as long as a guest's own root is from it
	rest := strings.Split(p, "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			trail = trail[:max(base, len(trail)-1)]
			continue
		}
		next, err := t.step(ctx, trail[len(trail)-1], name)
		if err != nil {
			return nil, err
		}
		if _, ok := next.(*guestDir); ok {
			if _, outside := trail[len(trail)-1].(*filesDir); outside {
				base = len(trail) + 1
			}
		}
		l, ok := next.(Link)
		if _, guests := next.(*guestLink); !ok || guests && len(rest) == 0 {
			trail = append(trail, next)
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("%s: too many symbolic links", p)
		}
		target, err := l.Target(ctx)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(target, "/") {
			trail = trail[:base]
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return trail[len(trail)-1], nil
}

// step looks one component up.
func (t *Tree) step(ctx context.Context, n Node, name string) (Node, error) {
	d, ok := n.(Dir)
	if !ok {
		return nil, fmt.Errorf("%s is not in a directory: %w", name, store.ErrNotExist)
	}
	next, err := d.Lookup(ctx, name)
	if v, isVM := d.(*vmDir); isVM && errors.Is(err, store.ErrNotExist) {
		return v.find(ctx, name)
	}
	return next, err
}

// inodeOf makes a stable inode number out of what a node is.
func inodeOf(parts ...string) uint64 {
	h := blake3.New()
	for _, p := range parts {
		h.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(p))))
		io.WriteString(h, p)
	}
	var sum [8]byte
	h.Digest().Read(sum[:])
	// 0 and 1 mean something to FUSE, and the top bit is go-fuse's own.
	return binary.LittleEndian.Uint64(sum[:])>>1 | 2
}

// identityOf makes the ids inside a computed disk format.
func identityOf(point store.PointID, disk string) vdisk.Identity {
	sum := blake3.Sum256(append(point[:], disk...))
	return vdisk.Identity(sum[:16])
}

// notExist is the error of a look-up.
func notExist(name string) error { return fmt.Errorf("%s: %w", name, store.ErrNotExist) }

// memory is an Image of bytes in memory.
type memory struct{ *strings.Reader }

func (m memory) Size() int64 { return m.Reader.Size() }

func (m memory) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: m.Size()}}), granularity, m.Size())
}
