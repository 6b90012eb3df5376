// Package nfsmount mounts NFS exports by libnfs, a client that is not ours, for tests: a small C program that they compile. The kernels
// of some machines have no NFS client.
package nfsmount

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

//go:embed testdata/nfsmount.c
var source []byte

// program compiles it, once for all tests of a user.
var program = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	sum := sha256.Sum256(source)
	out := filepath.Join(cache, "holdfast-test", fmt.Sprintf("nfsmount-%x", sum[:8]))
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o700); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(filepath.Dir(out), "nfsmount-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	file, made := filepath.Join(dir, "nfsmount.c"), filepath.Join(dir, "nfsmount")
	if err := os.WriteFile(file, source, 0o600); err != nil {
		return "", err
	}
	cmd := exec.Command("gcc", "-O1", "-Wall", "-D_FILE_OFFSET_BITS=64", "-o", made, file, "-lnfs", "-lfuse3")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return "", &compileError{said.String(), err}
	}
	return out, os.Rename(made, out)
})

type compileError struct {
	said string
	err  error
}

func (e *compileError) Error() string { return e.err.Error() + ": " + e.said }

// Mount mounts an export: nfs://HOST/PATH, with ?nfsport= and &mountport= where there is no portmapper. It ends with the test, or when unmount is called.
// enter are words before the program, such as those of nsenter; the mount is seen outside all the same.
func Mount(t testing.TB, enter []string, url string) (dir string, unmount func()) {
	t.Helper()
	dir, unmount, err := Try(t, enter, url)
	var missing *compileError
	if errors.As(err, &missing) && os.Getenv("HOLDFAST_TEST_ALL") != "1" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir, unmount
}

// Try is Mount, for any goroutine.
func Try(t testing.TB, enter []string, url string) (dir string, unmount func(), err error) {
	file, err := program()
	if err != nil {
		return "", nil, err
	}
	// Not t.TempDir: that is removed through the mount when it cannot be unmounted.
	if dir, err = os.MkdirTemp("", "nfs-"); err != nil {
		return "", nil, err
	}
	words := append(append([]string{}, enter...), file, url, dir, "-f", "-s", "-o", "allow_other,default_permissions,attr_timeout=0,entry_timeout=0,negative_timeout=0")
	cmd := exec.Command(words[0], words[1:]...)
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var before, after syscall.Stat_t
	err = syscall.Stat(dir, &before)
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		os.Remove(dir)
		return "", nil, err
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	unmount = sync.OnceFunc(func() {
		syscall.Unmount(dir, syscall.MNT_DETACH)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			cmd.Process.Kill()
			<-ended
		}
		os.Remove(dir)
	})
	t.Cleanup(unmount)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err := syscall.Stat(dir, &after); err == nil && after.Dev != before.Dev {
			return dir, unmount, nil
		}
		select {
		case <-ended:
			unmount()
			return "", nil, fmt.Errorf("nfsmount %s: %s", url, said.String())
		default:
		}
		if time.Now().After(end) {
			unmount()
			return "", nil, fmt.Errorf("nfsmount %s does not mount: %s", url, said.String())
		}
	}
}
