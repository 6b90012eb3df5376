package btrfs

import (
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// FS is a Btrfs file system. It implements guest.FS, guest.Freer and guest.Locator.
type FS struct {
	sb    *super
	vol   volume
	nodes *cache[node]
	parts *cache[[]byte] // decompressed extents, by their logical address
	roots roots
	info  guest.Info
	log   replayed
}

var (
	_ guest.FS      = (*FS)(nil)
	_ guest.Freer   = (*FS)(nil)
	_ guest.Locator = (*FS)(nil)
)

const defaultCache, defaultJournal = 16 << 20, 64 << 20

// Open reads the superblock, the chunk tree and the log. guest.ErrUnknown when it is no Btrfs.
func Open(dev guest.Device, opt guest.Options) (*FS, error) {
	return OpenAll([]guest.Device{dev}, opt)
}

// OpenAll opens a file system that lies on several devices, in any order. One may be missing: what has no copy on another
// is then guest.ErrDamaged.
func OpenAll(devs []guest.Device, opt guest.Options) (*FS, error) {
	if opt.Cache <= 0 {
		opt.Cache = defaultCache
	}
	if opt.Journal <= 0 {
		opt.Journal = defaultJournal
	}
	fs := &FS{nodes: newCache[node](opt.Cache / 4 * 3), parts: newCache[[]byte](opt.Cache / 4)}
	for _, step := range []func() error{
		func() error { return fs.assemble(devs) }, fs.readChunks, fs.openRoots, func() error { return fs.replay(opt) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("btrfs: %w", err)
		}
	}
	fs.describe()
	return fs, nil
}

// assemble reads the superblocks. The newest says what the file system is.
func (fs *FS) assemble(devs []guest.Device) error {
	if len(devs) == 0 {
		return guest.ErrUnknown
	}
	var supers []*super
	var unreadable error
	for _, dev := range devs {
		s, warning, err := findSuper(dev)
		if err != nil {
			unreadable = err
			fs.warn("a device whose superblock cannot be used: %v", err)
		}
		if warning != "" {
			fs.warn("%s", warning)
		}
		supers = append(supers, s)
		if s != nil && (fs.sb == nil || s.generation > fs.sb.generation) {
			fs.sb = s
		}
	}
	if fs.sb == nil {
		return unreadable
	}
	fs.vol.devs = map[uint64]member{}
	for i, s := range supers {
		if s == nil {
			continue
		}
		if _, twice := fs.vol.devs[s.devID]; twice || s.fsid != fs.sb.fsid {
			return fmt.Errorf("devices that do not belong together: device %d of %s", s.devID, uuidText(s.fsid))
		}
		fs.vol.devs[s.devID] = member{devs[i], s.generation < fs.sb.generation}
	}
	return nil
}

// readChunks reads the array of system chunks, and with those the chunk tree.
func (fs *FS) readChunks() error {
	for b := fs.sb.chunks; len(b) > 0; {
		if len(b) < keySize || b[8] != kindChunk {
			return guest.Damaged("the superblock's array of chunks")
		}
		c, n, err := parseChunk(parseKey(b).off, b[keySize:])
		if err == nil {
			err = fs.vol.add(c)
		}
		if err != nil {
			return err
		}
		b = b[keySize+n:]
	}
	t := tree{fs: fs, id: objectChunkTree, root: want{fs.sb.chunkRoot, fs.sb.chunkGen, fs.sb.chunkLevel}}
	var list []chunk
	var bad error
	err := t.walk(key{}, func(k key, b []byte) bool {
		switch k.kind {
		case kindChunk:
			var c chunk
			c, _, bad = parseChunk(k.off, b)
			list = append(list, c)
		case kindDevice:
			fs.checkDevice(k.off, b)
		}
		return bad == nil
	})
	// What is in the tree is all there is; the array was the way to it.
	fs.vol.chunks = fs.vol.chunks[:0:0]
	for _, c := range list {
		if err == nil && bad == nil {
			bad = fs.vol.add(c)
		}
	}
	return errors.Join(err, bad)
}

// checkDevice notes what is wrong with the device of a DEV_ITEM.
func (fs *FS) checkDevice(id uint64, b []byte) {
	m, ok := fs.vol.devs[id]
	switch {
	case !ok:
		fs.warn("device %d is missing", id)
	case len(b) >= 16 && int64(le.Uint64(b[8:])) > m.Size():
		fs.warn("device %d has %d bytes of %d: its end is missing", id, m.Size(), int64(le.Uint64(b[8:])))
	case m.stale:
		fs.warn("device %d missed the last changes: other copies are preferred", id)
	}
}

func (fs *FS) describe() {
	fs.info.Type, fs.info.Label, fs.info.UUID = "btrfs", fs.sb.label, uuidText(fs.sb.fsid)
	fs.info.Size, fs.info.Block = fs.sb.total, int64(fs.sb.sector)
}

// warn adds a warning, once.
func (fs *FS) warn(format string, args ...any) {
	if w := fmt.Sprintf(format, args...); !slices.Contains(fs.info.Warnings, w) {
		fs.info.Warnings = append(fs.info.Warnings, w)
	}
}

// Info implements guest.FS.
func (fs *FS) Info() guest.Info { return fs.info }
