// Package point lays a restore point out in a folder that NFS serves: its disks in several formats, its description and
// configuration. With overlays over its disks they can be written.
//
//	f, err := point.Open(ctx, tree.Point(summary), dir, point.Options{})
//	…
//	err = server.Export(nfs.Export{Path: "/web", ID: point.ID(summary.ID), FS: f})
//
// Nothing is stored twice: what clients read is computed from the point. Guests' files are not shown.
package point

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/nfs/folder"
	"github.com/holdfast-backup/holdfast/store"
)

// Disk is a writable disk in the place of one of the point.
type Disk interface {
	folder.Content
	io.WriterAt
	Flush() error
}

// Options of a folder.
type Options struct {
	// Raw gives another way to read a disk of the point, such as one that reads ahead; nil, or nil for a disk: as the tree does.
	Raw func(disk string) folder.Content
	// Writable are disks in the place of those of the point, by their names; nil: clients cannot write. Only raw files and flat VMDKs of
	// them are shown.
	Writable map[string]Disk
	// Only shows one disk; empty: all.
	Only string
}

// ID is the identity of the export of a point.
func ID(p store.PointID) uint64 { return binary.LittleEndian.Uint64(p[:]) &^ (1 << 63) }

// Open lays a point out in dir, which is made when it is missing. The caller holds the point while the folder is open.
func Open(ctx context.Context, p fs.Dir, dir string, opt Options) (*folder.Folder, error) {
	l := layout{opt: opt}
	if err := l.directory(ctx, p, ""); err != nil {
		return nil, err
	}
	return folder.Open(dir, l.placed, folder.Options{})
}

type layout struct {
	opt    Options
	placed []folder.Placed
}

// depth bounds a way down the point's configuration.
const depth = 32

func (l *layout) directory(ctx context.Context, d fs.Dir, at string) error {
	if strings.Count(at, "/") > depth {
		return errors.New("nfs: directories of the configuration are too deep")
	}
	entries, err := d.Entries(ctx)
	if err != nil {
		return err
	}
	for _, e := range entries {
		n, err := d.Lookup(ctx, e.Name)
		if err != nil {
			return err
		}
		switch n := n.(type) {
		case fs.Dir:
			if !fs.OfGuest(n) {
				err = l.directory(ctx, n, path.Join(at, e.Name))
			}
		case fs.File:
			err = l.file(ctx, n, path.Join(at, e.Name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// file places a file of the point, or what stands in its place.
func (l *layout) file(ctx context.Context, f fs.File, at string) error {
	a, err := f.Attr(ctx)
	if err != nil {
		return err
	}
	p := folder.Placed{Path: at, Key: at, Time: a.Time, Mode: 0o444, Content: &content{file: f, size: a.Size, used: a.Blocks}}
	disk, ending := diskOf(at)
	if disk != "" && l.opt.Only != "" && disk != l.opt.Only {
		return nil
	}
	isRaw := ending == ".raw" || ending == "-flat.vmdk"
	if w := l.opt.Writable[disk]; disk != "" && w != nil {
		if !isRaw && ending != ".vmdk" || ending != ".raw" && w.Size()%512 != 0 { // a VMDK has whole sectors, whatever the disk has
			return nil
		}
		if isRaw {
			p.Content, p.Mode = w, 0o666
		}
	} else if isRaw && l.opt.Raw != nil {
		if c := l.opt.Raw(disk); c != nil && c.Size() == a.Size {
			p.Content = &counted{c, a.Blocks}
		}
	}
	l.placed = append(l.placed, p)
	return nil
}

// diskOf takes the name of a disk's file apart; disk is empty for another file.
func diskOf(name string) (disk, ending string) {
	for _, ending := range []string{"-flat.vmdk", ".raw", ".vmdk", ".vhdx", ".qcow2"} {
		if disk, ok := strings.CutSuffix(name, ending); ok && strings.HasPrefix(disk, "disk") && !strings.Contains(disk, "/") {
			return disk, ending
		}
	}
	return "", ""
}

// content is a file of the point, which is opened when it is read.
type content struct {
	file       fs.File
	size, used int64 // bytes

	mu sync.Mutex // guards following
	// image is nil until it is read.
	image fs.Image
}

func (c *content) Size() int64 { return c.size }
func (c *content) Used() int64 { return c.used }

func (c *content) ReadAt(p []byte, off int64) (int, error) {
	img, err := c.open()
	if err != nil {
		return 0, err
	}
	return img.ReadAt(p, off)
}

// openTime bounds what opening a file may take: a manifest and a few pages of chunk maps.
const openTime = time.Minute

func (c *content) open() (fs.Image, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.image != nil {
		return c.image, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), openTime)
	defer cancel()
	img, err := c.file.Image(ctx)
	if err == nil {
		c.image = img
	}
	return img, err
}

// counted is a content with what it takes up.
type counted struct {
	folder.Content
	used int64
}

func (c *counted) Used() int64 { return c.used }
