package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// Base is a disk of the parent.
type Base struct {
	s      *Session
	disk   uint32
	chunks int64
	// Where the last answer came from, and the one after it, which is asked for early: looking
	// one after the other must not cost a round trip each.
	win, next *window
}

// window is an answer to ids, or one that is on its way.
type window struct {
	first int64
	ids   []store.ID
	err   error
	done  chan struct{} // closed when ids or err are set
}

// Base gives a disk of the parent, nil when the new point may share nothing of it.
func (s *Session) Base(ctx context.Context, disk string) (*Base, error) {
	for i := range s.parent.Disks {
		d := &s.parent.Disks[i]
		if d.Name != disk {
			continue
		}
		c, err := s.call(ctx, opBase, binary.LittleEndian.AppendUint32(nil, uint32(i)))
		if err != nil {
			return nil, err
		}
		whole := c.U8() == 1
		if err := c.End(); err != nil || !whole {
			return nil, err
		}
		cs := int64(s.chunkSize)
		return &Base{s: s, disk: uint32(i), chunks: (d.Size + cs - 1) / cs}, nil
	}
	return nil, fmt.Errorf("no disk %q in the last point: %w", disk, store.ErrNotExist)
}

// IDs sets ids to those of the chunks from first on, zero for holes and past the end. The
// session has their receipts then.
func (b *Base) IDs(ctx context.Context, first int64, ids []store.ID) error {
	for len(ids) > 0 {
		if first >= b.chunks {
			clear(ids)
			return nil
		}
		w, err := b.window(ctx, first)
		if err != nil {
			return err
		}
		n := copy(ids, w.ids[first-w.first:])
		ids, first = ids[n:], first+int64(n)
	}
	return nil
}

// window gives the answer with chunk i in it.
func (b *Base) window(ctx context.Context, i int64) (*window, error) {
	for _, w := range []*window{b.win, b.next} {
		if w == nil || i < w.first || i >= w.first+maxIDs {
			continue
		}
		if err := w.wait(ctx); err != nil {
			return nil, err
		}
		if w == b.next {
			b.win, b.next = w, b.ask(w.first+maxIDs)
		}
		return w, nil
	}
	b.win, b.next = b.ask(i), nil
	if err := b.win.wait(ctx); err != nil {
		return nil, err
	}
	if i == 0 { // most probably all is asked for
		b.next = b.ask(maxIDs)
	}
	return b.win, nil
}

func (w *window) wait(ctx context.Context) error {
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ask asks for the chunks from first on; nil past the end.
func (b *Base) ask(first int64) *window {
	if first >= b.chunks {
		return nil
	}
	le := binary.LittleEndian
	n := int(min(maxIDs, b.chunks-first))
	w := &window{first: first, done: make(chan struct{})}
	req := le.AppendUint32(wire.NewFrame(0, opIDs), b.disk)
	req = le.AppendUint32(le.AppendUint64(req, uint64(first)), uint32(n))
	err := b.s.send(req, func(resp []byte, err error) {
		defer close(w.done)
		if w.err = err; err == nil {
			w.ids, w.err = b.s.idsIn(resp, n)
		}
	})
	if err != nil {
		w.err = err
		close(w.done)
	}
	return w
}

// idsIn reads the answer to ids for n chunks, and keeps the receipts.
func (s *Session) idsIn(resp []byte, n int) ([]store.ID, error) {
	c, err := answered(resp)
	if err != nil {
		return nil, err
	}
	if n > len(c.Rest()) {
		return nil, wire.ErrMalformed
	}
	ids := make([]store.ID, n)
	for i := range ids {
		switch c.U8() {
		case 0:
		case 1:
			id, proof := c.Take(32), c.Take(receiptLen)
			if c.Err() != nil {
				return nil, c.Err()
			}
			ids[i] = store.ID(id)
			s.receipts.add(ids[i], [receiptLen]byte(proof))
		default:
			return nil, wire.ErrMalformed
		}
	}
	return ids, c.End()
}

// Writer names, compresses and sends chunks. Not safe for concurrent use; make one for each
// worker and Close it.
type Writer struct {
	s     *Session
	coder *store.ChunkCoder
	buf   []byte // message being built
}

// Writer gives a worker its Writer.
func (s *Session) Writer() (*Writer, error) {
	c, err := store.NewChunkCoder(s.idKey)
	if err != nil {
		return nil, err
	}
	return &Writer{s: s, coder: c}, nil
}

// Close releases the scratch memory.
func (w *Writer) Close() { w.coder.Close() }

// Write sends what the session has no receipts for of consecutive chunks: see
// backup.Writer. It does not wait for the server.
func (w *Writer) Write(ctx context.Context, data []byte, parents, ids []store.ID) (store.Written, error) {
	cs := w.s.chunkSize
	var sum store.Written
	most := chunksOfPut(cs)
	for len(data) > 0 {
		n := min(most, len(data)/cs)
		part, err := w.write(ctx, data[:n*cs], parents[:n], ids[:n])
		sum.Data += part.Data
		sum.New += part.New
		if err != nil {
			return sum, err
		}
		data, parents, ids = data[n*cs:], parents[n:], ids[n:]
	}
	return sum, nil
}

// write does so for as many chunks as go into one message.
func (w *Writer) write(ctx context.Context, data []byte, parents, ids []store.ID) (sum store.Written, err error) {
	s, cs := w.s, w.s.chunkSize
	p := &put{done: make(chan struct{})}
	b := append(w.buf[:0], wire.NewFrame(0, opPut)...)
	count := len(b)
	b = append(b, 0, 0, 0, 0)
	for i := range ids {
		chunk := data[i*cs : (i+1)*cs]
		if ids[i] = w.coder.ID(chunk); ids[i].IsZero() {
			continue
		}
		sum.Data += int64(cs)
		if ids[i] == parents[i] || !s.receipts.claim(ids[i], p) {
			continue
		}
		head := len(b)
		b = append(b, 0, 0, 0, 0, 0) // codec, length
		var codec uint8
		b, codec = w.coder.Append(b, chunk)
		b[head] = codec
		binary.LittleEndian.PutUint32(b[head+1:], uint32(len(b)-head-5))
		sum.New += int64(cs)
	}
	w.buf = b
	if len(p.ids) == 0 {
		return sum, nil
	}
	binary.LittleEndian.PutUint32(b[count:], uint32(len(p.ids)))
	select {
	case s.puts <- struct{}{}:
	case <-s.ended:
		s.receipts.settle(p, nil)
		return sum, s.cause()
	case <-ctx.Done():
		s.receipts.settle(p, nil)
		return sum, ctx.Err()
	}
	s.sent.Add(int64(len(b)))
	err = s.send(b, func(resp []byte, err error) {
		defer func() { <-s.puts }()
		var proofs []byte
		if err == nil {
			var c *wire.Cursor
			if c, err = answered(resp); err == nil {
				proofs = c.Rest()
				if len(proofs) != receiptLen*len(p.ids) {
					err = wire.ErrMalformed
				}
			}
		}
		if err != nil {
			s.fail(err) // before anybody looks for a receipt in vain
			defer s.conn.Close()
		}
		s.receipts.settle(p, proofs)
	})
	if err != nil {
		<-s.puts
		s.receipts.settle(p, nil)
	}
	return sum, err
}

// cause is why the session ended.
func (s *Session) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Map is a chunk map in the making at the server.
type Map struct {
	s   *Session
	buf []byte // entries that were not sent yet
}

// Map begins the chunk map of a disk of size bytes out of that of base, or, when it is nil,
// out of one hole. It takes the place of one that was not finished.
func (s *Session) Map(ctx context.Context, base *Base, size int64) (*Map, error) {
	disk := uint32(0)
	if base != nil {
		disk = base.disk + 1
	}
	_, err := s.call(ctx, opMap, binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, disk), uint64(size)))
	if err != nil {
		return nil, err
	}
	return &Map{s: s}, nil
}

// Set gives chunks their ids: see backup.Map.
func (m *Map) Set(ctx context.Context, first int64, ids, parents []store.ID) error {
	for k, id := range ids {
		i := first + int64(k)
		switch {
		case id == parents[k]: // as it is in the base
		case id.IsZero():
			if err := m.Punch(ctx, i, i+1); err != nil {
				return err
			}
		default:
			proof, err := m.s.receipts.get(ctx, id)
			if errors.Is(err, errNoReceipt) {
				if cause := m.s.cause(); cause != nil {
					err = cause
				}
			}
			if err != nil {
				return err
			}
			if err := m.room(ctx); err != nil {
				return err
			}
			m.buf = binary.LittleEndian.AppendUint64(append(m.buf, 0), uint64(i))
			m.buf = append(append(m.buf, id[:]...), proof[:]...)
		}
	}
	return nil
}

// Punch makes chunks [from, to) holes.
func (m *Map) Punch(ctx context.Context, from, to int64) error {
	if from >= to {
		return nil
	}
	if err := m.room(ctx); err != nil {
		return err
	}
	m.buf = binary.LittleEndian.AppendUint64(append(m.buf, 1), uint64(from))
	m.buf = binary.LittleEndian.AppendUint64(m.buf, uint64(to))
	return nil
}

// room makes room for one more entry.
func (m *Map) room(ctx context.Context) error {
	if len(m.buf)+entryLen <= maxWrite {
		return nil
	}
	return m.flush(ctx)
}

func (m *Map) flush(ctx context.Context) error {
	if len(m.buf) == 0 {
		return nil
	}
	_, err := m.s.call(ctx, opWrite, m.buf)
	m.buf = m.buf[:0]
	return err
}

// Finish gives the finished map.
func (m *Map) Finish(ctx context.Context, size int64) (store.Root, error) {
	if err := m.flush(ctx); err != nil {
		return store.Root{}, err
	}
	c, err := m.s.call(ctx, opFinish, nil)
	if err != nil {
		return store.Root{}, err
	}
	root := store.Root{Size: size}
	copy(root.Page[:], c.Take(32))
	return root, c.End()
}

// Close has nothing to do: a map that is not finished ends with the next one, or the session.
func (m *Map) Close(context.Context) error { return nil }

// Commit makes the point durable and fills in its id, name and time. Which VM it is of
// was said by Begin.
func (s *Session) Commit(ctx context.Context, p *store.Point) error {
	disks := []diskMessage{}
	for _, d := range p.Disks {
		disks = append(disks, diskMessage{d.Key, d.Size, d.Root, d.ChangeID, d.Compared, d.Read, d.Stats.Data, d.Stats.Read, list(presentable(d.Warnings))})
	}
	var files []fileMessage
	for _, f := range p.Config {
		files = append(files, fileMessage{f.Name, f.Size, f.Root})
	}
	b, err := json.Marshal(pointMessage{list(p.Tags), p.Consistency, p.Program, list(presentable(p.Warnings)), list(disks), list(files)})
	if err != nil {
		return err
	}
	c, err := s.call(ctx, opCommit, b)
	if err != nil {
		return err
	}
	var done committedMessage
	if err := json.Unmarshal(c.Rest(), &done); err != nil {
		return fmt.Errorf("the server's answer: %w", err)
	}
	p.ID, p.Name, p.Time, p.VM = done.ID, done.Name, done.Time, s.vm
	p.Stats.Stored = s.Stored()
	return nil
}

// list is v as JSON, nothing for an empty one.
func list[T any](v []T) json.RawMessage {
	if v == nil {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // only texts and numbers come here
	}
	return b
}

// presentable cuts warnings to what a server takes: they must not fail a point.
func presentable(warnings []string) (out []string) {
	for _, w := range warnings[:min(len(warnings), maxWarnings)] {
		w = strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return utf8.RuneError
			}
			return r
		}, w)
		out = append(out, strings.ToValidUTF8(w[:min(len(w), maxWarning)], ""))
	}
	return out
}
