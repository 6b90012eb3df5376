package exfat

import (
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// certain refuses a volume of which not all is well.
func (f *FS) certain(what string) error {
	if w := f.info.Warnings; len(w) > 0 {
		return guest.Unsupported("%s on a volume of which not all is well: %s", what, w[0])
	}
	return nil
}

// Free implements guest.Freer: the clusters that the bitmap has as free.
func (f *FS) Free() iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		err := f.certain("what is free")
		if err == nil {
			err = f.free(yield)
		}
		if err != nil {
			yield(extent.Extent{}, err)
		}
	}
}

// structures gives where the structures are that the bitmap must have as used.
func (f *FS) structures() (list []extent.Extent, err error) {
	for _, r := range []region{f.bitmap, f.letter, {first: f.geo.root}} {
		chain := f.table.Chain(r.first)
		n, err := chain.Len()
		if err != nil {
			return nil, err
		}
		if n < r.size || n == 0 {
			return nil, guest.Damaged("a structure of %d bytes with %d", r.size, n)
		}
		for e, err := range chain.Extents(n) {
			if err != nil {
				return nil, err
			}
			list = append(list, e)
		}
	}
	return extent.Normalise(list), nil
}

// free yields the runs of zeros of the bitmap (§7.1.5).
func (f *FS) free(yield func(extent.Extent, error) bool) error {
	if f.bitmap.size < (f.geo.clusters+7)/8 {
		return guest.Damaged("a bitmap of %d bytes for %d clusters", f.bitmap.size, f.geo.clusters)
	}
	used, err := f.structures()
	if err != nil {
		return err
	}
	stopped := false
	start := int64(-1) // first of a run of free ones
	end := func(at int64) error {
		e := extent.Extent{Off: f.geo.heap + start*f.geo.cluster, Len: (at - start) * f.geo.cluster}
		start = -1
		for len(used) > 0 && used[0].End() <= e.Off {
			used = used[1:]
		}
		if len(used) > 0 && used[0].Off < e.End() {
			return guest.Damaged("a bitmap that has a structure of the volume as free")
		}
		stopped = !yield(e, nil)
		return nil
	}
	chain, buf := f.table.Chain(f.bitmap.first), make([]byte, 64<<10)
	for at := int64(0); at < f.geo.clusters; at += int64(len(buf)) * 8 {
		b := buf[:min(int64(len(buf)), (f.geo.clusters-at+7)/8)]
		if err := chain.ReadAt(f.dev, b, at/8); err != nil {
			return err
		}
		for n := at; n < min(at+int64(len(b))*8, f.geo.clusters); n++ {
			c := b[(n-at)/8]
			if n%8 == 0 && (c == 0 && start >= 0 || c == 0xff && start < 0) {
				n += 7
				continue
			}
			inUse := c>>(n%8)&1 != 0
			if !inUse && start < 0 {
				start = n
			}
			if inUse && start >= 0 {
				if err := end(n); err != nil || stopped {
					return err
				}
			}
		}
	}
	if start >= 0 {
		return end(f.geo.clusters)
	}
	return nil
}

// Locate implements guest.Locator.
func (f *FS) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		err := f.certain("where a file lies")
		if err == nil {
			err = f.locate(ino, yield)
		}
		if err != nil {
			yield(extent.Extent{}, err)
		}
	}
}

func (f *FS) locate(ino guest.Ino, yield func(extent.Extent, error) bool) error {
	s, err := f.regular(ino)
	if err != nil {
		return err
	}
	chain := s.chain(f.table)
	n, err := chain.Len()
	if err != nil {
		return err
	}
	if n < s.size() {
		return guest.Damaged("a file of %d bytes with %d", s.size(), n)
	}
	for e, err := range chain.Extents(n) {
		if err != nil {
			return err
		}
		if !yield(e, nil) {
			return nil
		}
	}
	return nil
}
