package fs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"time"
	"weak"

	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/fs/vdisk"
	"github.com/holdfast-backup/holdfast/store"
)

// Tree is the address space of one repository. Safe for concurrent use.
type Tree struct {
	repo *store.Repo
	// Unlock gives the passphrases and keys to try for an encrypted volume of a guest (volume.Options); nil for none. Set it before anything is asked of the tree.
	Unlock func(volume.Locked) [][]byte

	mu     sync.Mutex                  // guards following
	points map[store.PointID]*pointDir // point => its directory, at most maxPoints

	machines machines
}

// maxPoints bounds the points whose manifests are kept in memory.
const maxPoints = 512

// New makes the tree of a repository.
func New(repo *store.Repo) *Tree {
	return &Tree{repo: repo, points: map[store.PointID]*pointDir{}}
}

// Root is the directory of VMs.
func (t *Tree) Root() Dir { return &rootDir{t} }

// Point is the directory of a point.
func (t *Tree) Point(s store.Summary) Dir {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.points[s.ID]; p != nil {
		return p
	}
	if len(t.points) >= maxPoints {
		for id := range t.points { // any one: it is only read again
			delete(t.points, id)
			break
		}
	}
	p := &pointDir{tree: t, sum: s}
	t.points[s.ID] = p
	return p
}

// rootDir lists the VMs.
type rootDir struct{ tree *Tree }

func (d *rootDir) Attr(context.Context) (Attr, error) {
	return Attr{Kind: KindDir, Inode: 1, Time: d.tree.repo.Created()}, nil
}

func (d *rootDir) Lookup(ctx context.Context, name string) (Node, error) {
	list, err := d.tree.repo.PointsOf(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 || name == "" {
		return nil, notExist(name)
	}
	return &vmDir{d.tree, name}, nil
}

func (d *rootDir) Entries(ctx context.Context) ([]Entry, error) {
	list, err := d.tree.repo.Points(ctx)
	if err != nil {
		return nil, err
	}
	var es []Entry
	for _, s := range list {
		if s.VM == "" || (len(es) > 0 && es[len(es)-1].Name == s.VM) {
			continue // without a readable manifest the VM is not known
		}
		es = append(es, Entry{Name: s.VM, Kind: KindDir, Inode: inodeOf("vm", s.VM)})
	}
	return es, nil
}

// vmDir lists the points of a VM, and `latest`.
type vmDir struct {
	tree *Tree
	vm   string
}

func (d *vmDir) Attr(ctx context.Context) (Attr, error) {
	a := Attr{Kind: KindDir, Inode: inodeOf("vm", d.vm), Time: d.tree.repo.Created()}
	if s, err := d.tree.repo.Latest(ctx, d.vm); err == nil {
		a.Time = s.Time
	}
	return a, nil
}

func (d *vmDir) Lookup(ctx context.Context, name string) (Node, error) {
	if name == "latest" {
		if _, err := d.tree.repo.Latest(ctx, d.vm); err != nil {
			return nil, err
		}
		return &latestLink{d}, nil
	}
	s, err := d.tree.repo.Named(ctx, d.vm, name)
	if err != nil {
		return nil, err
	}
	return d.tree.Point(s), nil
}

// find resolves the beginning of a date.
func (d *vmDir) find(ctx context.Context, name string) (Node, error) {
	s, err := d.tree.repo.Find(ctx, d.vm+"/"+name)
	if err != nil {
		return nil, err
	}
	return d.tree.Point(s), nil
}

func (d *vmDir) Entries(ctx context.Context) ([]Entry, error) {
	list, err := d.tree.repo.PointsOf(ctx, d.vm)
	if err != nil {
		return nil, err
	}
	es := make([]Entry, 0, len(list)+1)
	for _, s := range list {
		es = append(es, Entry{Name: s.Name, Kind: KindDir, Inode: pointInode(s.ID)})
	}
	if s, err := d.tree.repo.Latest(ctx, d.vm); err == nil {
		es = append(es, Entry{Name: "latest", Kind: KindLink, Inode: latestInode(s)})
	}
	return es, nil
}

// latestLink points to the newest whole point of its VM.
type latestLink struct{ dir *vmDir }

func (l *latestLink) Attr(ctx context.Context) (Attr, error) {
	s, err := l.dir.tree.repo.Latest(ctx, l.dir.vm)
	return Attr{Kind: KindLink, Inode: latestInode(s), Size: int64(len(s.Name)), Time: s.Time}, err
}

func (l *latestLink) Target(ctx context.Context) (string, error) {
	s, err := l.dir.tree.repo.Latest(ctx, l.dir.vm)
	return s.Name, err
}

// latestInode is another one when the link leads elsewhere: what a kernel keeps of links it keeps by inode.
func latestInode(s store.Summary) uint64 { return inodeOf("latest", s.VM, s.ID.String()) }

func pointInode(id store.PointID) uint64 { return inodeOf("point", id.String()) }

// pointDir is one restore point.
type pointDir struct {
	tree *Tree
	sum  store.Summary

	mu    sync.Mutex // guards following
	point *store.Point
	nodes []namedNode // in order
	holds int         // of files that are open
	drop  func()      // ends the hold in the repository; nil when there is none
	later *time.Timer // drops it, when no file is open
}

// hold keeps the point's chunks while any of its files is open, and for linger after that: the next of many files finds it
// held.
func (d *pointDir) hold(ctx context.Context, linger time.Duration) (release func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.drop == nil {
		if _, d.drop, err = d.tree.repo.Hold(ctx, d.sum.ID); err != nil {
			return nil, err
		}
	}
	d.holds++
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.holds--; d.holds > 0 {
			return
		}
		if linger == 0 {
			d.letGo()
			return
		}
		if d.later != nil {
			d.later.Stop()
		}
		d.later = time.AfterFunc(linger, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.letGo()
		})
	}), nil
}

// letGo ends the hold unless a file is open. Callers hold d.mu.
func (d *pointDir) letGo() {
	if d.holds == 0 && d.drop != nil {
		d.drop()
		d.drop = nil
	}
}

// Close lets go of points at once that would be held for a little longer. Files must not be in use any more.
func (t *Tree) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.points {
		d.mu.Lock()
		d.letGo()
		d.mu.Unlock()
	}
}

type namedNode struct {
	name string
	Node
}

func (d *pointDir) Attr(context.Context) (Attr, error) {
	return Attr{Kind: KindDir, Inode: pointInode(d.sum.ID), Time: d.sum.Time, Immutable: true}, nil
}

func (d *pointDir) Lookup(ctx context.Context, name string) (Node, error) {
	if err := d.load(ctx); err != nil {
		return nil, err
	}
	for _, n := range d.nodes {
		if n.name == name {
			return n.Node, nil
		}
	}
	return nil, notExist(name)
}

func (d *pointDir) Entries(ctx context.Context) ([]Entry, error) {
	if err := d.load(ctx); err != nil {
		return nil, err
	}
	return entriesOf(ctx, d.nodes)
}

func entriesOf(_ context.Context, nodes []namedNode) ([]Entry, error) {
	es := make([]Entry, len(nodes))
	for i, n := range nodes {
		switch n := n.Node.(type) {
		case *file:
			es[i] = Entry{Name: nodes[i].name, Kind: KindFile, Inode: n.inode}
		case *configDir:
			es[i] = Entry{Name: nodes[i].name, Kind: KindDir, Inode: n.inode()}
		case *filesDir:
			es[i] = Entry{Name: nodes[i].name, Kind: KindDir, Inode: n.id("dir", n.prefix)}
		}
	}
	return es, nil
}

// load reads the manifest and lays out the directory, once.
func (d *pointDir) load(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nodes != nil {
		return nil
	}
	p, err := d.tree.repo.Point(ctx, d.sum.ID)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	d.point = p
	nodes := []namedNode{{"point.json", d.file("point.json", func() (Image, error) {
		return memory{strings.NewReader(string(text) + "\n")}, nil
	})}}
	if len(p.Config) > 0 {
		nodes = append(nodes, namedNode{"config", &configDir{point: d}})
	}
	if len(p.Disks) > 0 {
		nodes = append(nodes, namedNode{"files", &filesDir{point: d}})
	}
	for i := range p.Disks {
		nodes = append(nodes, d.disk(&p.Disks[i])...)
	}
	d.nodes = nodes
	return nil
}

func (d *pointDir) file(name string, open func() (Image, error)) *file {
	return &file{inode: inodeOf("point", d.sum.ID.String(), name), time: d.sum.Time, open: open, hold: func(ctx context.Context) (func(), error) { return d.hold(ctx, 0) }}
}

// disk lays out the formats of one disk. Formats that cannot hold it are left out:
// an empty disk has no VMDK and no VHDX, one above 64 TiB no VHDX.
func (d *pointDir) disk(disk *store.Disk) []namedNode {
	raw := func() (Image, error) { return d.tree.repo.OpenDisk(d.point, disk.Name) }
	over := func(make func(src vdisk.Source) (vdisk.File, error)) func() (Image, error) {
		return func() (Image, error) {
			img, err := raw()
			if err != nil {
				return nil, err
			}
			return make(img)
		}
	}
	id := identityOf(d.sum.ID, disk.Name)
	name := disk.Name
	nodes := []namedNode{{name + ".raw", d.file(name+".raw", raw)}, {name + ".qcow2", d.file(name+".qcow2", over(func(src vdisk.Source) (vdisk.File, error) {
		return vdisk.QCOW2Sparse(src)
	}))}}
	if disk.Size == 0 {
		return nodes
	}
	flat := name + "-flat.vmdk"
	nodes = append(nodes, namedNode{name + ".vmdk", d.file(name+".vmdk", func() (Image, error) {
		text, err := vdisk.VMDKDescriptor(vdisk.MonolithicFlat, disk.Size, flat, id)
		return memory{strings.NewReader(string(text))}, err
	})}, namedNode{flat, d.file(flat, over(func(src vdisk.Source) (vdisk.File, error) { return vdisk.Flat(src), nil }))})
	if disk.Size > vhdxMax {
		return nodes
	}
	return append(nodes, namedNode{name + ".vhdx", d.file(name+".vhdx", over(func(src vdisk.Source) (vdisk.File, error) {
		return vdisk.VHDX(src, id)
	}))})
}

// Format gives a disk of a point in one of the formats that a restore writes:
// raw, qcow2, vmdk (monolithicSparse, one file), vhdx and vhd (dynamic).
func Format(repo *store.Repo, p *store.Point, disk, format string) (Image, error) {
	img, err := repo.OpenDisk(p, disk)
	if err != nil {
		return nil, err
	}
	id := identityOf(p.ID, disk)
	switch format {
	case "raw":
		return img, nil
	case "qcow2":
		return vdisk.QCOW2(img)
	case "vmdk":
		return vdisk.SparseVMDK(img, id, disk+".vmdk")
	case "vhdx":
		return vdisk.VHDX(img, id)
	case "vhd":
		return vdisk.VHD(img, id)
	default:
		return nil, fmt.Errorf("unknown disk format %q", format)
	}
}

// WriteVMDKStream writes a disk of a point to w as a VMDK that is compressed and
// can be read from beginning to end (streamOptimized), as fileName. done is told
// the bytes of the disk dealt with.
func WriteVMDKStream(ctx context.Context, w io.Writer, repo *store.Repo, p *store.Point, disk, fileName string, done func(int64)) error {
	img, err := repo.OpenDisk(p, disk)
	if err != nil {
		return err
	}
	_, err = vdisk.WriteStreamOptimized(ctx, w, img, identityOf(p.ID, disk), fileName, done)
	return err
}

// vhdxMax is the largest disk that a VHDX can hold, bytes (MS-VHDX §1).
const vhdxMax = 64 << 40

// configDir is the folder config/ or one below it.
type configDir struct {
	point  *pointDir
	prefix string // "" or "sub/"
}

func (d *configDir) inode() uint64 {
	return inodeOf("point", d.point.sum.ID.String(), "config", d.prefix)
}

func (d *configDir) Attr(context.Context) (Attr, error) {
	return Attr{Kind: KindDir, Inode: d.inode(), Time: d.point.sum.Time, Immutable: true}, nil
}

// nodes lists what lies directly in the folder.
func (d *configDir) nodes() []namedNode {
	var out []namedNode
	seen := map[string]bool{}
	for _, c := range d.point.point.Config {
		rest, ok := strings.CutPrefix(path.Clean("/" + c.Name)[1:], d.prefix)
		if !ok || rest == "" {
			continue
		}
		first, _, isDir := strings.Cut(rest, "/")
		if seen[first] {
			continue
		}
		seen[first] = true
		if isDir {
			out = append(out, namedNode{first, &configDir{d.point, d.prefix + first + "/"}})
			continue
		}
		out = append(out, namedNode{first, d.point.file("config/"+c.Name, func() (Image, error) {
			return d.point.tree.repo.OpenConfig(d.point.point, c.Name)
		})})
	}
	return out
}

func (d *configDir) Lookup(_ context.Context, name string) (Node, error) {
	for _, n := range d.nodes() {
		if n.name == name {
			return n.Node, nil
		}
	}
	return nil, notExist(name)
}

func (d *configDir) Entries(ctx context.Context) ([]Entry, error) { return entriesOf(ctx, d.nodes()) }

// file is a file below a point.
type file struct {
	inode uint64
	time  time.Time
	open  func() (Image, error)
	hold  func(context.Context) (release func(), err error)

	mu     sync.Mutex           // guards following
	img    weak.Pointer[opened] // while somebody reads it
	known  bool                 // size and blocks are set
	size   int64                // bytes
	blocks int64                // bytes
}

// opened is the content of a file in use. It is not kept for longer: the tables of
// a computed format take 80 KB, the kernel remembers every file that was ever
// looked at, and a walk through 10,000 points looks at all of theirs.
type opened struct{ Image }

// Hold implements File.
func (f *file) Hold(ctx context.Context) (release func(), err error) { return f.hold(ctx) }

func (f *file) Image(context.Context) (Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.image()
}

// image opens the content unless it is open. Callers hold f.mu.
func (f *file) image() (Image, error) {
	if o := f.img.Value(); o != nil {
		return o, nil
	}
	img, err := f.open()
	if err != nil {
		return nil, err
	}
	o := &opened{img}
	f.img = weak.Make(o)
	return o, nil
}

// blockGranularity is how finely st_blocks is counted, bytes: coarse enough that
// looking at a directory of large disks reads few pages of their maps.
const blockGranularity = 32 << 20

func (f *file) Attr(context.Context) (Attr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := Attr{Kind: KindFile, Inode: f.inode, Time: f.time, Immutable: true}
	if !f.known {
		img, err := f.image()
		if err != nil {
			return Attr{}, err
		}
		a.Size = img.Size()
		blocks := int64(0)
		for e, err := range img.Allocated(blockGranularity) {
			if err != nil {
				return a, err
			}
			blocks += e.Len
		}
		f.size, f.blocks, f.known = a.Size, blocks, true
	}
	a.Size, a.Blocks = f.size, f.blocks
	return a, nil
}

var (
	_ Dir  = (*rootDir)(nil)
	_ Dir  = (*vmDir)(nil)
	_ Dir  = (*pointDir)(nil)
	_ Dir  = (*configDir)(nil)
	_ Link = (*latestLink)(nil)
	_ File = (*file)(nil)
)

// ReadAll reads a small file whole; it is an error when it has more than limit bytes.
func ReadAll(ctx context.Context, f File, limit int64) ([]byte, error) {
	img, err := f.Image(ctx)
	if err != nil {
		return nil, err
	}
	if img.Size() > limit {
		return nil, fmt.Errorf("%d bytes are more than the %d expected", img.Size(), limit)
	}
	b := make([]byte, img.Size())
	if n, err := img.ReadAt(b, 0); n < len(b) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}
