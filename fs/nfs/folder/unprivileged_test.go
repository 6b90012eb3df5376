package folder

import (
	"errors"
	"os"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// TestUnprivileged: a service that may not give files away makes them its own, whoever makes them; to give one away later is refused.
func TestUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root becomes somebody else here")
	}
	dir, err := os.MkdirTemp("", "unprivileged-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, 1234, 1234); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	if err := errors.Join(unix.Setfsgid(1234), unix.Setfsuid(1234)); err != nil {
		t.Fatal(err)
	}
	f, err := Open(dir, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, root := t.Context(), uint32(0)
	mode := uint32(0o640)
	set := nfs.Change{UID: &root, GID: &root, Mode: &mode}
	file, err := f.Create(ctx, f.Root(), "file", nfs.Creation{Set: set})
	if err != nil {
		t.Fatal(err)
	}
	mark := [8]byte{1}
	marked, err := f.Create(ctx, f.Root(), "marked", nfs.Creation{Exclusive: &mark, Set: nfs.Change{UID: &root, GID: &root}})
	if err != nil {
		t.Fatal(err)
	}
	sub, err := f.Mkdir(ctx, f.Root(), "dir", set)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []nfs.ID{file, marked, sub} {
		a, err := f.Attr(ctx, id)
		if err != nil || a.UID != 1234 || id != marked && a.Mode != mode {
			t.Errorf("%+v, %v", a, err)
		}
	}
	want(t, f.SetAttr(ctx, file, nfs.Change{UID: &root}), syscall.EPERM)
}
