package fuse

import (
	"iter"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfast-backup/holdfast/fs"
)

// listing is an open directory, which is listed as it is read.
type listing struct {
	id  uint64
	dir fs.Dir

	mu sync.Mutex
	// guards following
	next func() (fs.Entry, error, bool)
	stop func()
	cur  fs.Entry
	off  uint64 // of cur; 0 before the first
	over bool   // there is nothing behind off
}

// entries lists any directory.
func entries(dir fs.Dir) iter.Seq2[fs.Entry, error] {
	if l, ok := dir.(fs.Lister); ok {
		return l.List(ctx)
	}
	return func(yield func(fs.Entry, error) bool) {
		list, err := dir.Entries(ctx)
		if err != nil {
			yield(fs.Entry{}, err)
			return
		}
		for _, e := range list {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// seek makes cur the entry behind off. It is false at the end.
func (l *listing) seek(off uint64) (bool, error) {
	switch {
	case l.next != nil && l.off == off+1: // it found no room in the last answer
		return true, nil
	case l.over && off >= l.off:
		return false, nil
	}
	if l.next == nil || off < l.off {
		l.end()
		l.next, l.stop = iter.Pull2(entries(l.dir))
		l.off = 0
	}
	for {
		e, err, ok := l.next()
		if err != nil || !ok {
			l.end()
			l.over = err == nil
			return false, err
		}
		l.cur = e
		if l.off++; l.off > off {
			return true, nil
		}
	}
}

// end forgets how far the listing came.
func (l *listing) end() {
	if l.stop != nil {
		l.stop()
	}
	l.next, l.stop, l.over = nil, nil, false
}

// OpenDir implements fuse.RawFileSystem.
func (s *server) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	dir := s.nodes.dir(in.NodeId)
	if dir == nil {
		return stale
	}
	out.Fh = s.handles.add(&listing{id: in.NodeId, dir: dir})
	return fuse.OK
}

// ReleaseDir implements fuse.RawFileSystem.
func (s *server) ReleaseDir(in *fuse.ReleaseIn) {
	if l, ok := s.handles.remove(in.Fh).(*listing); ok {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.end()
	}
}

// ReadDir implements fuse.RawFileSystem.
func (s *server) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.list(in, func(l *listing, e fuse.DirEntry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus implements fuse.RawFileSystem.
func (s *server) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.list(in, func(l *listing, e fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		var st fuse.Status
		if l.cur.Guest.IsZero() {
			st = s.Lookup(nil, &fuse.InHeader{NodeId: l.id}, e.Name, entry)
		} else {
			entry.SetEntryTimeout(immutableTTL)
			st = s.tell(l.cur.Guest.Node(), entry)
		}
		if !st.Ok() {
			*entry = fuse.EntryOut{} // the kernel asks for it by itself when somebody wants it
		}
		return true
	})
}

// list fills an answer with entries.
func (s *server) list(in *fuse.ReadIn, add func(*listing, fuse.DirEntry) bool) fuse.Status {
	l, ok := s.handles.get(in.Fh).(*listing)
	if !ok {
		return stale
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for off := in.Offset; ; off++ {
		more, err := l.seek(off)
		if err != nil && off == in.Offset {
			return s.status(err)
		}
		if err != nil || !more {
			return fuse.OK // the next request has the error
		}
		e := fuse.DirEntry{Name: l.cur.Name, Ino: l.cur.Inode, Mode: modeOf(l.cur.Kind), Off: l.off}
		if !add(l, e) {
			return fuse.OK
		}
	}
}
