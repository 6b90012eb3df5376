package fuse

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotMounted: nothing of holdfast is mounted there.
var ErrNotMounted = errors.New("no holdfast mount")

// Unmount ends a mount of holdfast that any process made. EBUSY while it is in use.
func Unmount(dir string) error {
	dir, err := resolve(dir)
	if err != nil {
		return err
	}
	if !isOurs(dir) {
		return fmt.Errorf("%s: %w", dir, ErrNotMounted)
	}
	err = unix.Unmount(dir, 0)
	if errors.Is(err, unix.EPERM) {
		return fusermount("-u", dir)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// Prepare makes dir fit to be mounted on: it must be an empty directory. What a
// killed holdfast left mounted there is cleared; it says so in cleared.
func Prepare(dir string) (path string, cleared bool, err error) {
	path, err = resolve(dir)
	if err != nil {
		return "", false, err
	}
	for Stale(path) {
		if err := Detach(path); err != nil {
			return "", cleared, fmt.Errorf("clear the stale mount at %s: %w", dir, err)
		}
		cleared = true
	}
	if isOurs(path) {
		return "", cleared, fmt.Errorf("%s is a holdfast mount already", dir)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return "", cleared, err
	}
	if len(entries) > 0 {
		return "", cleared, fmt.Errorf("%s is not empty", dir)
	}
	return path, cleared, nil
}

// resolve makes a path as the kernel lists it: absolute, without links. What it
// leads to may be a mount that does not answer.
func resolve(dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for range maxLinks {
		real, err := filepath.EvalSymlinks(path)
		if !errors.Is(err, syscall.ENOTCONN) {
			return real, err
		}
		parent, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return "", err
		}
		path = filepath.Join(parent, filepath.Base(path))
		to, err := os.Readlink(path)
		if err != nil { // it is the mount itself
			return path, nil
		}
		if path = to; !filepath.IsAbs(to) {
			path = filepath.Join(parent, to)
		}
	}
	return "", fmt.Errorf("%s: %w", dir, syscall.ELOOP)
}

// maxLinks is how many links may follow each other, as in the kernel.
const maxLinks = 40

// fusermount asks the setuid helper, for users that may not unmount themselves.
func fusermount(args ...string) error {
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fusermount3 %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
