package vdisk

import (
	"encoding/binary"
	"hash/maphash"
	"slices"
)

// streamTables holds the grain tables of a stream against the grains that came: of each table it keeps
// a sum only. The grains of a table come one after the other, its place in the directory tells which
// table one is, and that is known before the grains or at the end.
type streamTables struct {
	count  int64 // of the disk
	zeroes bool  // entry 1 stands for no grain, as 0 does
	front  bool  // the tables came before the grains
	seed   maphash.Seed
	read   [vmdkTable]byte // a table, on its way to its sum

	index   int64           // the table of the grain that came last; -1: none
	current [vmdkTable]byte // as that table should be

	// What is to be compared, ascending: with tables in front what they name and no grains came for,
	// otherwise what grains came for.
	want []tableSum
	// With the directory at the end: the tables that came, ascending by their sectors in the stream.
	tables []tableSum
}

// tableSum is what is kept of a table that names grains.
type tableSum struct {
	at  uint32 // its place in the directory, or in the stream
	sum uint64
}

func newStreamTables(count int64, zeroes bool) streamTables {
	return streamTables{count: count, zeroes: zeroes, seed: maphash.MakeSeed(), index: -1}
}

// none says whether an entry stands for no table or grain.
func (t *streamTables) none(entry uint32) bool { return entry == 0 || entry == 1 && t.zeroes }

// sum makes the sum of a table; it is changed for that.
func (t *streamTables) sum(b *[vmdkTable]byte) uint64 {
	if t.zeroes {
		for i := 0; i < len(b); i += 4 {
			if t.none(binary.LittleEndian.Uint32(b[i:])) {
				clear(b[i : i+4])
			}
		}
	}
	return maphash.Bytes(t.seed, b[:])
}

// empty is the sum of a table that names no grains.
func (t *streamTables) empty() uint64 { return maphash.Bytes(t.seed, zeroGrain[:vmdkTable]) }

// name takes a table in front of the grains.
func (t *streamTables) name(index uint32, sum uint64) {
	if sum != t.empty() {
		t.want = append(t.want, tableSum{index, sum})
	}
}

// grain takes a grain that came, by its number on the disk and its sector in the stream.
func (t *streamTables) grain(number, place int64) error {
	if index := number / vmdkTableGrains; index != t.index {
		if err := t.settle(); err != nil {
			return err
		}
		t.index = index
	}
	binary.LittleEndian.PutUint32(t.current[number%vmdkTableGrains*4:], uint32(place))
	return nil
}

// settle ends the table whose grains came.
func (t *streamTables) settle() error {
	if t.index < 0 {
		return nil
	}
	came := tableSum{uint32(t.index), maphash.Bytes(t.seed, t.current[:])}
	t.index = -1
	clear(t.current[:])
	if !t.front {
		t.want = append(t.want, came)
		return nil
	}
	if len(t.want) == 0 || t.want[0] != came {
		return disagree(int64(came.at))
	}
	t.want = t.want[1:]
	return nil
}

func disagree(index int64) error {
	return corrupt("grain table %d names other grains than came: some are lost", index)
}

// came takes a table that comes behind its grains, by its sector in the stream.
func (t *streamTables) came(place int64, sum uint64) error {
	if int64(len(t.tables)) == t.count {
		return corrupt("more than %d grain tables", t.count)
	}
	t.tables = append(t.tables, tableSum{uint32(place), sum})
	return nil
}

// directory holds the tables that came against the grains that came.
func (t *streamTables) directory(places []uint32) error {
	if err := t.settle(); err != nil {
		return err
	}
	empty := t.empty()
	for i, place := range places {
		sum := empty
		if !t.none(place) {
			at, ok := slices.BinarySearchFunc(t.tables, place, func(s tableSum, place uint32) int { return int(int64(s.at) - int64(place)) })
			if !ok {
				return corrupt("grain directory, entry %d: no grain table at sector %d", i, place)
			}
			sum = t.tables[at].sum
		}
		want := empty
		if len(t.want) > 0 && t.want[0].at == uint32(i) {
			want, t.want = t.want[0].sum, t.want[1:]
		}
		if sum != want {
			return disagree(int64(i))
		}
	}
	t.tables = nil
	return nil
}

// finish says, with the tables in front, whether all their grains came. More may be asked of t later.
func (t *streamTables) finish() error {
	rest := t.want
	if t.index >= 0 {
		came := tableSum{uint32(t.index), maphash.Bytes(t.seed, t.current[:])}
		if len(rest) == 0 || rest[0] != came {
			return disagree(t.index)
		}
		rest = rest[1:]
	}
	if len(rest) > 0 {
		return disagree(int64(rest[0].at))
	}
	return nil
}
