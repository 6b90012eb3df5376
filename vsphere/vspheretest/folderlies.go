package vspheretest

import (
	"fmt"
	"net/http"
	"strings"
	"time"
)

// folderLies are what goes wrong with one request.
type folderLies struct {
	delay      time.Duration
	status     int
	cut        int64 // bytes after which the connection is dropped; negative for never
	short      bool
	wrongRange bool
	wholeFile  bool
}

func (s *Server) folderFaults(datastore, file string) folderLies {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.faults
	l := folderLies{delay: f.FolderDelay, cut: -1}
	switch {
	case f.NoFolder[datastore] && strings.HasSuffix(file, ".vmdk"):
		l.status = http.StatusNotFound
	case take(&f.FolderFails):
		l.status = f.FolderStatus
	case take(&f.FolderCuts):
		l.cut = f.FolderCut
	case take(&f.FolderShort):
		l.short = true
	case take(&f.WrongRange):
		l.wrongRange = true
	case take(&f.FolderIgnores):
		l.wholeFile = true
	}
	return l
}

// folderWriter counts, and cuts.
type folderWriter struct {
	http.ResponseWriter
	s     *Server
	file  string
	lies  folderLies
	left  int64 // of a body that ends early
	begun bool
}

// WriteHeader implements http.ResponseWriter.
func (w *folderWriter) WriteHeader(status int) {
	w.begun = true
	h := w.Header()
	var from, to, size, n int64
	_, _ = fmt.Sscanf(h.Get("Content-Range"), "bytes %d-%d/%d", &from, &to, &size)
	_, _ = fmt.Sscan(h.Get("Content-Length"), &n)
	if f := w.s.getHooks().OnRead; f != nil && status < 300 {
		f(w.file, from, n)
	}
	w.left = n
	switch {
	case w.lies.wrongRange && status == http.StatusPartialContent:
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from+sector, to+sector, size))
	case w.lies.short:
		w.left = n / 2
		h.Set("Content-Length", fmt.Sprint(w.left))
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *folderWriter) Write(p []byte) (int, error) {
	if !w.begun {
		w.WriteHeader(http.StatusOK)
	}
	n := len(p)
	if w.lies.short {
		p = p[:min(int64(n), w.left)]
	}
	w.left -= int64(len(p))
	if w.lies.cut >= 0 && int64(len(p)) >= w.lies.cut {
		w.send(p[:w.lies.cut])
		if f, ok := w.ResponseWriter.(http.Flusher); ok {
			f.Flush()
		}
		panic(http.ErrAbortHandler) // drops the connection
	}
	if w.lies.cut >= 0 {
		w.lies.cut -= int64(len(p))
	}
	if err := w.send(p); err != nil {
		return 0, err
	}
	return n, nil
}

func (w *folderWriter) send(p []byte) error {
	n, err := w.ResponseWriter.Write(p)
	w.s.count(func(c *counters) { c.folder[w.file] += int64(n) })
	return err
}
