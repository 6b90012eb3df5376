package fat

import (
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// FS is a FAT file system.
type FS struct {
	dev    guest.Device
	geo    geometry
	info   guest.Info
	cache  *cluster.Cached
	table  *cluster.Table
	small  []byte         // the table of FAT12
	rootAt *cluster.Table // one cluster, the root directory of FAT12 and FAT16

	dirs    *guest.Recent[guest.Ino, *directory]
	chains  *guest.Recent[uint32, *cluster.Chain] // first cluster => chain of a file
	parents cluster.Parents
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
		return nil, fmt.Errorf("fat: %w", err)
	}
	limit := opt.Cache
	if limit <= 0 {
		limit = defaultCache
	}
	f := &FS{dev: dev, geo: geo, cache: cluster.NewCached(dev, limit/2),
		dirs:    guest.NewRecent[guest.Ino, *directory](limit / 4),
		chains:  guest.NewRecent[uint32, *cluster.Chain](limit / 8),
		parents: cluster.NewParents(limit / 8)}
	f.table = &cluster.Table{Data: geo.data, Size: geo.cluster, Count: geo.clusters}
	f.rootAt = &cluster.Table{Data: geo.rootAt, Size: geo.rootLen, Count: 1}
	f.info = guest.Info{Type: "vfat", Size: geo.size, Block: geo.cluster}
	if geo.serial != 0 {
		f.info.UUID = fmt.Sprintf("%04X-%04X", geo.serial>>16, geo.serial&0xffff)
	}
	if warning != "" {
		f.warn("%s", warning)
	}
	if geo.size > dev.Size() {
		f.warn("the volume has %d bytes, its device %d", geo.size, dev.Size())
	}
	if err := f.openTable(); err != nil {
		return nil, fmt.Errorf("fat: %w", err)
	}
	return f, f.findLabel()
}

func (f *FS) warn(format string, args ...any) {
	f.info.Warnings = append(f.info.Warnings, fmt.Sprintf(format, args...))
}

// Info implements guest.FS.
func (f *FS) Info() guest.Info { return f.info }

const rootIno = 1

// Root implements guest.FS.
func (f *FS) Root() guest.Ino { return rootIno }

// openTable makes the table ready for use, and looks at what its second number says of the volume: that it was unmounted, and that no
// error was met (fatgen, "FAT Data Structure").
func (f *FS) openTable() error {
	at := f.geo.table + f.geo.active*f.geo.tableLen
	dirty, broken := uint32(0), uint32(0)
	switch f.geo.bits {
	case 12:
		f.small = make([]byte, f.tableUsed())
		if err := guest.ReadFull(f.dev, f.small, at); err != nil {
			return err
		}
		f.table.Links = func() func(uint32) (uint32, error) { return f.link12 }
	case 16:
		f.table.Links = f.cache.Links16(at, f.follow)
		dirty, broken = 0x8000, 0x4000
	case 32:
		f.table.Links = f.cache.Links32(at, f.follow)
		dirty, broken = 0x8000000, 0x4000000
	}
	flags := ^uint32(0)
	if f.geo.bits > 12 {
		b := make([]byte, 8)
		if err := guest.ReadFull(f.dev, b, at); err != nil {
			return err
		}
		if flags = le.Uint32(b[4:]); f.geo.bits == 16 {
			flags = uint32(le.Uint16(b[2:]))
		}
	}
	if f.geo.state&1 != 0 || flags&dirty != dirty {
		f.warn("the volume was not unmounted: what was written last may be missing or torn")
	}
	if f.geo.state&2 != 0 || flags&broken != broken {
		f.warn("the volume notes that an error was met on its disk")
	}
	return nil
}

// tableUsed is how many bytes of the table have numbers of clusters.
func (f *FS) tableUsed() int64 { return ((f.geo.clusters+cluster.First)*int64(f.geo.bits) + 7) / 8 }

// follow makes of a number in the table what cluster.Table wants (fatgen, "FAT Data Structure").
func (f *FS) follow(n uint32) (uint32, error) {
	top := uint32(1)<<f.geo.bits - 1
	if f.geo.bits == 32 {
		top = 0x0fffffff // the other bits are reserved
	}
	n &= top
	switch {
	case n >= top-7:
		return 0, nil
	case n == 0:
		return 0, guest.Damaged("a chain to a free cluster")
	case n == top-8:
		return 0, guest.Damaged("a chain to a bad cluster")
	case n < cluster.First || int64(n)-cluster.First >= f.geo.clusters:
		return 0, guest.Damaged("a chain to cluster %d, of %d", n, f.geo.clusters)
	}
	return n, nil
}

func (f *FS) link12(n uint32) (uint32, error) { return f.follow(f.number12(n)) }

// number12 takes a number of 12 bits from the table.
func (f *FS) number12(n uint32) uint32 {
	at := n + n/2
	if int64(at)+1 >= int64(len(f.small)) {
		return 0
	}
	return uint32(le.Uint16(f.small[at:])) >> (n & 1 * 4) & 0xfff
}

// findLabel takes the label of the root directory or, without one, of the boot sector. blkid does it in this order, too.
func (f *FS) findLabel() error {
	label := f.geo.label
	d, err := f.directory(rootIno)
	if err != nil {
		return nil // listing the directory says so
	}
	for it := d.slots(f, 0); ; {
		b, err := it.Next()
		if err != nil || b == nil || b[0] == 0 {
			break
		}
		if b[0] != deleted && b[11]&attrMask != attrLong && b[11]&attrLabel != 0 {
			label = string(b[:11])
			break
		}
	}
	if label = strings.TrimRight(text437([]byte(label)), " \x00"); label != "NO NAME" {
		f.info.Label = label
	}
	return nil
}
