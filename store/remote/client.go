package remote

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// errGone: the owner ended the connection. The request may have been carried out.
var errGone = errors.New("the owner of the repository is gone")

// errVersion: the owner speaks another protocol or serves another repository.
var errVersion = errors.New("the process that holds the repository is another version of holdfast")

// client is the Index of a process that does not own it.
type client struct {
	conn net.Conn

	wmu sync.Mutex // one frame at a time

	mu      sync.Mutex // guards following
	number  uint64
	waiting map[uint64]chan []byte // request => where its response goes
	gone    bool
}

var (
	_ store.Index       = (*client)(nil)
	_ store.IndexWriter = (*client)(nil)
)

// newClient says hello on conn.
func newClient(conn net.Conn, repo [16]byte) (*client, error) {
	c := &client{conn: conn, waiting: map[uint64]chan []byte{}}
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	b := binary.LittleEndian.AppendUint32(wire.NewFrame(0, opHello), protocolVersion)
	b, _ = finish(append(b, repo[:]...))
	if _, err := conn.Write(b); err != nil {
		return nil, errors.Join(errGone, err)
	}
	in := bufio.NewReaderSize(conn, 64<<10)
	resp, err := readFrame(in)
	if err != nil {
		return nil, errors.Join(errGone, err)
	}
	if resp[8] != statusOK {
		return nil, errVersion
	}
	conn.SetDeadline(time.Time{})
	go c.receive(in)
	return c, nil
}

// receive hands responses to those who wait for them.
func (c *client) receive(in *bufio.Reader) {
	for {
		resp, err := readFrame(in)
		c.mu.Lock()
		if err != nil {
			c.gone = true
			for n, ch := range c.waiting {
				close(ch)
				delete(c.waiting, n)
			}
			c.mu.Unlock()
			c.conn.Close()
			return
		}
		n := binary.LittleEndian.Uint64(resp)
		ch := c.waiting[n]
		delete(c.waiting, n)
		c.mu.Unlock()
		if ch != nil {
			ch <- resp[8:]
		}
	}
}

// call sends a request and waits for its response. build appends the payload.
func (c *client) call(ctx context.Context, op uint8, build func([]byte) []byte) (*cursor, error) {
	ch := make(chan []byte, 1)
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return nil, errGone
	}
	c.number++
	n := c.number
	c.waiting[n] = ch
	c.mu.Unlock()
	b, err := finish(build(wire.NewFrame(n, op)))
	if err == nil {
		c.wmu.Lock()
		_, err = c.conn.Write(b)
		c.wmu.Unlock()
		if err != nil {
			err = errGone
		}
	}
	if err != nil {
		c.mu.Lock()
		delete(c.waiting, n)
		c.mu.Unlock()
		return nil, err
	}
	select {
	case resp, ok := <-ch:
		if !ok {
			return nil, errGone
		}
		switch text := string(resp[1:min(len(resp), 1024)]); resp[0] {
		case statusOK:
			return newCursor(resp[1:]), nil
		case statusNotExist:
			return nil, fmt.Errorf("%s: %w", text, store.ErrNotExist)
		case statusFull:
			return nil, fmt.Errorf("%s: %w", text, bucket.ErrFull)
		default:
			return nil, errors.New(text)
		}
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.waiting, n)
		c.mu.Unlock()
		return nil, ctx.Err()
	}
}

// Write implements store.IndexWriter.
func (c *client) Write(ctx context.Context) error {
	in, err := c.call(ctx, opWrite, func(b []byte) []byte { return b })
	if err != nil {
		return err
	}
	return in.End()
}

// lookupBatch keeps a request well under maxFrame.
const lookupBatch = 1 << 15

func (c *client) Lookup(ctx context.Context, ids []store.ID, locs []store.Loc) error {
	for len(ids) > 0 {
		n := min(len(ids), lookupBatch)
		in, err := c.call(ctx, opLookup, func(b []byte) []byte { return putIDs(b, ids[:n]) })
		if err != nil {
			return err
		}
		for i := range n {
			locs[i] = in.loc()
		}
		if err := in.End(); err != nil {
			return err
		}
		ids, locs = ids[n:], locs[n:]
	}
	return nil
}

func (c *client) AddPack(ctx context.Context, pack store.PackInfo, recs []store.PackRecord) error {
	le := binary.LittleEndian
	_, err := c.call(ctx, opAddPack, func(b []byte) []byte {
		b = le.AppendUint32(putPack(b, pack), uint32(len(recs)))
		for _, r := range recs {
			b = append(b, r.ID[:]...)
			b = le.AppendUint32(le.AppendUint32(le.AppendUint32(b, r.Off), r.Len), r.Plain)
			b = append(b, r.Kind)
		}
		return b
	})
	return err
}

func (c *client) Packs(ctx context.Context) iter.Seq2[store.NumberedPack, error] {
	return func(yield func(store.NumberedPack, error) bool) {
		for after, more := uint32(0), true; more; {
			in, err := c.call(ctx, opPacks, func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, after) })
			if err != nil {
				yield(store.NumberedPack{}, err)
				return
			}
			f := in.Take(1)
			more = f != nil && f[0] == 1
			for in.More() {
				p := store.NumberedPack{Number: in.U32(), PackInfo: in.pack(), Condemned: in.U8() == 1}
				after = p.Number
				if in.Err() == nil && !yield(p, nil) {
					return
				}
			}
			if err := in.End(); err != nil {
				yield(store.NumberedPack{}, err)
				return
			}
		}
	}
}

func (c *client) Pack(ctx context.Context, number uint32) (p store.PackInfo, err error) {
	in, err := c.call(ctx, opPack, func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, number) })
	if err != nil {
		return p, err
	}
	p = in.pack()
	return p, in.End()
}

func (c *client) DropPack(ctx context.Context, pack store.PackID, ids []store.ID) error {
	_, err := c.call(ctx, opDropPack, func(b []byte) []byte { return putIDs(append(b, pack[:]...), ids) })
	return err
}

func (c *client) Incarnation(ctx context.Context) (uint64, error) {
	in, err := c.call(ctx, opIncarnation, func(b []byte) []byte { return b })
	if err != nil {
		return 0, err
	}
	return in.U64(), in.End()
}

func (c *client) NextPack(ctx context.Context) (uint32, error) {
	in, err := c.call(ctx, opNextPack, func(b []byte) []byte { return b })
	if err != nil {
		return 0, err
	}
	return in.U32(), in.End()
}

func (c *client) Condemn(ctx context.Context, old [16]byte, set store.Condemned) (bool, error) {
	in, err := c.call(ctx, opCondemn, func(b []byte) []byte {
		return putIDs(append(append(b, old[:]...), set.Epoch[:]...), set.Packs)
	})
	if err != nil {
		return false, err
	}
	return in.U8() == 1, in.End()
}

func (c *client) Epoch(ctx context.Context) (e [16]byte, err error) {
	in, err := c.call(ctx, opEpoch, func(b []byte) []byte { return b })
	if err != nil {
		return e, err
	}
	copy(e[:], in.Take(16))
	return e, in.End()
}

func (c *client) Suspect(ctx context.Context, ids []store.ID) error {
	for part := range slices.Chunk(ids, lookupBatch) {
		if _, err := c.call(ctx, opSuspect, func(b []byte) []byte { return putIDs(b, part) }); err != nil {
			return err
		}
	}
	return nil
}

func (c *client) Whole(ctx context.Context) (bool, error) {
	in, err := c.call(ctx, opWhole, func(b []byte) []byte { return b })
	if err != nil {
		return false, err
	}
	f := in.Take(1)
	return f != nil && f[0] == 1, in.End()
}

func (c *client) SetWhole(ctx context.Context) error {
	_, err := c.call(ctx, opSetWhole, func(b []byte) []byte { return b })
	return err
}

func (c *client) Page(ctx context.Context, id store.ID) ([]byte, error) {
	in, err := c.call(ctx, opPage, func(b []byte) []byte { return append(b, id[:]...) })
	if err != nil || len(in.Rest()) == 0 {
		return nil, err
	}
	return in.Rest(), nil
}

func (c *client) PutPages(ctx context.Context, ids []store.ID, pages [][]byte) error {
	_, err := c.call(ctx, opPutPages, func(b []byte) []byte {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(ids)))
		for i, id := range ids {
			b = wire.AppendBytes(append(b, id[:]...), pages[i])
		}
		return b
	})
	return err
}

func (c *client) PageIDs(ctx context.Context, after store.ID) iter.Seq2[store.ID, error] {
	return func(yield func(store.ID, error) bool) {
		for more := true; more; {
			in, err := c.call(ctx, opPageIDs, func(b []byte) []byte { return append(b, after[:]...) })
			if err != nil {
				yield(store.ID{}, err)
				return
			}
			more = in.U8() == 1
			for in.More() {
				copy(after[:], in.Take(32))
				if in.Err() == nil && !yield(after, nil) {
					return
				}
			}
			if err := in.End(); err != nil {
				yield(store.ID{}, err)
				return
			}
		}
	}
}

func (c *client) DropPages(ctx context.Context, ids []store.ID) error {
	for part := range slices.Chunk(ids, lookupBatch) {
		if _, err := c.call(ctx, opDropPages, func(b []byte) []byte { return putIDs(b, part) }); err != nil {
			return err
		}
	}
	return nil
}

func (c *client) Points(ctx context.Context, after store.PointID) iter.Seq2[store.SealedPoint, error] {
	return func(yield func(store.SealedPoint, error) bool) {
		for more := true; more; {
			in, err := c.call(ctx, opPoints, func(b []byte) []byte { return append(b, after[:]...) })
			if err != nil {
				yield(store.SealedPoint{}, err)
				return
			}
			more = in.U8() == 1
			for in.More() {
				p := in.point()
				after = p.ID
				if in.Err() == nil && !yield(p, nil) {
					return
				}
			}
			if err := in.End(); err != nil {
				yield(store.SealedPoint{}, err)
				return
			}
		}
	}
}

func (c *client) Changes(ctx context.Context, since uint64) (ch store.Changes, err error) {
	in, err := c.call(ctx, opChanges, func(b []byte) []byte { return binary.LittleEndian.AppendUint64(b, since) })
	if err != nil {
		return ch, err
	}
	ch.Generation, ch.Unknown = in.U64(), in.U8() == 1
	for range in.Count(16) {
		var id store.PointID
		copy(id[:], in.Take(16))
		ch.Dropped = append(ch.Dropped, id)
	}
	for range in.Count(20) {
		ch.Put = append(ch.Put, in.point())
	}
	return ch, in.End()
}

func (c *client) PutPoint(ctx context.Context, p store.SealedPoint) error {
	_, err := c.call(ctx, opPutPoint, func(b []byte) []byte { return putPoint(b, p) })
	return err
}

func (c *client) DropPoint(ctx context.Context, id store.PointID) error {
	_, err := c.call(ctx, opDropPoint, func(b []byte) []byte { return append(b, id[:]...) })
	return err
}

func (c *client) Generation(ctx context.Context) (uint64, error) {
	in, err := c.call(ctx, opGeneration, func(b []byte) []byte { return b })
	if err != nil {
		return 0, err
	}
	return in.U64(), in.End()
}

func (c *client) Reserve(ctx context.Context, name string) (int, error) {
	in, err := c.call(ctx, opReserve, func(b []byte) []byte { return wire.AppendBytes(b, []byte(name)) })
	if err != nil {
		return 0, err
	}
	return int(in.U32()), in.End()
}

// Close ends the connection.
func (c *client) Close() error {
	c.conn.Close()
	return nil
}
