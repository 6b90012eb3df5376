// Package bucket is where a repository keeps its immutable objects: packs,
// manifests and the config. An object is written once, becomes visible whole
// and durable or not at all, and is never changed afterwards.
package bucket

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"iter"
)

// Errors of a Bucket, matched with errors.Is.
var (
	// ErrNotExist: no object has that name.
	ErrNotExist = fs.ErrNotExist
	// ErrFull: the medium has no room left (ENOSPC, EDQUOT).
	ErrFull = errors.New("no space left in the repository")
	// ErrReadOnly: the medium refuses writes (EROFS, EACCES, EPERM).
	ErrReadOnly = errors.New("repository is not writable")
)

// Info describes one visible object.
type Info struct {
	Name string
	Size int64 // bytes
}

// draftFolder is where a bucket may keep drafts; no object's name starts there.
const draftFolder = "tmp"

// checkCall is how every call with a name begins.
func checkCall(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return CheckName(name)
}

// Bucket holds objects by name. Names are slash-separated, of [a-z0-9._-],
// never empty, absolute or containing "..", and not below "tmp" (CheckName);
// any other name is an error that matches fs.ErrInvalid. All methods are safe
// for concurrent use; a ctx that is done makes them return its error. After a
// crash every object is either as Commit left it or absent; drafts that were
// never committed are invisible.
type Bucket interface {
	// Create starts a new object of that name. It is invisible until Commit.
	// Committing over an existing object replaces it in one step.
	Create(ctx context.Context, name string) (Writer, error)
	// Open opens an object for reading. ErrNotExist when there is none.
	Open(ctx context.Context, name string) (Object, error)
	// List yields the objects whose names start with prefix, in no given order.
	// Objects that come or go meanwhile may or may not be seen.
	List(ctx context.Context, prefix string) iter.Seq2[Info, error]
	// Remove deletes an object durably. ErrNotExist when there is none.
	Remove(ctx context.Context, name string) error
}

// Reserver is a Bucket that can keep room on its medium for what makes room: even to
// remove something safely, something has to be written first.
type Reserver interface {
	// Reserve sets n bytes aside, unless some are already. It fails where there is no room.
	Reserve(n int64) error
	// Unreserve gives them back; where there are none it does nothing.
	Unreserve() error
}

// Spacer is a Bucket that knows how much room its medium has left.
type Spacer interface {
	// Free is the bytes that can still be written.
	Free() (int64, error)
}

// Namer is a Bucket that can list names without sizes at a lower cost.
type Namer interface {
	// Names is Bucket.List without the sizes.
	Names(ctx context.Context, prefix string) iter.Seq2[string, error]
}

// Names lists the objects of b whose names start with prefix.
func Names(ctx context.Context, b Bucket, prefix string) iter.Seq2[string, error] {
	if n, ok := b.(Namer); ok {
		return n.Names(ctx, prefix)
	}
	return func(yield func(string, error) bool) {
		for info, err := range b.List(ctx, prefix) {
			if !yield(info.Name, err) {
				return
			}
		}
	}
}

// Writer is an object being written. WriteAt may be called concurrently for
// ranges that do not overlap; p may be reused after it returns. Bytes below the
// last one written that nobody wrote are zero. After Commit or Abort, WriteAt
// and Commit return an error that matches fs.ErrClosed.
type Writer interface {
	io.WriterAt
	// Commit makes the bytes written so far durable, then visible, durably.
	// When it returns nil the object survives a power cut. When it returns an
	// error the object may or may not be visible, but never in part.
	Commit() error
	// Abort drops the draft. After Commit it does nothing.
	Abort() error
}

// Object is an open object. ReadAt is safe for concurrent use; an Object stays
// readable after Remove until it is closed, where the medium allows that.
type Object interface {
	io.ReaderAt
	io.Closer
	Size() int64 // bytes
}
