package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// Listen listens on unix:PATH, HOST:PORT or :PORT. A socket file is for its
// owner alone (mode 0600) and goes when the listener is closed; one left over by
// a process that is gone is replaced.
func Listen(addr string) (net.Listener, error) {
	path, unix := strings.CutPrefix(addr, "unix:")
	if !unix {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("nbd: %w", err)
		}
		return ln, nil
	}
	ln, err := listenUnix(path)
	if errors.Is(err, syscall.EADDRINUSE) && removeStale(path) {
		ln, err = listenUnix(path)
	}
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	return ln, nil
}

func listenUnix(path string) (net.Listener, error) {
	lc := net.ListenConfig{Control: ownerOnly}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil { // where ownerOnly has no effect
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// removeStale removes the socket file at path if nobody listens on it.
func removeStale(path string) bool {
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Type() != fs.ModeSocket {
		return false
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return false
	}
	return errors.Is(err, syscall.ECONNREFUSED) && os.Remove(path) == nil
}
