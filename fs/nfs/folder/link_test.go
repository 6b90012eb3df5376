package folder

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// TestLinksAreNotFollowed: links are shown, and nothing goes through them.
func TestLinksAreNotFollowed(t *testing.T) {
	dir, out := tempDir(t), tempDir(t)
	secret := filepath.Join(out, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := mustOpen(t, dir, Options{}, Placed{Path: "p", Key: "p", Content: newDisk(10), Time: day})
	if err := errors.Join(os.Symlink(secret, dataFile(dir, "file")), os.Symlink(out, dataFile(dir, "dir")), os.Symlink(".", dataFile(dir, "self"))); err != nil {
		t.Fatal(err)
	}
	root := f.Root()
	file, d, self := lookup(t, f, "file"), lookup(t, f, "dir"), lookup(t, f, "self")
	for _, id := range []nfs.ID{file, d, self} {
		if a := attr(t, f, id); a.Kind != nfs.KindLink {
			t.Errorf("%+v", a)
		}
		want(t, second(f.ReadAt(ctx, id, make([]byte, 1), 0)), syscall.EINVAL)
		want(t, second(f.WriteAt(ctx, id, make([]byte, 1), 0)), syscall.EINVAL)
		want(t, f.SetAttr(ctx, id, nfs.Change{Size: new(int64)}), syscall.EINVAL)
		want(t, f.SetAttr(ctx, id, nfs.Change{Modified: &day, Mode: ptr(uint32(0o777)), UID: ptr(uint32(os.Getuid()))}), 0)
		want(t, second(f.Lookup(ctx, id, "secret")), syscall.ENOTDIR)
		want(t, second(f.Create(ctx, id, "x", nfs.Creation{})), syscall.ENOTDIR)
		want(t, f.Rename(ctx, root, "p", id, "x"), syscall.ENOTDIR)
		want(t, f.Remove(ctx, id, "secret"), syscall.ENOTDIR)
	}
	for _, name := range []string{"file", "dir"} {
		want(t, second(f.Create(ctx, root, name, nfs.Creation{Set: nfs.Change{Size: new(int64)}})), syscall.EEXIST)
	}
	want(t, f.Rmdir(ctx, root, "dir"), syscall.ENOTDIR)
	want(t, f.Rename(ctx, root, "p", root, "file"), 0) // in place of the link
	want(t, f.Remove(ctx, root, "dir"), 0)
	st, err := os.Stat(secret)
	if b, _ := os.ReadFile(secret); err != nil || string(b) != "secret" || st.Mode().Perm() != 0o600 || time.Since(st.ModTime()) > time.Hour {
		t.Errorf("%q %v %v", b, st, err)
	}
}

// TestSwappedLinks: while everything is done to a file and in a directory, somebody swaps them with links to others outside. Those are
// never read and never changed.
func TestSwappedLinks(t *testing.T) {
	dir, out := tempDir(t), tempDir(t)
	secret := bytes.Repeat([]byte("secret"), 100)
	if err := errors.Join(os.WriteFile(filepath.Join(out, "x"), secret, 0o600), os.Mkdir(filepath.Join(out, "sub"), 0o700)); err != nil {
		t.Fatal(err)
	}
	f := mustOpen(t, dir, Options{OpenFiles: 1}) // so that everything is opened anew
	root := f.Root()
	d := mkdir(t, f, root, "d")
	create(t, f, d, "x", "mine")
	mkdir(t, f, d, "sub")
	if err := errors.Join(os.Symlink(out, dataFile(dir, "link")), os.Symlink(filepath.Join(out, "x"), dataFile(dir, "filelink"))); err != nil {
		t.Fatal(err)
	}
	swap := func(a, b string) {
		if err := unix.Renameat2(unix.AT_FDCWD, dataFile(dir, a), unix.AT_FDCWD, dataFile(dir, b), unix.RENAME_EXCHANGE); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			swap("d", "link")
			swap("d", "link")
			swap("d/x", "filelink")
			swap("d/x", "filelink")
		}
	})
	done := 0
	buf := make([]byte, 1000)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		for _, step := range []func() error{
			func() error {
				id, err := f.Lookup(ctx, d, "x")
				if err != nil {
					return err
				}
				n, err := f.ReadAt(ctx, id, buf, 0)
				if strings.Contains(string(buf[:n]), "secret") {
					t.Fatal("read what lies outside")
				}
				if n > 0 {
					done++
				}
				return errors.Join(second(f.WriteAt(ctx, id, []byte("mine"), 0)), f.SetAttr(ctx, id, nfs.Change{Mode: ptr(uint32(0o644)), Size: ptr(int64(4))}), second(f.Attr(ctx, id)))
			},
			func() error { return second(f.Create(ctx, d, "made", nfs.Creation{})) },
			func() error { return second(f.Create(ctx, d, "x", nfs.Creation{Set: nfs.Change{Size: new(int64)}})) },
			func() error { return f.Remove(ctx, d, "made") },
			func() error { return second(f.Mkdir(ctx, d, "sub", nfs.Change{})) },
			func() error { return f.Rmdir(ctx, d, "sub") },
			func() error { return second(f.Lookup(ctx, root, "d")) },
			func() error {
				for e, err := range f.ReadDir(ctx, d, 0) {
					if err != nil {
						return err
					}
					_ = e
				}
				return nil
			},
		} {
			step() // errors are what is to be expected
		}
	}
	stop.Store(true)
	wg.Wait()
	if done == 0 {
		t.Error("nothing was ever read")
	}
	t.Logf("%d times read", done)
	b, err := os.ReadFile(filepath.Join(out, "x"))
	if err != nil || !bytes.Equal(b, secret) {
		t.Error("a file outside was changed", err)
	}
	st, err := os.Stat(filepath.Join(out, "x"))
	entries, _ := os.ReadDir(out)
	if err != nil || st.Mode().Perm() != 0o600 || len(entries) != 2 {
		t.Error("outside things changed:", st.Mode(), entries, err)
	}
}
