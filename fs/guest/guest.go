package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// Errors, matched with errors.Is.
var (
	// ErrNotExist: no such name, or no such inode.
	ErrNotExist = fs.ErrNotExist
	// ErrNotDir: asked of something that is no directory what only one can tell.
	ErrNotDir = errors.New("not a directory")
	// ErrUnknown: what the device holds is not of the kind that was asked to open it.
	ErrUnknown = errors.New("not this file system")
	// ErrDamaged: what the disk says cannot be, or its checksum does not match.
	ErrDamaged = errors.New("damaged")
	// ErrUnsupported: it is there, and this package cannot show it (encrypted, deduplicated by Windows …).
	ErrUnsupported = errors.New("not supported")
)

// Damaged makes an ErrDamaged that says what of which part is wrong: Damaged("inode %d: extent header", ino).
func Damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// Unsupported makes an ErrUnsupported that says what cannot be shown.
func Unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrUnsupported, fmt.Sprintf(format, args...))
}

// Device is what carries a file system: a disk, a partition, a logical volume. ReadAt is safe for concurrent use and
// as io.ReaderAt demands.
type Device interface {
	io.ReaderAt
	Size() int64 // bytes
}

// Options bound a reader. The zero value is the default.
type Options struct {
	// Cache is how many bytes of metadata are kept in memory; 0 is 16 MiB.
	Cache int64
	// Journal is how many bytes of memory what a journal replays may take; 0 is 64 MiB. A file system whose journal
	// needs more is ErrUnsupported.
	Journal int64
	// NoReplay leaves the journal alone, for tests and for looking at what the disk itself says.
	NoReplay bool
}

// Info describes a file system.
type Info struct {
	Type  string // as blkid(8) names it: ext4, xfs, ntfs, vfat, exfat, btrfs, iso9660
	Label string
	UUID  string // as blkid names it; "" when it has none
	Size  int64  // bytes that it covers
	Block int64  // bytes of an allocation unit
	// Replayed: the journal held changes, and what is shown is the state with them.
	Replayed bool
	// Warnings are for whoever looks: a journal that could not be replayed, a copy of the superblock in use.
	Warnings []string
}

// Ino names a thing of a file system: the inode number where there is one, and a number that stays the same for the
// same bytes on the disk where there is none.
type Ino uint64

// File types: the upper four bits of Stat.Mode, as in inode(7).
const (
	ModeType    = 0o170000
	ModeSocket  = 0o140000
	ModeLink    = 0o120000
	ModeRegular = 0o100000
	ModeBlock   = 0o060000
	ModeDir     = 0o040000
	ModeChar    = 0o020000
	ModeFIFO    = 0o010000
)

// Stat is what stat(2) tells.
type Stat struct {
	Mode     uint32 // type and permissions, as in inode(7)
	Nlink    uint32
	UID, GID uint32
	Size     int64 // bytes; of a link: the length of its target
	// Allocated is the bytes that the file takes up on the disk, as st_blocks counts them.
	Allocated    int64
	Major, Minor uint32 // of a device
	// Times in UTC. One that the file system does not have is the zero Time. Those without a time zone (FAT) are taken for UTC.
	Mtime, Atime, Ctime, Btime time.Time
}

// IsDir reports whether it is a directory.
func (s *Stat) IsDir() bool { return s.Mode&ModeType == ModeDir }

// Entry is a name in a directory.
type Entry struct {
	Name string // bytes
	Ino  Ino
	// Type is one of the Mode constants, or 0 when the directory does not tell: then Stat does.
	Type uint32
	// Next continues a listing behind this entry: ReadDir(dir, e.Next).
	Next uint64
}

// Xattr is an extended attribute as Linux shows it: "user.x", "security.capability", "system.posix_acl_access" …, its
// value as getxattr(2) gives it.
type Xattr struct {
	Name  string
	Value []byte
}

// Listed reports whether listxattr(2) names the attribute. What NTFS keeps besides is answered when it is asked for, as ntfs-3g
// does it, and not listed: no other file system takes it.
func (x Xattr) Listed() bool { return !strings.HasPrefix(x.Name, "system.ntfs_") }

// FS is a file system, read-only. All methods are safe for concurrent use. An inode that is not in use is ErrNotExist for each of them; a number
// that the format has no place for may be ErrDamaged instead.
type FS interface {
	Info() Info
	Root() Ino
	Stat(ino Ino) (Stat, error)
	// Lookup finds a name, by the file system's own rule of which names are the same; "." and ".." are none. ErrNotExist, ErrNotDir.
	Lookup(dir Ino, name string) (Ino, error)
	// ReadDir lists a directory without "." and "..", from its beginning with 0 and from Entry.Next otherwise. An error
	// ends the listing; what was yielded before it is good. ErrNotDir.
	ReadDir(dir Ino, from uint64) iter.Seq2[Entry, error]
	// Readlink gives the target of a symbolic link, as the guest has it. It is an error for anything else.
	Readlink(ino Ino) (string, error)
	// Open gives the content of a regular file. It needs no closing. It is an error for anything else.
	Open(ino Ino) (File, error)
	// Xattrs gives all extended attributes, in order of their names.
	Xattrs(ino Ino) ([]Xattr, error)
}

// File is the content of a regular file. ReadAt is as io.ReaderAt demands, any number at a time: io.EOF at the end and nowhere else.
type File interface {
	io.ReaderAt
	Size() int64 // bytes
	// Allocated yields ascending ranges, aligned to granularity (bytes) and clipped to Size, outside of which all bytes are
	// zero: holes and unwritten extents are not in them.
	Allocated(granularity int64) iter.Seq2[extent.Extent, error]
}

// Streamer is a FS whose files may have further named contents (NTFS: alternate data streams).
type Streamer interface {
	// Streams lists the names of those of a file or directory, in order.
	Streams(ino Ino) ([]string, error)
	// OpenStream opens one. ErrNotExist.
	OpenStream(ino Ino, name string) (File, error)
}

// Freer is a FS that knows for certain which blocks nothing uses, for a backup that leaves them out.
type Freer interface {
	// Free yields ascending ranges of the device (bytes) that no file and no metadata uses. An error means that nothing
	// that it yielded may be relied on.
	Free() iter.Seq2[extent.Extent, error]
}

// Locator is a FS that tells where a file's bytes are on its device, for a backup that leaves a swap file out.
type Locator interface {
	// Locate yields the ranges of the device (bytes) that hold whole blocks of that file and nothing else, in the order of
	// the file. An error means
	// that nothing that it yielded may be relied on.
	Locate(ino Ino) iter.Seq2[extent.Extent, error]
}
