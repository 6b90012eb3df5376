package vspheretest

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/vmware/govmomi/simulator"
)

// serveFolder is /folder/PATH?dcPath=...&dsName=..., the files of a datastore (vSphere Web Services SDK Programming Guide,
// "HTTP Access to vSphere Server Files").
func (s *Server) serveFolder(w http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		return
	}
	defer s.end()
	s.count(func(c *counters) { c.reads.add("", 1) })
	defer s.count(func(c *counters) { c.reads.add("", -1) })
	if !s.authenticated(r) {
		w.Header().Set("WWW-Authenticate", `Basic realm="VMware HTTP server"`)
		http.Error(w, "", http.StatusUnauthorized)
		return
	}
	file := strings.TrimPrefix(r.URL.Path, "/folder/")
	ds, err := s.datastore(r.URL.Query().Get("dsName"))
	if err != nil || r.URL.Query().Get("dsName") == "" || !s.isDatacenter(ds, r.URL.Query().Get("dcPath")) || strings.Contains(file, "..") {
		http.NotFound(w, r)
		return
	}
	if s.isDenied(browse) || s.isDenied(lowLevel) {
		http.Error(w, "", http.StatusForbidden)
		return
	}
	lies := s.folderFaults(ds.Name, file)
	s.sleep(lies.delay)
	if lies.status != 0 {
		http.Error(w, "", lies.status)
		return
	}
	dir := &directory{datastore: ds.Name, root: ds.Summary.Url, path: path.Dir(file)}
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		s.getFile(w, r, dir, path.Base(file), lies)
	case http.MethodPut, http.MethodPost:
		s.putFile(w, r, dir, path.Base(file))
	case http.MethodDelete:
		s.deleteFile(w, r, dir, path.Base(file))
	default:
		http.Error(w, "", http.StatusMethodNotAllowed)
	}
}

// isDatacenter says whether a path names the datacenter of a datastore. A host that is asked itself has but one, and needs no name.
func (s *Server) isDatacenter(ds *simulator.Datastore, name string) bool {
	return strings.Trim(name, "/") == s.datacenterOf(ds.Self).Name || s.opt.ESX && name == ""
}

// owner finds the VM whose disk a file belongs to.
func (s *Server) owner(dir *directory, name string) (*VM, *disk, *layer) {
	for _, vm := range s.allVMs() {
		vm.mu.Lock()
		d, l := vm.layerAt(dir.root, path.Join(dir.path, name))
		vm.mu.Unlock()
		if l != nil {
			return vm, d, l
		}
	}
	return nil, nil, nil
}

// prepare makes a file of a disk readable, or says that it is locked: what a running VM writes to.
func (s *Server) prepare(dir *directory, name string) (locked bool, err error) {
	vm, d, l := s.owner(dir, name)
	if vm == nil {
		return false, nil
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if name != l.extent() {
		return false, nil // the descriptor
	}
	if vm.on && d.active == l {
		return true, nil
	}
	return false, l.flush()
}

func (s *Server) getFile(w http.ResponseWriter, r *http.Request, dir *directory, name string, lies folderLies) {
	locked, err := s.prepare(dir, name)
	if locked || err != nil {
		http.Error(w, fmt.Sprint(err), http.StatusInternalServerError)
		return
	}
	f, err := os.Open(dir.file(name))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.IsDir() {
		http.NotFound(w, r)
		return
	}
	if lies.wholeFile {
		r.Header.Del("Range")
	}
	out := &folderWriter{ResponseWriter: w, s: s, file: dir.ref(name), lies: lies}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(out, r, "", st.ModTime(), f)
}

func (s *Server) putFile(w http.ResponseWriter, r *http.Request, dir *directory, name string) {
	if s.spaceFault() != nil {
		http.Error(w, "no space left on the datastore", http.StatusInternalServerError)
		return
	}
	vm, d, l := s.owner(dir, name)
	if vm != nil && name == l.extent() {
		s.putDisk(w, r, vm, d, l)
		return
	}
	if err := os.MkdirAll(dir.file(""), 0o700); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if err := store(dir.file(name), r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
}

// store writes a file; it has the whole of it or is not there.
func store(file string, from io.Reader) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".put-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := copyHoles(f, from); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

// copyHoles copies to the end, and leaves holes for zeros.
func copyHoles(f *os.File, from io.Reader) error {
	b := make([]byte, unit)
	var off int64
	for {
		n, err := io.ReadFull(from, b)
		if !isZero(b[:n]) {
			if _, err := f.WriteAt(b[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return f.Truncate(off)
		case err != nil:
			return err
		}
	}
}

// putDisk replaces the bytes of a disk that no running VM and no snapshot has.
func (s *Server) putDisk(w http.ResponseWriter, r *http.Request, vm *VM, d *disk, l *layer) {
	tmp, err := os.CreateTemp(s.scratch, "put-*")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if err := copyHoles(tmp, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	st, err := tmp.Stat()
	switch {
	case err != nil, vm.on, d.active != l, l.isDelta(), st.Size() > d.size:
		http.Error(w, "the file is in use, or larger than the disk", http.StatusInternalServerError)
		return
	}
	if err := d.load(tmp); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
}

// load replaces all bytes of a disk without snapshots. Its change tracking knows nothing of that, and begins anew.
func (d *disk) load(from io.ReaderAt) error {
	if err := copySparse(d.active.raw, from, d.size); err != nil {
		return err
	}
	if d.track != nil {
		d.track = newTracking()
	}
	return d.scan()
}

func (s *Server) deleteFile(w http.ResponseWriter, r *http.Request, dir *directory, name string) {
	if vm, _, _ := s.owner(dir, name); vm != nil {
		http.Error(w, "the file is in use", http.StatusInternalServerError)
		return
	}
	if err := os.Remove(dir.file(name)); err != nil {
		http.NotFound(w, r)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
