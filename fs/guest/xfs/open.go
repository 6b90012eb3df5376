package xfs

import (
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// FS is an XFS file system. It implements guest.FS, guest.Freer and guest.Locator.
type FS struct {
	sb   *super
	dev  guest.Device // with what the log replays
	bufs *buffers
	info guest.Info
	log  replayed
	// doubt is why the free space may not be what it says; nil when the log was clean or has been replayed.
	doubt error
}

var (
	_ guest.FS      = (*FS)(nil)
	_ guest.Freer   = (*FS)(nil)
	_ guest.Locator = (*FS)(nil)
)

const defaultCache, defaultJournal = 16 << 20, 64 << 20

// Open reads the superblock and replays the log. guest.ErrUnknown when it is no XFS. The blocks that a replay changes take up to
// opt.Journal of memory, and the transaction that is being put together as much again.
func Open(dev guest.Device, opt guest.Options) (*FS, error) {
	if opt.Cache <= 0 {
		opt.Cache = defaultCache
	}
	if opt.Journal <= 0 {
		opt.Journal = defaultJournal
	}
	sb, warning, err := findSuper(dev)
	if err != nil {
		return nil, fmt.Errorf("xfs: %w", err)
	}
	fs := &FS{sb: sb, dev: dev, bufs: newBuffers(opt.Cache)}
	if warning != "" {
		fs.warn("%s", warning)
	}
	if err := fs.replay(opt); err != nil {
		return nil, fmt.Errorf("xfs: the log: %w", err)
	}
	if ro := fs.sb.roCompat &^ roKnown; ro != 0 && fs.doubt == nil {
		fs.doubt = guest.Unsupported("features of a newer XFS, %#x, which may count what is free otherwise", ro)
	}
	fs.describe()
	return fs, nil
}

func (fs *FS) describe() {
	fs.info.Type, fs.info.Label, fs.info.UUID = "xfs", fs.sb.label, fs.sb.uuidText()
	fs.info.Size, fs.info.Block = int64(fs.sb.dblocks)<<fs.sb.blockLog, fs.sb.blockSize
	if fs.sb.incompat&incompatNeedsRepair != 0 {
		fs.warn("marked as in need of repair: the kernel refuses to mount it before xfs_repair has run")
	}
	if fs.info.Size > fs.dev.Size() {
		fs.warn("%d bytes on a device of %d: its end is missing", fs.info.Size, fs.dev.Size())
	}
}

func (fs *FS) warn(format string, args ...any) {
	fs.info.Warnings = append(fs.info.Warnings, fmt.Sprintf(format, args...))
}

// Info implements guest.FS.
func (fs *FS) Info() guest.Info { return fs.info }

// Root implements guest.FS.
func (fs *FS) Root() guest.Ino { return guest.Ino(fs.sb.root) }

// superAt reads a superblock. The largest sector is read where there is as much.
func superAt(dev guest.Device, off int64) (*super, error) {
	if off < 0 || off > dev.Size()-512 {
		return nil, guest.ErrUnknown
	}
	b := make([]byte, 32768)
	if err := guest.ReadFull(dev, b[:min(int64(len(b)), dev.Size()-off)], off); err != nil {
		return nil, err
	}
	return parseSuper(b)
}

// findSuper reads the superblock, or a copy of it when it is damaged.
func findSuper(dev guest.Device) (*super, string, error) {
	sb, first := superAt(dev, 0)
	switch {
	case first == nil && sb.root != 0 && sb.root != nullIno:
		return sb, "", nil
	case errors.Is(first, guest.ErrUnsupported):
		return nil, "", first
	case first == nil:
		first = guest.Damaged("the superblock's root inode")
	case !errors.Is(first, guest.ErrDamaged) && !errors.Is(first, guest.ErrUnknown):
		return nil, "", first
	}
	for _, off := range copies(dev) {
		sb, err := superAt(dev, off)
		if err != nil || off%(int64(sb.agBlocks)<<sb.blockLog) != 0 || int64(sb.dblocks) > dev.Size()>>sb.blockLog {
			continue
		}
		if sb = bestCopy(dev, sb); sb != nil {
			return sb, "the superblock is damaged: a copy of it is in use", nil
		}
	}
	return nil, "", first
}

// bestCopy looks for a copy that knows the root: mkfs.xfs tells it only to some of them.
func bestCopy(dev guest.Device, sb *super) *super {
	for _, ag := range []uint64{sb.agCount - 1, sb.agCount / 2, 1, 2, 3} {
		if ag == 0 || ag >= sb.agCount {
			continue
		}
		other, err := superAt(dev, int64(ag*sb.agBlocks)<<sb.blockLog)
		if err == nil && other.uuid == sb.uuid && other.root != 0 && other.root != nullIno {
			return other
		}
	}
	return nil
}

// copies is where copies of the superblock may lie: where the damaged one says, and where mkfs.xfs puts them on a disk of this size.
func copies(dev guest.Device) []int64 {
	var out []int64
	head := make([]byte, 512)
	if guest.ReadFull(dev, head, 0) == nil {
		out = append(out, int64(be.Uint32(head[84:]))*int64(be.Uint32(head[4:])))
	}
	for log := uint(9); log <= 16; log++ {
		blocks := dev.Size() >> log
		for _, n := range []int64{4, 2, 8, 16, 32} {
			out = append(out, (blocks+n-1)/n<<log)
		}
	}
	return append(out, 1<<40-4096, 1<<40-1024) // the largest group
}
