package store

import (
	"errors"
	"fmt"
	"io/fs"
)

// Errors of the package, matched with errors.Is.
var (
	// ErrNotExist: no such point, disk or object. It is the one of io/fs, as buckets give it.
	ErrNotExist = fs.ErrNotExist
	// ErrNoRepository: the directory holds no repository.
	ErrNoRepository = errors.New("not a holdfast repository")
	// ErrExists: the place of a new repository already holds one, or something else.
	ErrExists = errors.New("already exists")
	// ErrDamaged: stored bytes fail their check.
	ErrDamaged = errors.New("damaged")
	// ErrNewerFormat: the repository was written by a newer program.
	ErrNewerFormat = errors.New("repository format is newer than this program")
	// ErrPassphrase: the passphrase opens none of the repository's keys.
	ErrPassphrase = errors.New("wrong passphrase")
	// ErrNotEncrypted: the repository has no keys that could be listed or changed.
	ErrNotEncrypted = errors.New("repository is not encrypted: it has no keys")
	// ErrLastKey: without its only key nobody could open the repository any more.
	ErrLastKey = errors.New("the only key cannot be removed")
	// ErrKeyInUse: the key that opened the repository is not removed: that another one
	// opens it has not been proved.
	ErrKeyInUse = errors.New("the key in use cannot be removed")
	// ErrUnsure: a change of keys failed in its last step, so it may have taken effect.
	ErrUnsure = errors.New("it may have been done all the same")
	// ErrLocked: another process holds the repository and does not answer.
	ErrLocked = errors.New("repository is locked")
	// ErrOrder: chunks were given to a MapBuilder out of their order, or past the end of the disk.
	ErrOrder = errors.New("out of order")
	// ErrAmbiguous: a name stands for more than one point.
	ErrAmbiguous = errors.New("ambiguous")
)

// DamageError names what was hit. It matches ErrDamaged.
type DamageError struct {
	Point string // name of the point, when known
	Disk  string // name of the disk, when known
	Off   int64  // byte offset on the disk, when Disk is known
	What  string // the object: "chunk 1a2b… in pack 3c4d…", "manifest 5e6f…"
	Err   error  // which check failed
}

func (e *DamageError) Error() string {
	s := e.What
	if e.Disk != "" {
		s = fmt.Sprintf("%s %s at offset %d: %s", e.Point, e.Disk, e.Off, e.What)
	} else if e.Point != "" {
		s = e.Point + ": " + e.What
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return "damaged: " + s
}

// Is makes every DamageError match ErrDamaged.
func (e *DamageError) Is(target error) bool { return target == ErrDamaged }

// Unwrap gives the check that failed.
func (e *DamageError) Unwrap() error { return e.Err }
