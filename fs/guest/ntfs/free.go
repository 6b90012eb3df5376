package ntfs

import (
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Free implements guest.Freer: the clusters that $Bitmap has as free. A volume with warnings is refused.
func (f *FS) Free() iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		if len(f.info.Warnings) > 0 {
			yield(extent.Extent{}, guest.Unsupported("what is free on a volume of which not all is well: %s", f.info.Warnings[0]))
			return
		}
		i, err := f.inode(recordBitmap)
		if err == nil {
			if a := i.find(attrData, ""); a == nil || min(a.size, a.valid) < (f.geo.clusters+7)/8 || !a.plain() {
				err = guest.Damaged("$Bitmap")
			} else {
				err = f.free(f.stream(a), yield)
			}
		}
		if err != nil {
			yield(extent.Extent{}, err)
		}
	}
}

// free yields the runs of zeros of a bitmap.
func (f *FS) free(s *stream, yield func(extent.Extent, error) bool) error {
	cluster := f.geo.cluster
	buf := make([]byte, 64<<10)
	start := int64(-1) // first cluster of the run
	end := func(at int64) bool {
		from := start
		start = -1
		return from < 0 || yield(extent.Extent{Off: from * cluster, Len: (at - from) * cluster}, nil)
	}
	for at := int64(0); at < f.geo.clusters; at += int64(len(buf)) * 8 {
		b := buf[:min(int64(len(buf)), (f.geo.clusters-at+7)/8)]
		if err := s.read(b, at/8); err != nil {
			return err
		}
		for n, c := range b {
			first := at + int64(n)*8
			if c == 0 && start >= 0 || c == 0xff && start < 0 {
				continue
			}
			for bit := int64(0); bit < 8 && first+bit < f.geo.clusters; bit++ {
				used := c>>bit&1 != 0
				if !used && start < 0 {
					start = first + bit
				}
				if used && !end(first+bit) {
					return nil
				}
			}
		}
	}
	end(f.geo.clusters)
	return nil
}

// Locate implements guest.Locator.
func (f *FS) Locate(ino guest.Ino) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		i, err := f.inode(ino)
		if err != nil {
			yield(extent.Extent{}, err)
			return
		}
		a := i.find(attrData, "")
		if a == nil || a.resident {
			return
		}
		for r, err := range f.stream(a).stored() {
			if err != nil {
				yield(extent.Extent{}, err)
				return
			}
			if !yield(extent.Extent{Off: r.lcn * f.geo.cluster, Len: r.n * f.geo.cluster}, nil) {
				return
			}
		}
	}
}
