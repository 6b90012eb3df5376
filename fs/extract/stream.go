package extract

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// errStream: the archive could not be written, or a file in it could not be read to its end.
var errStream = errors.New("the archive is incomplete")

// archive is a kind of stream.
type archive interface {
	// begin writes the head of an entry, named path, and gives what takes its content, of a file. linkTo is an earlier entry
	// of the same inode or "". With errLeftOut nothing was written.
	begin(ctx context.Context, f *found, path, linkTo string) (io.Writer, error)
	// close ends the stream.
	close() error
}

// errLeftOut: the target has nothing for such a node, or we may not make it.
var errLeftOut = errors.New("the target cannot hold it")

// sticky is the output, and the first error of writing to it.
type sticky struct {
	w   *bufio.Writer
	err error
}

func (s *sticky) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	if s.err == nil {
		s.err = err
	}
	return n, err
}

// Bounds of reading ahead, and of what is written at once.
const (
	outBytes     = 256 << 10
	aheadEntries = 64
	aheadBytes   = 32 // buffers of pieceBytes, in all
)

// streamSink writes an archive: one walker, several readers, one writer.
type streamSink struct {
	*tally
	out     *sticky
	archive archive
	queue   chan *entry // in order
	load    chan *entry
	bufs    buffers
}

// entry is a node on its way into the archive.
type entry struct {
	*found
	release func()
	ready   chan struct{} // closed when the following is set
	img     fs.Image      // of a file
	head    []byte        // its first bytes, a buffer
	err     error
}

// stream copies sources into an archive. The stream is ended properly unless there is an error.
func stream(ctx context.Context, w io.Writer, a func(*tally, io.Writer) archive, sources []Source, opt Options) (Result, error) {
	s := &streamSink{
		tally: newTally(opt), queue: make(chan *entry, aheadEntries), load: make(chan *entry, aheadEntries), bufs: newBuffers(aheadBytes),
	}
	s.out = &sticky{w: bufio.NewWriterSize(w, outBytes)}
	s.archive = a(s.tally, s.out)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(s.queue)
		defer close(s.load)
		return s.walk(gctx, s, &place{}, sources)
	})
	for range workers() {
		g.Go(func() error {
			for e := range s.load {
				s.open(gctx, e)
				close(e.ready)
			}
			return nil
		})
	}
	g.Go(func() error {
		links := map[uint64]string{} // inode => path in the archive
		for e := range s.queue {
			if err := s.write(gctx, e, links); err != nil {
				return fmt.Errorf("%s: %w", e.path(), err)
			}
		}
		if gctx.Err() != nil {
			return gctx.Err()
		}
		return s.archive.close()
	})
	err := g.Wait()
	// What is written of a file that failed goes out, too: a tar that ends between two files looks whole to some.
	if ferr := s.out.w.Flush(); err == nil {
		err = ferr
	}
	for e := range s.queue {
		e.drop(s.bufs)
	}
	return s.r, err
}

// enter implements sink.
func (s *streamSink) enter(ctx context.Context, f *found) (*place, error) {
	if err := f.at.unique(f); err != nil {
		return nil, s.skip(f.at, f.name, err)
	}
	if err := s.send(ctx, f); err != nil {
		return nil, err
	}
	return &place{parent: f.at, name: f.name, inode: f.attr.Inode, depth: f.at.depth + 1}, nil
}

// maxNamedLinks bounds the names of symbolic links that are remembered of a directory.
const maxNamedLinks = 1 << 18

// unique refuses what has the name of a symbolic link: whoever extracts the archive might follow that. Only a hostile file system
// has such things.
func (p *place) unique(f *found) error {
	if p.links[f.name] || len(p.links) >= maxNamedLinks {
		return guest.Damaged("a symbolic link has the same name")
	}
	if f.attr.Kind == fs.KindLink {
		if p.links == nil {
			p.links = map[string]bool{}
		}
		p.links[f.name] = true
	}
	return nil
}

// leave implements sink.
func (s *streamSink) leave(context.Context, *place) {}

// put implements sink.
func (s *streamSink) put(ctx context.Context, f *found) error {
	if err := f.at.unique(f); err != nil {
		return s.skip(f.at, f.name, err)
	}
	return s.send(ctx, f)
}

func (s *streamSink) send(ctx context.Context, f *found) error {
	e := &entry{found: f, ready: make(chan struct{})}
	// A buffer is taken here, in order: the writer never waits for one that a later entry has.
	if _, ok := f.node.(fs.File); ok && f.attr.Size > 0 {
		var err error
		if e.head, err = s.bufs.get(ctx); err != nil {
			return err
		}
	}
	select {
	case s.queue <- e:
	case <-ctx.Done():
		e.drop(s.bufs)
		return ctx.Err()
	}
	select {
	case s.load <- e:
	case <-ctx.Done():
		e.err = ctx.Err()
		close(e.ready)
		return e.err
	}
	return nil
}

// drop gives back what an entry holds.
func (e *entry) drop(b buffers) {
	if e.head != nil {
		b.put(e.head[:pieceBytes])
		e.head = nil
	}
	if e.release != nil {
		e.release()
		e.release = nil
	}
}

// open opens a file and reads its beginning, so that most damage is found before the archive says that there is such a file.
func (s *streamSink) open(ctx context.Context, e *entry) {
	file, ok := e.node.(fs.File)
	if !ok {
		return
	}
	if e.release, e.err = file.Hold(ctx); e.err != nil {
		return
	}
	if e.img, e.err = file.Image(ctx); e.err != nil {
		return
	}
	if e.img.Size() != e.attr.Size {
		e.err = fmt.Errorf("its size is %d and %d bytes", e.attr.Size, e.img.Size())
		return
	}
	if e.head != nil {
		e.head = e.head[:min(e.attr.Size, pieceBytes)]
		e.err = readFull(e.img, e.head, 0)
	}
}

// write puts an entry into the archive. links are those that are in it already.
func (s *streamSink) write(ctx context.Context, e *entry, links map[uint64]string) error {
	<-e.ready
	defer e.drop(s.bufs)
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.err != nil {
		return s.skip(e.at, e.name, e.err)
	}
	path, linkTo := e.path(), ""
	if e.linked() {
		linkTo = links[e.attr.Inode]
	}
	w, err := s.archive.begin(ctx, e.found, path, linkTo)
	switch {
	case s.out.err != nil:
		return fmt.Errorf("%w: %w", errStream, s.out.err)
	case errors.Is(err, errLeftOut):
		s.lost(kindNames[e.attr.Kind])
		return nil
	case err != nil:
		return s.skip(e.at, e.name, err)
	case w != nil && e.img != nil && e.attr.Size > 0:
		if err := s.content(ctx, w, e); err != nil {
			return fmt.Errorf("%w: %w", errStream, err)
		}
	}
	if e.linked() && linkTo == "" && len(links) < maxLinked {
		links[e.attr.Inode] = path
	}
	s.copied(e.found, linkTo != "" && w == nil, false)
	return nil
}

// content writes a file, reading ahead.
func (s *streamSink) content(ctx context.Context, w io.Writer, e *entry) error {
	if _, err := w.Write(e.head); err != nil {
		return err
	}
	s.done(int64(len(e.head)))
	if e.attr.Size <= pieceBytes {
		return nil
	}
	return ahead(ctx, e.img, pieceBytes, e.attr.Size, func(b []byte) error {
		_, err := w.Write(b)
		s.done(int64(len(b)))
		return err
	})
}

// ahead reads a range in order, some pieces at a time, and gives each to use, which must not keep it.
func ahead(ctx context.Context, img io.ReaderAt, from, to int64, use func([]byte) error) error {
	type piece struct {
		b    []byte
		err  error
		done chan struct{}
	}
	n := 2 * runtime.GOMAXPROCS(0)
	window := make(chan *piece, n)
	free := make(chan []byte, n+1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(window)
		for off := from; off < to && ctx.Err() == nil; off += pieceBytes {
			p := &piece{done: make(chan struct{})}
			select {
			case p.b = <-free:
			default:
				p.b = make([]byte, pieceBytes)
			}
			p.b = p.b[:min(to-off, pieceBytes)]
			window <- p
			go func() {
				p.err = readFull(img, p.b, off)
				close(p.done)
			}()
		}
	}()
	var err error
	for p := range window { // to its end, so that nobody reads any more when this returns
		<-p.done
		if err == nil {
			err = p.err
		}
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = use(p.b)
		}
		if err != nil {
			cancel()
		}
		select {
		case free <- p.b[:pieceBytes]:
		default:
		}
	}
	if err == nil {
		err = ctx.Err()
	}
	return err
}
