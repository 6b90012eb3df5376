package folder

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/cespare/xxhash/v2"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// A listing goes in the order of places, hashes of names. Names of the same hash, and those that they push, have the places that follow, in the order of
// the names; only then a place depends on which other names there are. A cookie is a place with a check, by which a cookie of nowhere is known:
//
//	0 | place, 47 bits | check, 16 bits
const (
	hashBits  = 46
	checkBits = 16
)

// line is a name at its place.
type line struct {
	place uint64
	name  string
}

func hashOf(name string) uint64 { return xxhash.Sum64String(name)>>(64-hashBits) + 1 }

// cookieOf gives the cookie of a place in a directory.
func cookieOf(dir nfs.ID, place uint64) uint64 {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[:], dir.File)
	binary.LittleEndian.PutUint64(b[8:], dir.Generation)
	binary.LittleEndian.PutUint64(b[16:], place)
	return place<<checkBits | xxhash.Sum64(b[:])>>(64-checkBits)
}

// placesOf puts names, of which some may be there twice, at their places.
func placesOf(names []string, hash func(string) uint64) []line {
	lines := make([]line, len(names))
	for i, name := range names {
		lines[i] = line{hash(name), name}
	}
	slices.SortFunc(lines, func(a, b line) int { return cmp.Or(cmp.Compare(a.place, b.place), cmp.Compare(a.name, b.name)) })
	lines = slices.CompactFunc(lines, func(a, b line) bool { return a.name == b.name })
	for i := 1; i < len(lines); i++ {
		lines[i].place = max(lines[i].place, lines[i-1].place+1)
	}
	return lines
}

// Listings are kept for clients that read them page by page. Each one that begins reads the directory again.
const (
	maxLists = 8
	maxLines = 200_000 // of all listings that are kept, about 50 bytes each
	listAge  = 10 * time.Second
)

// lists are listings of directories.
type lists struct {
	mu   sync.Mutex // guards following
	seq  uint64     // of the last one that began
	kept []listing  // the newest last
}

// listing is a directory as it was.
type listing struct {
	dir   nfs.ID
	seq   uint64
	at    time.Time
	lines []line
}

// get gives the listing of a directory, if it is not too old.
func (l *lists) get(dir nfs.ID, now time.Time) ([]line, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, x := range l.kept {
		if x.dir == dir && now.Sub(x.at) < listAge {
			return x.lines, true
		}
	}
	return nil, false
}

// begin numbers a listing that is to be read now.
func (l *lists) begin() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	return l.seq
}

// put keeps a listing, but not in place of one that began later.
func (l *lists) put(x listing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, was := range l.kept {
		if was.dir == x.dir {
			if was.seq > x.seq {
				return
			}
			l.kept = slices.Delete(l.kept, i, i+1)
			break
		}
	}
	l.kept = append(l.kept, x)
	lines := 0
	for i := len(l.kept) - 1; i >= 0; i-- {
		if lines += len(l.kept[i].lines); lines > maxLines || len(l.kept)-i > maxLists {
			l.kept = slices.Delete(l.kept, 0, i+1)
			return
		}
	}
}

// ReadDir is that of nfs.FS.
func (f *Folder) ReadDir(ctx context.Context, dir nfs.ID, after uint64) iter.Seq2[nfs.Entry, error] {
	return func(yield func(nfs.Entry, error) bool) {
		lines, err := f.list(dir, after)
		if err != nil {
			yield(nfs.Entry{}, err)
			return
		}
		for _, l := range lines {
			id, err := f.entry(dir, l.name)
			if errors.Is(err, syscall.ENOENT) {
				continue // gone, or not shown
			}
			if err == nil {
				err = ctx.Err()
			}
			if !yield(nfs.Entry{Name: l.name, ID: id, Cookie: cookieOf(dir, l.place)}, err) || err != nil {
				return
			}
		}
	}
}

// list gives what comes after the cookie.
func (f *Folder) list(dir nfs.ID, after uint64) ([]line, error) {
	if err := f.enter(); err != nil {
		return nil, err
	}
	defer f.gate.RUnlock()
	d, err := f.openDir(dir)
	if err != nil {
		return nil, err
	}
	defer f.release(d)
	place := after >> checkBits
	if after != 0 && cookieOf(dir, place) != after {
		return nil, syscall.EINVAL
	}
	now := f.now()
	lines, ok := f.lists.get(dir, now)
	if !ok || after == 0 {
		x := listing{dir: dir, seq: f.lists.begin(), at: now}
		if x.lines, err = f.readDir(d); err != nil {
			return nil, err
		}
		f.lists.put(x)
		lines = x.lines
	}
	i, _ := slices.BinarySearchFunc(lines, place+1, func(l line, place uint64) int { return cmp.Compare(l.place, place) })
	return lines[i:], nil
}

// readDir reads the names of a directory, placed ones included.
func (f *Folder) readDir(d *handle) ([]line, error) {
	// A file that is renamed or placed meanwhile must not be missed: its name changes with both locks held.
	f.mu.RLock()
	names, err := namesIn(d.fd)
	names = append(names, f.slotsIn(d.id)...)
	f.mu.RUnlock()
	return placesOf(names, hashOf), err
}

// entry finds a name that was listed.
func (f *Folder) entry(dir nfs.ID, name string) (nfs.ID, error) {
	if err := f.enter(); err != nil {
		return nfs.ID{}, err
	}
	defer f.gate.RUnlock()
	d, err := f.openDir(dir)
	if err != nil {
		return nfs.ID{}, err
	}
	defer f.release(d)
	return f.lookup(d, name)
}
