package fs

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/machine"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// maxMachines bounds the points whose guest file systems are open, each with what its readers keep (guest.Options).
const maxMachines = 4

// machines keeps those used last.
type machines struct {
	mu    sync.Mutex // guards following
	list  []store.PointID
	known map[store.PointID]func() *machine.Machine
}

// machine opens what the disks of a point hold, or gives what is open.
func (t *Tree) machine(ctx context.Context, d *pointDir) (*machine.Machine, error) {
	ms := &t.machines
	id := d.sum.ID
	ms.mu.Lock()
	open := ms.known[id]
	if open != nil && ms.list[len(ms.list)-1] != id {
		i := slices.Index(ms.list, id)
		ms.list = append(slices.Delete(ms.list, i, i+1), id)
	}
	ms.mu.Unlock()
	if open != nil {
		return open(), nil
	}
	if err := d.load(ctx); err != nil {
		return nil, err
	}
	var disks []volume.Disk
	for i := range d.point.Disks {
		img, err := t.repo.OpenDisk(d.point, d.point.Disks[i].Name)
		if err != nil {
			return nil, err
		}
		disks = append(disks, volume.Disk{Name: d.point.Disks[i].Name, Device: img})
	}
	return ms.add(id, disks, machine.Options{Volumes: volume.Options{Unlock: t.Unlock}})(), nil
}

// add opens the disks of a point, unless somebody else was faster.
func (ms *machines) add(id store.PointID, disks []volume.Disk, opt machine.Options) func() *machine.Machine {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if open := ms.known[id]; open != nil {
		return open
	}
	open := sync.OnceValue(func() *machine.Machine { return machine.Open(disks, opt) })
	if ms.known == nil {
		ms.known = map[store.PointID]func() *machine.Machine{}
	}
	ms.known[id] = open
	ms.list = append(ms.list, id)
	if len(ms.list) > maxMachines {
		delete(ms.known, ms.list[0])
		ms.list = ms.list[1:]
	}
	return open
}

// filesDir is files/ of a point: by volume, and by the guest's own table of mounts.
type filesDir struct {
	point  *pointDir
	prefix string // "" or that of the volumes below: "disk0/"
}

func (d *filesDir) id(parts ...string) uint64 {
	return inodeOf(append([]string{"files", d.point.sum.ID.String()}, parts...)...)
}

func (d *filesDir) Attr(context.Context) (Attr, error) {
	return Attr{Kind: KindDir, Inode: d.id("dir", d.prefix), Time: d.point.sum.Time, Immutable: true}, nil
}

// volumesName is the file that says what the volumes are.
const volumesName = "volumes.json"

// children lists what lies directly in the folder.
func (d *filesDir) children(ctx context.Context) ([]namedNode, error) {
	m, err := d.point.tree.machine(ctx, d.point)
	if err != nil {
		return nil, err
	}
	var out []namedNode
	add := func(name string, n Node) {
		if !slices.ContainsFunc(out, func(o namedNode) bool { return o.name == name }) {
			out = append(out, namedNode{name, n})
		}
	}
	for i, v := range m.Volumes {
		rest, ok := strings.CutPrefix(v.Name, d.prefix)
		if !ok || rest == "" {
			continue
		}
		first, _, below := strings.Cut(rest, "/")
		switch {
		case below:
			add(first, &filesDir{d.point, d.prefix + first + "/"})
		case v.HasReader() || v.Device == nil:
			add(first, &guestRoot{files: d, vol: i})
		default:
			add(first+".raw", d.point.file("files/"+v.Name, func() (Image, error) { return d.rawVolume(i) }))
		}
	}
	if d.prefix != "" {
		return out, nil
	}
	for i, v := range m.Views() {
		add(v.Name, &guestRoot{files: d, view: i + 1})
	}
	add(volumesName, d.point.file("files/"+volumesName, d.describe))
	return out, nil
}

func (d *filesDir) Lookup(ctx context.Context, name string) (Node, error) {
	list, err := d.children(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range list {
		if n.name == name {
			if r, ok := n.Node.(*guestRoot); ok {
				return r.dir(ctx)
			}
			return n.Node, nil
		}
	}
	return nil, notExist(name)
}

func (d *filesDir) Entries(ctx context.Context) ([]Entry, error) {
	list, err := d.children(ctx)
	if err != nil {
		return nil, err
	}
	es := make([]Entry, len(list))
	for i, n := range list {
		switch n := n.Node.(type) {
		case *file:
			es[i] = Entry{Name: list[i].name, Kind: KindFile, Inode: n.inode}
		case *filesDir:
			es[i] = Entry{Name: list[i].name, Kind: KindDir, Inode: n.id("dir", n.prefix)}
		case *guestRoot:
			es[i] = Entry{Name: list[i].name, Kind: KindDir, Inode: n.inode()}
		}
	}
	return es, nil
}

// rawVolume is a volume that nothing reads, as it is.
func (d *filesDir) rawVolume(i int) (Image, error) {
	m, err := d.point.tree.machine(context.Background(), d.point)
	if err != nil {
		return nil, err
	}
	return rawVolume{m.Volumes[i].Device}, nil
}

type rawVolume struct{ guest.Device }

func (v rawVolume) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: v.Size()}}), granularity, v.Size())
}

// describedVolume is a volume in volumes.json.
type describedVolume struct {
	Name     string   `json:"name"`
	Path     string   `json:"path"` // below files/
	Kind     string   `json:"kind"`
	Detail   string   `json:"detail,omitempty"`
	Size     int64    `json:"bytes"`
	Type     string   `json:"type,omitempty"` // as blkid names it
	Label    string   `json:"label,omitempty"`
	UUID     string   `json:"uuid,omitempty"`
	Replayed bool     `json:"journal_replayed,omitempty"`
	Mounted  []string `json:"mounted,omitempty"` // where the guest sees it, as root/boot
	Error    string   `json:"error,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

// describe makes volumes.json.
func (d *filesDir) describe() (Image, error) {
	m, err := d.point.tree.machine(context.Background(), d.point)
	if err != nil {
		return nil, err
	}
	views := m.Views() // may add to the warnings
	out := struct {
		Volumes  []describedVolume `json:"volumes"`
		Warnings []string          `json:"warnings,omitempty"`
	}{Volumes: []describedVolume{}, Warnings: m.Warnings}
	mounted := map[*machine.Volume][]string{}
	for _, v := range views {
		mounted[v.Root.Vol] = append(mounted[v.Root.Vol], v.Name)
		for on, at := range v.Mounts {
			mounted[at.Vol] = append(mounted[at.Vol], path.Join(v.Name, cmp.Or(v.Letter(on), "…")))
		}
		for _, w := range v.Warnings {
			out.Warnings = append(out.Warnings, v.Name+": "+w)
		}
	}
	for _, v := range m.Volumes {
		out.Volumes = append(out.Volumes, describeVolume(v, mounted[v]))
	}
	text, err := json.MarshalIndent(out, "", "  ")
	return memory{strings.NewReader(string(text) + "\n")}, err
}

func describeVolume(v *machine.Volume, mounted []string) describedVolume {
	slices.Sort(mounted)
	o := describedVolume{Name: v.Name, Path: v.Name, Kind: v.Kind, Detail: v.Detail, Type: v.Signature, Mounted: slices.Compact(mounted)}
	if v.Device != nil {
		o.Size = v.Device.Size()
	}
	f, err := v.FS()
	switch {
	case err == nil:
		i := f.Info()
		o.Type, o.Label, o.UUID, o.Replayed, o.Warnings = i.Type, i.Label, i.UUID, i.Replayed, i.Warnings
	case v.Device != nil && !v.HasReader():
		o.Path += ".raw"
		fallthrough
	default:
		if v.Device == nil || v.HasReader() {
			o.Error = err.Error()
		}
	}
	return o
}

// guestRoot is a volume, or a view, that has not been opened.
type guestRoot struct {
	files *filesDir
	vol   int
	view  int // from 1; 0 for a volume
}

func (r *guestRoot) inode() uint64 { return r.files.id("root", fmt.Sprint(r.vol), fmt.Sprint(r.view)) }

func (r *guestRoot) Attr(context.Context) (Attr, error) {
	return Attr{Kind: KindDir, Inode: r.inode(), Immutable: true}, nil
}

// dir opens the file system.
func (r *guestRoot) dir(ctx context.Context) (Node, error) {
	m, err := r.files.point.tree.machine(ctx, r.files.point)
	if err != nil {
		return nil, err
	}
	g := &guestSide{point: r.files.point, view: r.view, seed: r.inode()}
	vol := r.vol
	if r.view > 0 {
		v := m.Views()[r.view-1]
		at := v.At(v.Root)
		return g.node(ctx, slices.Index(m.Volumes, at.Vol), at.Ino, path.Join("files", v.Name))
	}
	f, err := m.Volumes[vol].FS()
	if err != nil {
		return nil, err
	}
	return g.node(ctx, vol, f.Root(), path.Join("files", m.Volumes[vol].Name))
}
