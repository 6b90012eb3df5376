package xfs

import "github.com/holdfast-backup/holdfast/fs/guest"

// An operation of a record is a header and its data (XFSDS, Log Operations): the transaction (4 bytes), the length (4), who
// wrote it (1), flags (1), 2 unused; all big-endian. The first operation with data begins with the transaction's own header of 16
// bytes, each other one is a region of an item. An item's first region begins with its type and its number of regions (2
// bytes each, in the machine's order, as all of it is but for what is on the disk elsewhere).
const (
	opHead      = 12
	transHeader = 16
	transMagic  = 0x5452414e

	opStart    = 1 << 0
	opCommit   = 1 << 1
	opContinue = 1 << 2 // goes on in the next record
	opWasCont  = 1 << 3 // goes on from the record before
	opEnd      = 1 << 4
	opUnmount  = 1 << 5
)

// Memory beside the data, bytes.
const transCost, regionCost = 256, 64

// An item is one change of a transaction.
type item struct {
	regions [][]byte
	want    int // regions that it says it has
}

func (i *item) kind() uint16 { return le.Uint16(i.regions[0]) }

// A trans is a transaction that is being put together.
type trans struct {
	lsn   uint64 // of the record that it began in
	cost  int64  // bytes of the assembler's room
	head  []byte // its header, as much as has come
	items []item
}

// An assembler puts transactions together of the operations of records, and hands over those that were committed, in that order.
type assembler struct {
	open   map[uint32]*trans // transaction's number => not yet committed
	room   int64             // bytes that open ones may yet take
	commit func(t *trans) error
}

var errNoRoom = guest.Unsupported("a transaction that needs more memory than a journal may take")

// record takes in the data of a record.
func (a *assembler) record(rec *record, data []byte) error {
	for range rec.ops {
		if len(data) < opHead {
			return guest.Damaged("an operation in the record at sector %d", rec.at)
		}
		tid, size, flags := be.Uint32(data), int64(be.Uint32(data[4:])), data[9]
		data = data[opHead:]
		if size > int64(len(data)) {
			return guest.Damaged("an operation of %d bytes in the record at sector %d", size, rec.at)
		}
		if err := a.op(rec, tid, flags, data[:size:size]); err != nil {
			return err
		}
		data = data[size:]
	}
	return nil
}

func (a *assembler) op(rec *record, tid uint32, flags byte, data []byte) error {
	t := a.open[tid]
	if t == nil {
		// Without a beginning it is one of those that the log no longer needs.
		if flags&opStart != 0 {
			if a.room -= transCost; a.room < 0 {
				return errNoRoom
			}
			a.open[tid] = &trans{lsn: rec.lsn, cost: transCost}
		}
		return nil
	}
	switch {
	case flags&opCommit != 0:
		delete(a.open, tid)
		a.room += t.cost
		return a.commit(t)
	case flags&opUnmount != 0:
		delete(a.open, tid)
		a.room += t.cost
		return nil
	case len(data) == 0:
		return nil
	}
	if a.room -= int64(len(data)) + regionCost; a.room < 0 {
		return errNoRoom
	}
	t.cost += int64(len(data)) + regionCost
	if flags&opWasCont != 0 {
		return t.extend(data)
	}
	return t.add(data)
}

// add takes in a region.
func (t *trans) add(data []byte) error {
	if len(t.head) < transHeader {
		if len(data)+len(t.head) > transHeader || len(t.head) == 0 && (len(data) < 4 || le.Uint32(data) != transMagic) {
			return guest.Damaged("the header of a transaction")
		}
		t.head = append(t.head, data...)
		return nil
	}
	if n := len(t.items); n > 0 && len(t.items[n-1].regions) < t.items[n-1].want {
		i := &t.items[n-1]
		i.regions = append(i.regions, data)
		return nil
	}
	if len(data) < 4 {
		return guest.Damaged("an item of %d bytes", len(data))
	}
	want := int(le.Uint16(data[2:]))
	if want == 0 || want > 1<<12 {
		return guest.Damaged("an item of %d regions", want)
	}
	t.items = append(t.items, item{regions: [][]byte{data}, want: want})
	return nil
}

// extend takes in what a region lacks.
func (t *trans) extend(data []byte) error {
	n := len(t.items)
	if n == 0 {
		if len(t.head)+len(data) > transHeader {
			return guest.Damaged("the header of a transaction")
		}
		t.head = append(t.head, data...)
		return nil
	}
	r := t.items[n-1].regions
	last := &r[len(r)-1]
	// It may lie in its record's memory, with other operations behind it: the capacity makes append copy it.
	*last = append(*last, data...)
	return nil
}

// pass reads the records of a stretch and hands over the transactions in it.
func (r *ring) pass(s stretch, must bool, room int64, commit func(*trans) error) error {
	a := assembler{open: map[uint32]*trans{}, room: room, commit: commit}
	cycle := s.tailCycle
	for at := s.tail; at != s.head; {
		rec, err := r.header(at)
		if err != nil {
			return err
		}
		left := (s.head - at + r.size) % r.size
		if rec.cycle != cycle || rec.sectors() > left {
			return guest.Damaged("the record at sector %d: cycle %d and not %d, %d sectors of %d", at, rec.cycle, cycle, rec.sectors(), left)
		}
		data, err := r.load(&rec, must)
		if err != nil {
			return err
		}
		if err := a.record(&rec, data); err != nil {
			return err
		}
		if at += rec.sectors(); at >= r.size {
			at -= r.size
			cycle++
		}
	}
	return nil
}
