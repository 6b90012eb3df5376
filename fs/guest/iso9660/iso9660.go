package iso9660

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var le = binary.LittleEndian

const (
	sectorSize   = 2048 // ECMA-119 §6.1.2: no record of a directory goes across its end
	firstVolume  = 16   // sector of the first descriptor, §6.2.1
	maxVolumes   = 64   // descriptors that are looked at
	defaultCache = 16 << 20
)

// FS is an ISO 9660 volume. It implements guest.FS. The number of an inode is where its directory record is, bytes: for a file the
// one that names it, for a directory the first of its own.
type FS struct {
	dev     guest.Device
	info    guest.Info
	block   int64
	root    guest.Ino
	sectors *guest.Cache
	seed    maphash.Seed // of the hashes in indexes
	indexes *guest.Recent[guest.Ino, *dirIndex]
	orphans orphans

	joliet bool
	rock   bool
	skip   int // bytes before the system use entries of a record
}

var _ guest.FS = (*FS)(nil)

// Open opens the volume on dev. ErrUnknown: it is none.
func Open(dev guest.Device, opt guest.Options) (*FS, error) {
	size := opt.Cache
	if size <= 0 {
		size = defaultCache
	}
	f := &FS{dev: dev, sectors: guest.NewCache(dev, sectorSize, size/2), seed: maphash.MakeSeed(), indexes: guest.NewRecent[guest.Ino, *dirIndex](size / 2)}
	primary, joliet, err := f.descriptors()
	if err != nil {
		return nil, fmt.Errorf("iso9660: %w", err)
	}
	f.describe(primary, joliet)
	err = f.enter(primary)
	if err == nil {
		err = f.findRock()
	}
	if err == nil && !f.rock && joliet != nil {
		f.joliet = true
		err = f.enter(joliet)
	}
	if err != nil {
		return nil, fmt.Errorf("iso9660: the root directory: %w", err)
	}
	return f, nil
}

// A descriptor is a volume descriptor (§8.4, §8.5):
//
//	0 type 1 | 1 "CD001" | 6 version 1 | 40 name 32 | 80 blocks 8 | 88 escape sequences 32 | 128 bytes of a block 4
//	156 record of the root 34 | 813 made 17 | 830 changed 17
type descriptor []byte

// descriptors finds the primary one and that of Joliet, nil when there is none. Those of UDF follow (ECMA-167 2/8).
func (f *FS) descriptors() (primary, joliet descriptor, err error) {
	const kindPrimary, kindSupplementary = 1, 2
	for n := range int64(maxVolumes) {
		if (firstVolume+n+1)*sectorSize > f.dev.Size() {
			break
		}
		d := make(descriptor, sectorSize)
		if err := guest.ReadFull(f.dev, d, (firstVolume+n)*sectorSize); err != nil {
			return nil, nil, err
		}
		id := string(d[1:6])
		if id == "NSR02" || id == "NSR03" {
			f.info.Warnings = append(f.info.Warnings, "there is a UDF file system too, which is not read and may hold more")
			break
		}
		if !slices.Contains([]string{"CD001", "BEA01", "BOOT2", "TEA01"}, id) {
			break
		}
		switch {
		case id != "CD001":
		case d[0] == kindPrimary && primary == nil:
			primary = d
		case d[0] == kindSupplementary && joliet == nil && d.joliet():
			joliet = d
		}
	}
	if primary == nil {
		return nil, nil, guest.ErrUnknown
	}
	for _, d := range []descriptor{primary, joliet} {
		if d != nil && d.block() != 512 && d.block() != 1024 && d.block() != 2048 {
			return nil, nil, guest.Damaged("blocks of %d bytes", d.block())
		}
	}
	return primary, joliet, nil
}

// joliet reports whether names are UCS-2: Joliet, "SVD Escape Sequences Field".
func (d descriptor) joliet() bool {
	return d[88] == '%' && d[89] == '/' && strings.IndexByte("@CE", d[90]) >= 0
}

func (d descriptor) block() int64 { return int64(le.Uint16(d[128:])) }

// describe makes Info, as blkid names things.
func (f *FS) describe(d, joliet descriptor) {
	f.info.Type, f.info.Block, f.info.Size = "iso9660", d.block(), int64(le.Uint32(d[80:]))*d.block()
	f.info.Label = strings.TrimRight(string(d[40:72]), " \x00")
	if joliet != nil {
		if wide := strings.TrimRight(wideText(joliet[40:72]), " \x00"); wide != "" {
			f.info.Label = wide
		}
	}
	for _, stamp := range [][]byte{d[830:847], d[813:830]} {
		if s := string(stamp[:16]); strings.Trim(s, "0\x00") != "" {
			f.info.UUID = fmt.Sprintf("%s-%s-%s-%s-%s-%s-%s", s[:4], s[4:6], s[6:8], s[8:10], s[10:12], s[12:14], s[14:16])
			break
		}
	}
	if f.info.Size > f.dev.Size() {
		f.info.Warnings = append(f.info.Warnings, fmt.Sprintf("the volume is %d bytes, and its device %d", f.info.Size, f.dev.Size()))
	}
}

// enter takes the root directory of a descriptor.
func (f *FS) enter(d descriptor) error {
	f.block = d.block()
	r, err := parseRecord(d[156:190])
	if err != nil {
		return err
	}
	f.root = f.home(r)
	_, err = f.directory(f.root)
	return err
}

// findRock looks for the mark of SUSP in the first record of the root (SUSP §5.3): "SP" | length 7 | version 1 | be ef | bytes to skip in all other
// records. On CD-ROM XA it stands behind 14 bytes.
func (f *FS) findRock() error {
	r, err := f.record(int64(f.root))
	if err != nil {
		return err
	}
	for _, at := range []int{0, 14} {
		if b := r.use; len(b) >= at+7 && bytes.Equal(b[at:at+6], []byte("SP\x07\x01\xbe\xef")) {
			f.rock, f.skip = true, int(b[at+6])
			break
		}
	}
	return nil
}

// Info implements guest.FS.
func (f *FS) Info() guest.Info { return f.info }

// Root implements guest.FS.
func (f *FS) Root() guest.Ino { return f.root }

// Xattrs implements guest.FS.
func (f *FS) Xattrs(ino guest.Ino) ([]guest.Xattr, error) {
	_, err := f.Stat(ino)
	return nil, err
}

// read fills p through the cache.
func (f *FS) read(p []byte, off int64) error {
	for len(p) > 0 {
		b, err := f.sectors.Block(off/sectorSize, nil)
		if err != nil {
			return err
		}
		n := copy(p, b[off%sectorSize:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}
