package nfs

import (
	"context"
	"iter"
	"time"
)

// ID names a file or directory of an FS: the same for the same one after a rename and after every restart, never another's. File is the fileid that
// clients see; a file that gets the File of one that was removed has another Generation.
type ID struct {
	File, Generation uint64
}

// Kind of a file.
type Kind uint8

// The kinds of files.
const (
	KindFile Kind = iota + 1
	KindDir
	KindLink
)

// Attr describes a file.
type Attr struct {
	Kind     Kind
	Mode     uint32 // permission bits, 07777
	Links    uint32
	UID, GID uint32
	Size     int64 // bytes
	Used     int64 // bytes that it takes up
	Accessed time.Time
	Modified time.Time // of the contents
	Changed  time.Time // of contents or attributes
}

// Change is what SetAttr and Create set; nil leaves a thing as it is.
type Change struct {
	Mode               *uint32
	UID, GID           *uint32
	Size               *int64
	Accessed, Modified *time.Time
}

// Entry is a line of a directory.
type Entry struct {
	Name string
	ID   ID
	// Cookie is where a listing goes on after this entry. It is never 0, and keeps its meaning while other entries come and go: an entry
	// that is there all the time is listed once.
	Cookie uint64
}

// Space of an FS.
type Space struct {
	Total, Free, Available int64 // bytes
	Files, FreeFiles       int64
}

// FS is what an export shows. All methods may be called at once by many goroutines. Errors are, by errors.Is, values of syscall.Errno: ENOENT, ENOTDIR,
// EISDIR, ENOTEMPTY, EEXIST, EACCES, EPERM, EROFS, ENOSPC, EDQUOT, EFBIG, EINVAL, ENAMETOOLONG, EXDEV, ESTALE; any other error is EIO to the client
// and a line of the log. ESTALE is for an ID of which there is nothing any more. Names are one component, never empty, "." or "..".
type FS interface {
	Root() ID
	Attr(ctx context.Context, id ID) (Attr, error)
	Lookup(ctx context.Context, dir ID, name string) (ID, error)
	// Parent gives the directory that a directory is in; the root's is the root.
	Parent(ctx context.Context, dir ID) (ID, error)
	// ReadDir yields the entries after that of the cookie, or all after 0, without "." and "..". An error ends it. EINVAL for a cookie that it never gave.
	ReadDir(ctx context.Context, dir ID, after uint64) iter.Seq2[Entry, error]
	// ReadAt is as in io.ReaderAt: fewer bytes than asked for only with io.EOF at the end of the file, or another error.
	ReadAt(ctx context.Context, file ID, p []byte, off int64) (int, error)
	Readlink(ctx context.Context, link ID) (string, error)
	Space(ctx context.Context) (Space, error)
}

// WritableFS is an FS that can be changed. What Create, Mkdir, Remove, Rmdir, Rename and SetAttr did is durable when they return (RFC 1813 §1.1).
type WritableFS interface {
	FS
	// WriteAt writes all of p, or gives an error. It need not be durable before Sync, but outlives the process.
	WriteAt(ctx context.Context, file ID, p []byte, off int64) (int, error)
	// Sync makes all durable that was written to the file before.
	Sync(ctx context.Context, file ID) error
	SetAttr(ctx context.Context, id ID, c Change) error
	Create(ctx context.Context, dir ID, name string, how Creation) (ID, error)
	Mkdir(ctx context.Context, dir ID, name string, c Change) (ID, error)
	Remove(ctx context.Context, dir ID, name string) error
	Rmdir(ctx context.Context, dir ID, name string) error
	// Rename puts the file in the place of one that has that name already, if that is allowed (RFC 1813 §3.3.14).
	Rename(ctx context.Context, from ID, name string, to ID, as string) error
}

// Creation says how a file is made (RFC 1813 §3.3.8).
type Creation struct {
	// Guarded gives EEXIST when the name is taken. Without it, and without Exclusive, a file that is there is opened, and its Size set if Set says so.
	Guarded bool
	// Exclusive is the client's mark of this one creation: a file that is there and was made by the same mark, also before a restart, is the answer
	// to it; any other is EEXIST. Of Set only UID and GID are used with it. A SetAttr ends
	// the life of the mark.
	Exclusive *[8]byte
	Set       Change
}
