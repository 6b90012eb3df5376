package ext

import (
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// FS is an ext2, ext3 or ext4 file system.
type FS struct {
	*super
	dev         guest.Device // with what the journal replayed
	meta        *guest.Cache // of dev, in blocks of the file system
	backupGroup uint16       // whose superblock is in use
	info        guest.Info
	// uncertain is why what is free and who owns a block cannot be relied on; nil when it can.
	uncertain error
	fast      *fastCommits // what fast commits change; nil without any
	sound     soundSet     // directories whose index leads to all their names
}

var (
	_ guest.FS      = (*FS)(nil)
	_ guest.Freer   = (*FS)(nil)
	_ guest.Locator = (*FS)(nil)
)

// Open opens the file system on dev and replays its journal into memory. ErrUnknown when there is none, ErrUnsupported when
// it has features that are not known, ErrDamaged when no copy of the superblock can be used.
func Open(dev guest.Device, opt guest.Options) (*FS, error) {
	if opt.Cache == 0 {
		opt.Cache = 16 << 20
	}
	if opt.Journal == 0 {
		opt.Journal = 64 << 20
	}
	f := &FS{dev: dev}
	if err := f.findSuper(opt.Cache); err != nil {
		return nil, err
	}
	if err := f.recover(opt); err != nil {
		return nil, err
	}
	if f.state&stateValid == 0 {
		f.doubt("the file system was not unmounted")
	}
	if f.state&stateErrors != 0 {
		f.warn("the guest found errors in this file system, which wait for a check")
	}
	if need := f.blocks * f.blockSize; need > dev.Size() {
		f.warn("the file system has %d bytes, its device only %d", need, dev.Size())
	}
	f.info.Type, f.info.Label, f.info.UUID = f.kind(), f.label, f.uuidText()
	f.info.Size, f.info.Block = f.blocks*f.blockSize, f.blockSize<<f.clusterBits
	return f, nil
}

// warn tells whoever looks, and makes what is free uncertain.
func (f *FS) warn(format string, args ...any) {
	f.info.Warnings = append(f.info.Warnings, fmt.Sprintf(format, args...))
	f.doubt(format, args...)
}

func (f *FS) doubt(format string, args ...any) {
	if f.uncertain == nil {
		f.uncertain = fmt.Errorf("ext: which blocks are free is uncertain: "+format, args...)
	}
}

// use makes a superblock the one of the file system.
func (f *FS) use(s *super, cache int64) {
	f.super = s
	f.meta = guest.NewCache(f.dev, s.blockSize, cache)
}

// findSuper reads the superblock, or a copy of it when the first is damaged.
func (f *FS) findSuper(cache int64) error {
	b := make([]byte, superSize)
	if err := guest.ReadFull(f.dev, b, superOffset); err != nil {
		if errors.Is(err, guest.ErrDamaged) {
			return fmt.Errorf("ext: a device of %d bytes: %w", f.dev.Size(), guest.ErrUnknown)
		}
		return err
	}
	s, first := parseSuper(b)
	if first == nil {
		f.use(s, cache)
		return nil
	}
	if errors.Is(first, guest.ErrUnsupported) {
		return first
	}
	// Whoever asks what is on a disk asks each reader: one that finds no trace of its own reads little.
	unnamed := errors.Is(first, guest.ErrUnknown)
	groups := []int64{1, 3, 5, 7, 9, 25, 27}
	if unnamed {
		groups = groups[:1]
	}
	for log := range int64(7) {
		for _, group := range groups {
			if s := f.backup(b, 1024<<log, group); s != nil && f.believe(s, cache, unnamed) {
				f.backupGroup = s.group
				f.warn("the superblock is damaged: the copy in group %d is used", group)
				return nil
			}
		}
	}
	return first
}

// backup reads the copy of the superblock in a group, as mkfs places groups of blocks of that size. It is nil when none is there.
func (f *FS) backup(b []byte, blockSize, group int64) *super {
	off := group * blockSize * blockSize * 8
	if blockSize == 1024 {
		off += blockSize
	}
	if off+superSize > f.dev.Size() || guest.ReadFull(f.dev, b, off) != nil {
		return nil
	}
	s, err := parseSuper(b)
	if err != nil || s.blockSize != blockSize || int64(s.group) != group || !s.hasSuper(group) {
		return nil
	}
	return s
}

// believe decides whether a copy of the superblock is of what is on the device now. Where the first superblock does not even
// say what it is, the device may have been formatted since: then the first group's descriptor, whose checksum is
// over the UUID, has to belong to the copy.
func (f *FS) believe(s *super, cache int64, unnamed bool) bool {
	f.use(s, cache)
	if !unnamed {
		return true
	}
	if s.ro&(roMetadataCsum|roGDTCsum) == 0 {
		return false
	}
	_, err := f.primary(0)
	return err == nil
}

// Info implements guest.FS.
func (f *FS) Info() guest.Info { return f.info }

// Root implements guest.FS.
func (f *FS) Root() guest.Ino { return rootIno }
