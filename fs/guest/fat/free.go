package fat

import (
	"bytes"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// certain refuses a volume of which not all is well.
func (f *FS) certain(what string) error {
	if w := f.info.Warnings; len(w) > 0 {
		return guest.Unsupported("%s on a volume of which not all is well: %s", what, w[0])
	}
	return nil
}

// Free implements guest.Freer: the clusters that all copies of the table have as free.
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

// free reads the table from one end to the other, piece by piece.
func (f *FS) free(yield func(extent.Extent, error) bool) error {
	const piece = 48 << 10 // holds whole numbers of 12 bits, too
	used := f.tableUsed()
	b, other := make([]byte, piece), make([]byte, piece)
	start := int64(-1) // first cluster of a run of free ones
	end := func(at int64) bool {
		from := start
		start = -1
		return from < 0 || yield(extent.Extent{Off: f.table.At(uint32(from)), Len: (at - from) * f.geo.cluster}, nil)
	}
	n := int64(0) // number of the table
	for off := int64(0); off < used; off += piece {
		b = b[:min(piece, used-off)]
		if err := f.readTables(b, other[:len(b)], off); err != nil {
			return err
		}
		if off == 0 && b[0] != f.geo.media {
			return guest.Damaged("a table that does not start as it should")
		}
		for ; n < f.geo.clusters+cluster.First && (n+1)*int64(f.geo.bits) <= (off+int64(len(b)))*8; n++ {
			free := n >= cluster.First && f.isFree(b, n-off*8/int64(f.geo.bits))
			if free && start < 0 {
				start = n
			}
			if !free && !end(n) {
				return nil
			}
		}
	}
	end(f.geo.clusters + cluster.First)
	return nil
}

// readTables reads a piece of the active table, and makes sure that its copies are alike.
func (f *FS) readTables(b, other []byte, off int64) error {
	at := func(i int64) int64 { return f.geo.table + i*f.geo.tableLen + off }
	if err := guest.ReadFull(f.dev, b, at(f.geo.active)); err != nil {
		return err
	}
	for i := int64(0); i < f.geo.tables && f.geo.mirrored; i++ {
		if i == f.geo.active {
			continue
		}
		if err := guest.ReadFull(f.dev, other, at(i)); err != nil {
			return err
		}
		if !bytes.Equal(b, other) {
			return guest.Damaged("copies of the table that differ")
		}
	}
	return nil
}

// isFree looks at number n of a piece of the table.
func (f *FS) isFree(b []byte, n int64) bool {
	switch f.geo.bits {
	case 12:
		return le.Uint16(b[n+n/2:])>>(n&1*4)&0xfff == 0
	case 16:
		return le.Uint16(b[n*2:]) == 0
	}
	return le.Uint32(b[n*4:])&0x0fffffff == 0
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
	e, err := f.regular(ino)
	if err != nil || f.first(e) == 0 {
		return err
	}
	chain := f.chain(f.first(e), 1<<32)
	n, err := chain.Len()
	if err != nil {
		return err
	}
	if n < e.size() {
		return guest.Damaged("a file of %d bytes with %d", e.size(), n)
	}
	for x, err := range chain.Extents(n) {
		if err != nil {
			return err
		}
		if !yield(x, nil) {
			return nil
		}
	}
	return nil
}
