package vdisk

import (
	"fmt"
	"io"
	"iter"
	"sort"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// VMDKOptions says how to open a VMDK. The zero value is usable for disks in
// one file without a parent: monolithicSparse and streamOptimized.
type VMDKOptions struct {
	// Name is what errors call the image.
	Name string
	// Extent opens a file that the descriptor names, and gives its size in bytes.
	// It decides which names are acceptable. When the result is a Source, its
	// holes are known. The image does not close it. When nil, a descriptor that
	// names files is ErrRefused.
	Extent func(name string) (io.ReaderAt, int64, error)
	// Parent opens the disk that a delta disk is over. The image does not close
	// it. When nil, a delta disk is ErrRefused.
	Parent func(hint string) (*VMDKImage, error)
	// TableCache bounds the memory for grain directories and tables, in bytes;
	// 0 means 4 MiB, which covers 64 GiB of disk in grains of 64 KiB and 2 GiB in
	// those of seSparse. Compressed images take up to 1 MiB more, or two grains
	// where that is larger; disks of many extents at least 8 KiB for each.
	TableCache int64
}

// VMDKImage is an open VMDK with its extents and parents: a disk. Safe for
// concurrent use.
//
// Its Allocated reads tables only, and asks the files of flat extents for their
// holes. It counts as data what any disk of the chain holds, unless one above
// it says zero.
type VMDKImage struct {
	name  string
	size  int64 // bytes
	cid   uint32
	parts []vmdkPart // ascending, without gaps
}

// vmdkPart is an extent at its place on the disk.
type vmdkPart struct {
	extent.Extent
	src Source
}

var _ Source = (*VMDKImage)(nil)

// OpenVMDK opens a VMDK of size bytes for reading: a descriptor file, or a
// sparse extent with an embedded descriptor. It reads monolithicSparse,
// monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized,
// vmfs, vmfsSparse and seSparse, in any mixture of extents, and delta disks,
// whose parents must have the content id that the delta names.
//
// Physical disks, custom disks, and an extent without its descriptor are
// ErrUnsupported: such an extent may be part of a disk, or hold only what
// differs from a parent. What points outside of a file is ErrCorrupt, at the
// latest when the place is read.
func OpenVMDK(r io.ReaderAt, size int64, opts VMDKOptions) (*VMDKImage, error) {
	if opts.Name == "" {
		opts.Name = "VMDK"
	}
	v, err := openVMDK(r, size, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", opts.Name, err)
	}
	return v, nil
}

func openVMDK(r io.ReaderAt, size int64, opts VMDKOptions) (*VMDKImage, error) {
	head := make([]byte, min(size, sector))
	if _, err := readFull(r, head, 0); err != nil {
		return nil, fmt.Errorf("reading the header: %w", err)
	}
	o := vmdkOpener{opts: opts}
	var raw []byte
	switch {
	case hasPrefix(head, vmdkMagic):
		h, err := readSparseHeader(r, size)
		if err != nil {
			return nil, err
		}
		if h.descLen == 0 {
			return nil, unsupported("an extent without a descriptor: open the file that describes the disk")
		}
		o.self, o.selfSize = r, size
		if raw, err = h.readDescriptor(r, size); err != nil {
			return nil, err
		}
	case hasPrefix(head, cowdMagic), hasPrefix(head, seSparseMagic):
		return nil, unsupported("an extent without a descriptor: open the file that describes the disk")
	case isVMDKText(head):
		if size > vmdkMaxText {
			return nil, corrupt("a descriptor of %d bytes", size)
		}
		raw = make([]byte, size)
		if _, err := readFull(r, raw, 0); err != nil {
			return nil, fmt.Errorf("reading the descriptor: %w", err)
		}
	default:
		return nil, corrupt("not a VMDK")
	}
	text, err := parseVMDKText(raw)
	if err != nil {
		return nil, err
	}
	return o.disk(text)
}

func hasPrefix(b []byte, magic string) bool {
	return len(b) >= len(magic) && string(b[:len(magic)]) == magic
}

// vmdkOpener is the state of one OpenVMDK.
type vmdkOpener struct {
	opts     VMDKOptions
	self     io.ReaderAt // the file with the embedded descriptor; nil: none
	selfSize int64
	parent   *VMDKImage // nil: none
	extents  int
}

func (o *vmdkOpener) disk(t vmdkText) (*VMDKImage, error) {
	o.extents = len(t.extents)
	if o.self != nil && (o.extents != 1 || t.extents[0].kind != "SPARSE") {
		return nil, unsupported("an embedded descriptor with other extents than the file itself")
	}
	if err := o.openParent(t); err != nil {
		return nil, err
	}
	v := &VMDKImage{name: o.opts.Name, cid: t.cid}
	for _, e := range t.extents {
		at := extent.Extent{Off: v.size, Len: e.sectors * sector}
		src, err := o.extent(e, at)
		if err != nil {
			return nil, err
		}
		v.parts = append(v.parts, vmdkPart{at, src})
		v.size += at.Len
	}
	return v, nil
}

func (o *vmdkOpener) openParent(t vmdkText) (err error) {
	if t.parentCID == vmdkNoParent {
		return nil
	}
	if o.opts.Parent == nil {
		return fmt.Errorf("has the parent %q: %w", t.parent, ErrRefused)
	}
	if o.parent, err = o.opts.Parent(t.parent); err != nil {
		return fmt.Errorf("parent %q: %w", t.parent, err)
	}
	if o.parent.cid != t.parentCID {
		return corrupt("parent %q has the content id (CID) %08x, but %08x is expected: it was written to, or is another disk",
			t.parent, o.parent.cid, t.parentCID)
	}
	return nil
}

// extent opens the extent that is at a place of the disk.
func (o *vmdkOpener) extent(e vmdkExtent, at extent.Extent) (Source, error) {
	if e.kind == "ZERO" {
		return zeros{at.Len}, nil
	}
	r, size, name := o.self, o.selfSize, o.opts.Name
	if r == nil {
		if o.opts.Extent == nil {
			return nil, fmt.Errorf("has the extent %q: %w", e.file, ErrRefused)
		}
		var err error
		if r, size, err = o.opts.Extent(e.file); err != nil {
			return nil, fmt.Errorf("extent %q: %w", e.file, err)
		}
		name = fmt.Sprintf("%s: extent %q", name, e.file)
	}
	src, err := o.extentIn(r, size, name, e, at)
	if err != nil && o.self == nil {
		err = fmt.Errorf("extent %q: %w", e.file, err)
	}
	return src, err
}

func (o *vmdkOpener) extentIn(r io.ReaderAt, size int64, name string, e vmdkExtent, at extent.Extent) (Source, error) {
	m := mapped{r: r, fileSize: size, name: name, tables: newTableCache(r, size, 4*kib, o.cachePart())}
	if o.parent != nil {
		m.backing = section{o.parent, at.Off, at.Len}
	}
	var err error
	switch e.kind {
	case "FLAT", "VMFS":
		return flatExtent(r, size, e)
	case "SPARSE":
		err = openSparse(&m, o.extents)
	case "VMFSSPARSE":
		err = openCOWD(&m)
	case "SESPARSE":
		err = openSESparse(&m)
	default:
		return nil, unsupported("extent type %s", e.kind)
	}
	if err != nil {
		return nil, err
	}
	if m.size < at.Len {
		return nil, corrupt("has %d sectors, but the descriptor says %d", m.size/sector, e.sectors)
	}
	m.size = at.Len // what is rounded up to whole grains is no part of the disk
	return &m, nil
}

// cachePart is what one extent gets of the bytes for tables.
func (o *vmdkOpener) cachePart() int64 {
	all := o.opts.TableCache
	if all <= 0 {
		all = 4 * mib
	}
	return max(1, all/int64(o.extents))
}

func flatExtent(r io.ReaderAt, size int64, e vmdkExtent) (Source, error) {
	if e.sectors+e.offset > size/sector { // both are below 2^53
		return nil, corrupt("%d sectors from sector %d on do not fit into %d bytes", e.sectors, e.offset, size)
	}
	src, ok := r.(Source)
	if !ok {
		src = opaque{r, size}
	}
	return section{src, e.offset * sector, e.sectors * sector}, nil
}

// Size is the size of the disk in bytes.
func (v *VMDKImage) Size() int64 { return v.size }

// part is the index of the extent with the byte at off, which is on the disk.
func (v *VMDKImage) part(off int64) int {
	return sort.Search(len(v.parts), func(i int) bool { return v.parts[i].End() > off })
}

// ReadAt reads neighbouring grains at once where they are neighbours in the
// file, too.
func (v *VMDKImage) ReadAt(p []byte, off int64) (int, error) {
	p, end := clip(p, off, v.size)
	done := 0
	for i := v.part(off); done < len(p); i++ {
		part := &v.parts[i]
		at := off + int64(done) - part.Off
		n := int(min(int64(len(p)-done), part.Len-at))
		if n == 0 {
			continue // an extent of no sectors
		}
		got, err := readFull(part.src, p[done:done+n], at)
		done += got
		if err != nil {
			return done, err
		}
	}
	return done, end
}

// Allocated implements Source.
func (v *VMDKImage) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return v.AllocatedFrom(0, granularity)
}

// AllocatedFrom is Allocated without the ranges that end at off or before.
func (v *VMDKImage) AllocatedFrom(off, granularity int64) iter.Seq2[extent.Extent, error] {
	if granularity <= 0 || off < 0 {
		return failed(fmt.Errorf("%s: data from %d on, granularity %d", v.name, off, granularity))
	}
	return extent.Coarsen(v.data(off-off%granularity, granularity), granularity, v.size)
}

func (v *VMDKImage) data(off, granularity int64) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		for _, part := range v.parts[v.part(off):] {
			for e, err := range allocatedFrom(part.src, max(0, off-part.Off), granularity) {
				e.Off += part.Off
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}
}
