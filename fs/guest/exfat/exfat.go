package exfat

import (
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// FS is an exFAT file system.
type FS struct {
	dev    guest.Device
	geo    geometry
	info   guest.Info
	cache  *cluster.Cached
	table  *cluster.Table
	upcase upcase
	bitmap region // that of the clusters in use
	letter region // the up-case table

	dirs    *guest.Recent[guest.Ino, *directory]
	chains  *guest.Recent[uint32, *cluster.Chain] // first cluster => chain of a file
	parents cluster.Parents
}

// region is where a system structure is. It always has a chain.
type region struct {
	first uint32
	size  int64 // bytes
	sum   uint32
}

var (
	_ guest.FS      = (*FS)(nil)
	_ guest.Freer   = (*FS)(nil)
	_ guest.Locator = (*FS)(nil)
)

const defaultCache = 16 << 20

// Open opens the file system that dev holds.
func Open(dev guest.Device, opt guest.Options) (*FS, error) {
	geo, warning, err := readBoot(dev)
	if err != nil {
		return nil, fmt.Errorf("exfat: %w", err)
	}
	limit := opt.Cache
	if limit <= 0 {
		limit = defaultCache
	}
	f := &FS{dev: dev, geo: geo, cache: cluster.NewCached(dev, limit/2),
		dirs:    guest.NewRecent[guest.Ino, *directory](limit / 4),
		chains:  guest.NewRecent[uint32, *cluster.Chain](limit / 8),
		parents: cluster.NewParents(limit / 8)}
	f.table = &cluster.Table{Data: geo.heap, Size: geo.cluster, Count: geo.clusters}
	f.table.Links = f.cache.Links32(geo.table, f.follow)
	f.info = guest.Info{Type: "exfat", Size: geo.size, Block: geo.cluster, UUID: fmt.Sprintf("%04X-%04X", geo.serial>>16, geo.serial&0xffff)}
	if warning != "" {
		f.warn("%s", warning)
	}
	if geo.size > dev.Size() {
		f.warn("the volume has %d bytes, its device %d", geo.size, dev.Size())
	}
	if geo.flags&flagDirty != 0 {
		f.warn("the volume was not unmounted: what was written last may be missing or torn")
	}
	if geo.flags&flagFailure != 0 {
		f.warn("the volume notes that an error was met on its disk")
	}
	return f, f.system()
}

func (f *FS) warn(format string, args ...any) {
	f.info.Warnings = append(f.info.Warnings, fmt.Sprintf(format, args...))
}

// Info implements guest.FS.
func (f *FS) Info() guest.Info { return f.info }

const rootIno = 1

// Root implements guest.FS.
func (f *FS) Root() guest.Ino { return rootIno }

// follow makes of a number in the table what cluster.Table wants (§4.1.3).
func (f *FS) follow(n uint32) (uint32, error) {
	switch {
	case n >= 0xfffffff8:
		return 0, nil
	case n == 0xfffffff7:
		return 0, guest.Damaged("a chain to a bad cluster")
	case n < cluster.First || int64(n)-cluster.First >= f.geo.clusters:
		return 0, guest.Damaged("a chain to cluster %d, of %d", n, f.geo.clusters)
	}
	return n, nil
}

// system finds the structures that the root directory has, and reads the up-case table.
func (f *FS) system() error {
	chain := f.table.Chain(f.geo.root)
	size, err := chain.Len()
	if err != nil && !errors.Is(err, guest.ErrDamaged) {
		return fmt.Errorf("exfat: %w", err)
	}
	const wanted = 3
	for it, n := cluster.NewSlots(f.cache, chain, min(size, maxDir), 0), 0; n < wanted; {
		b, err := it.Next()
		if err != nil && !errors.Is(err, guest.ErrDamaged) {
			return fmt.Errorf("exfat: %w", err)
		}
		if err != nil || b == nil || b[0] == 0 {
			break
		}
		switch b[0] {
		case entryBitmap:
			if b[1]&1 != 0 == f.geo.second {
				f.bitmap = region{first: le.Uint32(b[20:]), size: int64(le.Uint64(b[24:]))}
				n++
			}
		case entryUpcase:
			f.letter = region{first: le.Uint32(b[20:]), size: int64(le.Uint64(b[24:])), sum: le.Uint32(b[4:])}
			n++
		case entryLabel:
			var units []uint16
			for i := range min(int(b[1]), 11) {
				units = append(units, le.Uint16(b[2+2*i:]))
			}
			f.info.Label = cluster.Text(units)
			n++
		}
	}
	if f.upcase, err = f.readUpcase(); errors.Is(err, guest.ErrDamaged) {
		f.warn("the up-case table is damaged: names are found in their own case, and that of ASCII")
		f.upcase, err = asciiUpcase(), nil
	}
	if err != nil {
		return fmt.Errorf("exfat: %w", err)
	}
	return nil
}
