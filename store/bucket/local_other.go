//go:build !linux

package bucket

import (
	"errors"
	"fmt"
)

// Local exists on Linux only.
type Local struct{ Bucket }

// OpenLocal fails with errors.ErrUnsupported.
func OpenLocal(dir string) (*Local, error) {
	return nil, fmt.Errorf("bucket: open %s: %w", dir, errors.ErrUnsupported)
}

// CleanTemp does nothing.
func (l *Local) CleanTemp() (int, error) { return 0, nil }

// FreeBytes fails with errors.ErrUnsupported.
func FreeBytes(dir string) (int64, error) {
	return 0, fmt.Errorf("bucket: room in %s: %w", dir, errors.ErrUnsupported)
}
