package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ErrIndexStale: an index that may not be written lacks something, so it cannot be used.
var ErrIndexStale = errors.New("index is not up to date")

// MemoryIndex opens an index in memory, made anew from packs and manifests.
func MemoryIndex() IndexOpener {
	return func(ctx context.Context, repo [16]byte, check IndexCheck) (Index, error) {
		x, err := openBadger("", repo, false)
		if err != nil {
			return nil, err
		}
		return checked(ctx, x, check)
	}
}

// LocalIndex opens the index in dir, which no other process may have open. An
// index that is damaged, foreign or of another format is made anew: all of it is in packs and
// manifests. With readOnly nothing is written.
func LocalIndex(dir string, readOnly bool) IndexOpener {
	return func(ctx context.Context, repo [16]byte, check IndexCheck) (Index, error) {
		if !readOnly {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return nil, err
			}
		}
		if readOnly {
			// One that was not closed is not used in the end; and on a full tmpfs, where
			// reading a hole of a mapped file takes room, looking at it would be the end of the process.
			open, err := filepath.Glob(filepath.Join(dir, "*.mem"))
			if err != nil || len(open) > 0 {
				return nil, errors.Join(ErrIndexStale, err)
			}
		}
		x, err := openProved(dir, repo, readOnly)
		if err != nil && !readOnly && !errors.Is(err, os.ErrPermission) {
			if err := clearIndex(dir); err != nil {
				return nil, err
			}
			x, err = openBadger(dir, repo, false)
		}
		if err != nil {
			return nil, err
		}
		return checked(ctx, x, check)
	}
}

// NewLocalIndex is LocalIndex without what is in dir, all of which goes.
func NewLocalIndex(dir string) IndexOpener {
	return func(ctx context.Context, repo [16]byte, check IndexCheck) (Index, error) {
		// In one step: half an index must not be taken for one.
		old := dir + ".old"
		if err := os.RemoveAll(old); err != nil {
			return nil, err
		}
		if err := os.Rename(dir, old); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := os.RemoveAll(old); err != nil {
			return nil, err
		}
		return LocalIndex(dir, false)(ctx, repo, check)
	}
}

// openProved is openBadger for files that somebody else has written.
func openProved(dir string, repo [16]byte, readOnly bool) (x *badgerIndex, err error) {
	if err := proveFiles(dir); err != nil {
		return nil, err
	}
	// What is not proved Badger checks with care, and sometimes with a panic.
	defer func() {
		if r := recover(); r != nil {
			x, err = nil, fmt.Errorf("%w: %v", errIndexFiles, r)
		}
	}()
	return openBadger(dir, repo, readOnly)
}

// checked compares an index with the repository before it is used.
func checked(ctx context.Context, x *badgerIndex, check IndexCheck) (Index, error) {
	if x.readOnly && !x.wasClean {
		x.Close()
		return nil, ErrIndexStale
	}
	if err := check(ctx, x, x.wasClean); err != nil {
		x.Close()
		if x.readOnly { // most of all, because it had to be written
			err = errors.Join(ErrIndexStale, err)
		}
		return nil, err
	}
	x.complete.Store(true)
	return x, nil
}

// clearIndex removes everything in dir.
func clearIndex(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
