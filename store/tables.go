package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/fb"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

// errIndexFiles: the files of the index are not what Badger wrote. The index is
// made anew then.
var errIndexFiles = errors.New("index is damaged")

// proveFiles checks the files of an index before Badger opens them. Badger itself
// (v4.9) leaves out a table whose own index fails its checksum and goes on without what was in it,
// does not check blocks, ends the process on some lengths that are wrong, and takes a
// block that cannot be read for the end of its table when it compacts. So all that it keeps in
// tables is proved here: every block by its checksum, at the speed of CRC-32C. Of an index of
// more than proveWhole bytes, which takes too long to read for a mount, only the tables' own indexes
// are, without which Badger loses whole tables; a block is then proved when it is read, and
// what a bad one hides is taken for missing: read errors, chunks stored twice, and a gc that
// refuses to remove anything, until the index is made anew. A memtable's
// log has a checksum for each entry, and what Badger drops behind a bad one is what came
// last: the index is then as it was earlier. That does not hold with several logs, which
// only an owner that was killed leaves.
func proveFiles(dir string) error {
	f, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if errors.Is(err, os.ErrNotExist) {
		return nil // nothing there yet, or nothing that Badger will use
	}
	if err != nil {
		return err
	}
	defer f.Close()
	m, _, err := badger.ReplayManifestFile(f, 0, badgerOptions(dir))
	if err != nil {
		return fmt.Errorf("%w: %v", errIndexFiles, err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "*.mem"))
	if err != nil {
		return err
	}
	if len(logs) > 1 {
		return fmt.Errorf("%w: %d logs", errIndexFiles, len(logs))
	}
	var total int64
	for id := range m.Tables {
		if st, err := os.Stat(table.NewFilename(id, dir)); err == nil {
			total += st.Size()
		}
	}
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for id, t := range m.Tables {
		if t.KeyID != 0 || t.Compression != 0 {
			return fmt.Errorf("%w: table %d is of another format", errIndexFiles, id)
		}
		g.Go(func() error { return proveTable(table.NewFilename(id, dir), total <= proveWhole) })
	}
	return g.Wait()
}

// maxTable is the most that Badger puts into a table, bytes: badgerOptions' 4 MiB,
// doubled from level to level. Those that there are have at most 16 MiB below 10 GiB of index.
const maxTable = 4 << 20 << 6

// proveWhole is up to how many bytes of tables all of them are read on opening: that
// takes 70 ms on one core. It is the index of about 150 GiB of chunks.
const proveWhole = 64 << 20

// proveTable checks every byte of a table, or all but its blocks. Its layout, table/builder.go of Badger:
//
//	blocks | index | its length u32 | checksum of the index | its length u32
//
// and that of a block: entries | their offsets u32 each | how many u32 | checksum of
// all before | its length u32. Numbers are big-endian, checksums a pb.Checksum, the index
// a fb.TableIndex.
func proveTable(file string, blocks bool) error {
	bad := func(what string) error { return fmt.Errorf("%w: %s: %s", errIndexFiles, filepath.Base(file), what) }
	st, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		return bad("missing")
	}
	if err != nil {
		return err
	}
	if st.Size() > maxTable {
		return bad("size")
	}
	b, err := readTable(file, st.Size(), blocks)
	if err != nil {
		return err
	}
	rest, sum, ok := cutSum(b)
	if !ok {
		return bad("checksum of its index")
	}
	rest, raw, ok := cutSized(rest)
	if !ok || !proved(raw, sum) {
		return bad("index")
	}
	if !blocks {
		return nil
	}
	x := fb.GetRootAsTableIndex(raw, 0)
	end := 0
	var o fb.BlockOffset
	for i := range x.OffsetsLength() {
		if !x.Offsets(&o, i) || int(o.Offset()) != end || int(o.Len()) > len(rest)-end {
			return bad(fmt.Sprintf("place of block %d", i))
		}
		block, sum, ok := cutSum(rest[end : end+int(o.Len())])
		if !ok || !proved(block, sum) {
			return bad(fmt.Sprintf("block %d", i))
		}
		end += int(o.Len())
	}
	if end == 0 || end != len(rest) {
		return bad("length")
	}
	return nil
}

// readTable reads a table, or as much of its end as its index takes up, which is a bloom
// filter and some 30 bytes for every block of 4 KiB.
func readTable(file string, size int64, blocks bool) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for part := size / 16; !blocks && part < size; part *= 2 {
		b := make([]byte, part)
		if _, err := f.ReadAt(b, size-part); err != nil {
			return nil, err
		}
		rest, _, ok := cutSum(b)
		if !ok {
			break // look at all of it
		}
		if _, _, ok := cutSized(rest); ok {
			return b, nil
		}
	}
	b := make([]byte, size)
	_, err = f.ReadAt(b, 0)
	return b, err
}

// cutSized takes from the end of b what is followed by its length.
func cutSized(b []byte) (rest, piece []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	at := len(b) - 4
	n := int(binary.BigEndian.Uint32(b[at:]))
	if n > at {
		return nil, nil, false
	}
	return b[:at-n], b[at-n : at], true
}

// cutSum takes a checksum from the end of b.
func cutSum(b []byte) (rest []byte, sum *pb.Checksum, ok bool) {
	rest, raw, ok := cutSized(b)
	sum = new(pb.Checksum)
	return rest, sum, ok && proto.Unmarshal(raw, sum) == nil
}

func proved(b []byte, sum *pb.Checksum) bool {
	return sum.Algo == pb.Checksum_CRC32C && y.CalculateChecksum(b, sum.Algo) == sum.Sum
}
