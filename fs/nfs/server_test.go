package nfs_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// errorLog collects what a server logs.
type errorLog struct {
	mu   sync.Mutex
	errs []error // guarded by mu
}

func (l *errorLog) add(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

func (l *errorLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprint(l.errs)
}

// has fails when nothing with the words in it is logged, also not soon; what has them is not an error any more.
func (l *errorLog) has(t *testing.T, words string) {
	t.Helper()
	for range 200 {
		if l.take(words) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("nothing with %q was logged: %s", words, l.text())
}

// take removes what has the words in it, and says whether there was any.
func (l *errorLog) take(words string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.errs)
	l.errs = slices.DeleteFunc(l.errs, func(err error) bool { return strings.Contains(err.Error(), words) })
	return len(l.errs) < n
}

// A running server that a test talks to.
type running struct {
	*nfs.Server
	t      *testing.T
	log    *errorLog
	served chan error // what Serve returned
}

// serve starts s on a free port, or the one given, and stops it when the test
// ends. What it logged then is an error.
func serve(t *testing.T, s *nfs.Server, exports ...nfs.Export) *running {
	t.Helper()
	return serveAt(t, "127.0.0.1:0", s, exports...)
}

func serveAt(t *testing.T, addr string, s *nfs.Server, exports ...nfs.Export) *running {
	t.Helper()
	r := &running{s, t, &errorLog{}, make(chan error, 1)}
	s.Log = r.log.add
	for _, x := range exports {
		if err := s.Export(x); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Listen(addr); err != nil {
		t.Fatal(err)
	}
	go func() { r.served <- s.Serve(context.Background()) }()
	t.Cleanup(func() {
		r.stop()
		if text := r.log.text(); text != "[]" {
			t.Errorf("logged: %s", text)
		}
	})
	return r
}

// stop may be called twice.
func (r *running) stop() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := r.Shutdown(ctx); err != nil {
		r.t.Errorf("Shutdown: %v", err)
	}
	if err := <-r.served; err != nil {
		r.t.Errorf("Serve: %v", err)
	}
	r.served <- nil
}

func (r *running) addr() string { return r.Addr().String() }

// dial gives a client that is closed when the test ends.
func (r *running) dial(cred *nfstest.Cred) *nfstest.Client {
	r.t.Helper()
	c, err := nfstest.Dial(r.addr(), cred)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// share is a writable export without squashing.
func share(fs nfs.FS) nfs.Export {
	return nfs.Export{Path: "/ds", ID: 77, FS: fs, Writable: true, NoRootSquash: true}
}

// mounted serves fs, and gives root's client and the handle of the root.
func mounted(t *testing.T, fs nfs.FS) (*running, *nfstest.Client, nfstest.FH) {
	t.Helper()
	r := serve(t, &nfs.Server{}, share(fs))
	c := r.dial(nfstest.Root)
	return r, c, must(c.Mount("/ds"))(t)
}

// must fails the test when there is an error.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// wants fails the test when an error is not the one that is wanted.
func wants(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func wantsRPC(t *testing.T, what string, err error, want nfstest.RPCError) {
	t.Helper()
	var e *nfstest.RPCError
	if !errors.As(err, &e) || *e != want {
		t.Errorf("%s: %v, want %+v", what, err, want)
	}
}

// TestSmoke writes a file and reads it.
func TestSmoke(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	f := must(c.Create(root, "a", true, &nfstest.Sattr{}))(t)
	w := must(c.Write(f.FH, 3, []byte("hello"), nfstest.FileSync))(t)
	if w.Count != 5 || w.Committed != nfstest.FileSync {
		t.Errorf("%+v", w)
	}
	d := must(c.Read(f.FH, 0, 100))(t)
	if string(d.P) != "\x00\x00\x00hello" || !d.EOF {
		t.Errorf("%+v", d)
	}
}
