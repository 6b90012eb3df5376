package extract

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store"
)

// Source is a node of the tree and the name that its copy gets, without "/".
type Source struct {
	Name string
	Node fs.Node
}

// Options of a copy. The zero value is the default.
type Options struct {
	// Report is told of everything that was dealt with, of one thing at a time. It may be nil.
	Report func(Item)
	// Done is told the bytes dealt with as they are, from several goroutines. It may be nil.
	Done func(n int64)
	// Walked is told once how many bytes there are in all. It may be nil.
	Walked func(total int64)
	// Mark has a directory that is made for a source say that it is unfinished until it is complete: see Unfinished.
	Mark bool
	// Skip leaves entries of directories out. It may be nil.
	Skip func(dir fs.Dir, name string) bool
}

// Item is what became of one node.
type Item struct {
	Path  string // in the copy
	Kind  fs.Kind
	Size  int64 // bytes, of a file
	There bool  // it was there already
	// Err says why it was left out or, with Kept, what of it.
	Err  error
	Kept bool
}

// Result sums a copy up.
type Result struct {
	Files, Dirs, Symlinks, HardLinks, Specials int64
	Bytes                                      int64 // of files, holes included
	There                                      int64 // of all these: what was there already
	Failed                                     int64 // left out, or incomplete
	Damaged                                    int64 // of those: because of damage
	// First is the first failure.
	First error
	// Lost counts what the target could not take, by what it is: "owner", "device", "xattr trusted.x: operation not permitted".
	Lost map[string]int64
}

// Things is how many nodes were copied.
func (r *Result) Things() int64 { return r.Files + r.Dirs + r.Symlinks + r.HardLinks + r.Specials }

// ErrExists: something else is there under that name. Nothing is overwritten.
var ErrExists = errors.New("exists already and is something else")

// Bounds of a copy.
const (
	pieceBytes = 1 << 20 // what is read and written at once
	holeBytes  = 4096    // how finely holes are kept
	// maxDepth is how many directories may be nested, each of which takes a file descriptor while it is copied.
	maxDepth = 800
	// maxLinked is how many inodes are remembered of which not all names have been seen, about 400 bytes each. Further ones
	// are copied for each name.
	maxLinked = 1 << 18
	// maxLost is how many different losses are told apart: a guest chooses the names of its attributes.
	maxLost = 50
)

// IsDamage reports whether an error is about damage, of the repository or of the guest's file system.
func IsDamage(err error) bool {
	return errors.Is(err, store.ErrDamaged) || errors.Is(err, guest.ErrDamaged)
}

// ends reports whether an error concerns all that is still to be copied.
func ends(err error) bool {
	for _, e := range []error{context.Canceled, context.DeadlineExceeded, unix.ENOSPC, unix.EDQUOT, unix.EROFS, errStream} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// workers is how many files are copied at a time: more than there are processors, as file systems make them wait.
func workers() int { return min(max(4, 2*runtime.GOMAXPROCS(0)), 16) }

// buffers hands out a bounded number of buffers of pieceBytes.
type buffers chan []byte

func newBuffers(n int) buffers {
	b := make(buffers, n)
	for range n {
		b <- nil
	}
	return b
}

func (b buffers) get(ctx context.Context) ([]byte, error) {
	select {
	case p := <-b:
		if p == nil {
			p = make([]byte, pieceBytes)
		}
		return p, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (b buffers) put(p []byte) { b <- p }

// tally counts what became of everything.
type tally struct {
	Options

	mu sync.Mutex // guards following
	r  Result
}

func newTally(opt Options) *tally { return &tally{Options: opt, r: Result{Lost: map[string]int64{}}} }

func (t *tally) done(n int64) {
	if t.Done != nil && n != 0 {
		t.Done(n)
	}
}

func (t *tally) report(i Item) {
	if t.Report != nil {
		t.Report(i)
	}
}

// copied counts a node that is there now.
func (t *tally) copied(f *found, hardLink, there bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case hardLink:
		t.r.HardLinks++
	case f.attr.Kind == fs.KindDir:
		t.r.Dirs++
	case f.attr.Kind == fs.KindFile:
		t.r.Files++
		t.r.Bytes += f.attr.Size
	case f.attr.Kind == fs.KindLink:
		t.r.Symlinks++
	default:
		t.r.Specials++
	}
	if there {
		t.r.There++
	}
	if f.attr.Kind == fs.KindDir {
		return // too many, and what is in it says so
	}
	t.report(Item{Path: f.path(), Kind: f.attr.Kind, Size: f.attr.Size, There: there})
}

// fail counts a node that was left out; kept says that only a part of it was.
func (t *tally) fail(path string, err error, kept bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.r.Failed++
	if IsDamage(err) {
		t.r.Damaged++
	}
	if t.r.First == nil {
		t.r.First = err
	}
	t.report(Item{Path: path, Err: err, Kept: kept})
}

// lost counts what the target could not take of a node.
func (t *tally) lost(what string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.r.Lost[what]; !ok && len(t.r.Lost) >= maxLost {
		what = "others"
	}
	t.r.Lost[what]++
}

// checkName refuses what no directory can have in it.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return guest.Damaged("an entry has the name %q", name)
	}
	return nil
}

// kindNames are words for what a target may not take.
var kindNames = map[fs.Kind]string{fs.KindChar: "device", fs.KindBlock: "device", fs.KindFIFO: "FIFO", fs.KindSocket: "socket"}

// found is a node that a walk came upon.
type found struct {
	at   *place // the directory that it is in
	name string
	node fs.Node
	attr fs.Attr
}

func (f *found) path() string { return f.at.path(f.name) }

// mode is permissions as in inode(7).
func (f *found) mode() uint32 {
	switch {
	case f.attr.Guest != nil:
		return f.attr.Guest.Mode & 0o7777
	case f.attr.Kind == fs.KindDir:
		return 0o755
	case f.attr.Kind == fs.KindLink:
		return 0o777
	}
	return 0o644
}

// xattrs gives the extended attributes.
func (f *found) xattrs(ctx context.Context) ([]guest.Xattr, error) {
	x, ok := f.node.(fs.Xattrer)
	if !ok {
		return nil, nil
	}
	list, err := x.Xattrs(ctx)
	return slices.DeleteFunc(list, func(a guest.Xattr) bool { return !a.Listed() }), err
}

// linked reports whether the node may have further names.
func (f *found) linked() bool {
	return f.attr.Guest != nil && f.attr.Guest.Nlink > 1 && f.attr.Kind != fs.KindDir
}

// place is a directory of the copy.
type place struct {
	parent *place
	name   string
	inode  uint64
	depth  int
	open   *openDir        // of a copy to a directory; nil in a stream
	links  map[string]bool // of a stream: the names of symbolic links so far
}

// path is that of an entry, below the destination.
func (p *place) path(name string) string {
	n := len(name)
	for q := p; q.parent != nil; q = q.parent {
		n += len(q.name) + 1
	}
	b := make([]byte, n)
	n -= copy(b[n-len(name):], name)
	for q := p; q.parent != nil; q = q.parent {
		n--
		b[n] = '/'
		n -= copy(b[n-len(q.name):], q.name)
	}
	return string(b)
}

// sink takes what a walk finds. An error ends the walk; what concerns one node only is counted, not returned.
type sink interface {
	// enter begins a directory; nil when there is no going into it.
	enter(ctx context.Context, f *found) (*place, error)
	leave(ctx context.Context, p *place)
	put(ctx context.Context, f *found) error
}

// walk goes through the sources in order.
func (t *tally) walk(ctx context.Context, s sink, top *place, sources []Source) error {
	w := &walker{tally: t, sink: s}
	for _, src := range sources {
		if h, ok := src.Node.(interface {
			Hold(context.Context) (func(), error)
		}); ok {
			release, err := h.Hold(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", src.Name, err)
			}
			defer release()
		}
		if err := w.visit(ctx, top, src.Name, src.Node); err != nil {
			return err
		}
	}
	if t.Walked != nil {
		t.Walked(w.total)
	}
	return nil
}

type walker struct {
	*tally
	sink  sink
	total int64 // bytes
}

// visit deals with a node and all below it.
func (w *walker) visit(ctx context.Context, at *place, name string, n fs.Node) error {
	a, err := n.Attr(ctx)
	if err == nil {
		err = checkName(name)
	}
	if err != nil {
		return w.skip(at, name, err)
	}
	f := &found{at, name, n, a}
	d, ok := n.(fs.Dir)
	if !ok {
		if a.Kind == fs.KindFile {
			w.total += a.Size
		}
		return w.sink.put(ctx, f)
	}
	for p := at; p != nil; p = p.parent {
		if p.inode == a.Inode {
			return w.skip(at, name, guest.Damaged("a directory is in itself"))
		}
	}
	if at.depth >= maxDepth {
		return w.skip(at, name, fmt.Errorf("more than %d nested directories", maxDepth))
	}
	p, err := w.sink.enter(ctx, f)
	if p == nil || err != nil {
		return err
	}
	defer w.sink.leave(ctx, p)
	return w.list(ctx, d, p)
}

// list visits what is in a directory.
func (w *walker) list(ctx context.Context, d fs.Dir, p *place) error {
	entries := func(yield func(fs.Entry, error) bool) {
		list, err := d.Entries(ctx)
		for _, e := range list {
			if !yield(e, nil) {
				return
			}
		}
		if err != nil {
			yield(fs.Entry{}, err)
		}
	}
	if l, ok := d.(fs.Lister); ok {
		entries = l.List(ctx)
	}
	for e, err := range entries {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return w.skip(p.parent, p.name, fmt.Errorf("list the directory: %w", err))
		}
		if w.Skip != nil && w.Skip(d, e.Name) {
			continue
		}
		if err := w.child(ctx, d, p, e.Name); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) child(ctx context.Context, d fs.Dir, p *place, name string) error {
	if err := checkName(name); err != nil {
		return w.skip(p, name, err)
	}
	n, err := d.Lookup(ctx, name)
	if err != nil {
		return w.skip(p, name, err)
	}
	return w.visit(ctx, p, name, n)
}

// skip counts a failure, and gives it back when it ends everything.
func (t *tally) skip(at *place, name string, err error) error {
	if ends(err) {
		return err
	}
	t.fail(at.path(name), err, false)
	return nil
}
