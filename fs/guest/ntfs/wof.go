package ntfs

import (
	"fmt"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// wofStream is the stream with the data of a file that CompactOS compressed.
const wofStream = "WofCompressedData"

// Providers and algorithms of WOF (winioctl.h and wofapi.h of the Windows SDK: WOF_EXTERNAL_INFO, FILE_PROVIDER_EXTERNAL_INFO_V1).
const (
	wofWIM  = 1
	wofFile = 2
)

// wofAlgorithms are what decompresses chunks of that size, by number.
var wofAlgorithms = [4]struct {
	chunk      int64
	decompress func(dst, src []byte) error
}{{4 << 10, xpress}, {32 << 10, lzx}, {8 << 10, xpress}, {16 << 10, xpress}}

// wof is the content of a file that CompactOS compressed. Its stream has a table of where each chunk but the first starts, counted from the
// table's end, in 4 bytes each (8 for a file of more than 4 GiB), and then the chunks. One that is as long as what it holds is not compressed.
type wof struct {
	s          *stream // compressed
	size       int64
	chunk      int64
	chunks     int64
	word       int64 // bytes of an entry of the table
	decompress func(dst, src []byte) error
}

// openWOF opens a file with WOF's reparse point: version (4), provider (4), and of its own provider version (4) and algorithm (4).
func (f *FS) openWOF(i *inode, a *attr, data []byte) (guest.File, error) {
	if len(data) < 8 {
		return nil, guest.Damaged("record %d of the MFT: WOF with %d bytes", i.number, len(data))
	}
	if provider := le.Uint32(data[4:]); provider != wofFile {
		if provider == wofWIM {
			return nil, guest.Unsupported("a file whose data is in a WIM image (WOF)")
		}
		return nil, guest.Unsupported("a file of WOF's provider %d", provider)
	}
	if len(data) < 16 || le.Uint32(data[12:]) >= uint32(len(wofAlgorithms)) {
		return nil, guest.Unsupported("a file that WOF compressed in an unknown way")
	}
	packed := i.find(attrData, wofStream)
	if a == nil || packed == nil {
		return nil, guest.Damaged("record %d of the MFT: WOF without data", i.number)
	}
	if (a.flags|packed.flags)&encrypted != 0 || packed.unit != 0 {
		return nil, guest.Unsupported("a file of WOF that is encrypted or compressed again")
	}
	algorithm := wofAlgorithms[le.Uint32(data[12:])]
	w := &wof{s: f.stream(packed), size: a.size, chunk: algorithm.chunk, word: 4, decompress: algorithm.decompress}
	w.chunks = (w.size + w.chunk - 1) / w.chunk
	if w.size > 1<<32-1 {
		w.word = 8
	}
	if w.chunks > 0 && w.word*(w.chunks-1) > packed.size {
		return nil, guest.Damaged("record %d of the MFT: WOF with %d bytes for %d", i.number, packed.size, w.size)
	}
	return w, nil
}

// Size implements guest.File.
func (w *wof) Size() int64 { return w.size }

// Allocated implements guest.File: such a file has no holes that are told apart.
func (w *wof) Allocated(granularity int64) iter.Seq2[extent.Extent, error] {
	return extent.Coarsen(extent.All([]extent.Extent{{Len: w.size}}), granularity, w.size)
}

// ReadAt implements io.ReaderAt.
func (w *wof) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("ntfs: read at %d", off)
	}
	want := int(max(0, min(int64(len(p)), w.size-off)))
	for done := 0; done < want; {
		n, in := (off+int64(done))/w.chunk, int((off+int64(done))%w.chunk)
		size := int(min(w.chunk, w.size-n*w.chunk))
		k := min(want-done, size-in)
		if k == size {
			if err := w.expand(p[done:done+k], n); err != nil {
				return 0, err
			}
		} else {
			chunk, err := w.cached(n, size)
			if err != nil {
				return 0, err
			}
			copy(p[done:done+k], chunk[in:])
		}
		done += k
	}
	if want < len(p) {
		return want, io.EOF
	}
	return want, nil
}

func (w *wof) cached(n int64, size int) ([]byte, error) {
	key := unitKey{runKey{w.s.a.base, 0}, n}
	if len(w.s.a.parts) > 0 {
		key.runKey = runKey{w.s.a.parts[0].record, w.s.a.parts[0].id}
	}
	if chunk, ok := w.s.fs.units.Get(key); ok && len(chunk) == size {
		return chunk, nil
	}
	chunk := make([]byte, size)
	if err := w.expand(chunk, n); err != nil {
		return nil, err
	}
	w.s.fs.units.Put(key, chunk, int64(size)+128)
	return chunk, nil
}

// expand decompresses chunk n into dst, which is of its size.
func (w *wof) expand(dst []byte, n int64) error {
	from, to, err := w.bounds(n)
	if err != nil {
		return err
	}
	if to-from == int64(len(dst)) {
		return w.s.read(dst, from)
	}
	if from < 0 || to <= from || to-from > int64(len(dst)) || to > w.s.a.size {
		return guest.Damaged("WOF: chunk %d from %d to %d", n, from, to)
	}
	src := make([]byte, to-from)
	if err := w.s.read(src, from); err != nil {
		return err
	}
	return w.decompress(dst, src)
}

// bounds gives where chunk n is in the stream.
func (w *wof) bounds(n int64) (from, to int64, err error) {
	table := w.word * (w.chunks - 1)
	var b [16]byte
	first, last := max(0, n-1), min(n+1, w.chunks-1) // entry n-1 says where chunk n starts
	if err := w.s.read(b[:(last-first)*w.word], first*w.word); err != nil {
		return 0, 0, err
	}
	entry := func(i int64) int64 {
		if w.word == 8 {
			return int64(le.Uint64(b[(i-first)*8:]))
		}
		return int64(le.Uint32(b[(i-first)*4:]))
	}
	from, to = 0, w.s.a.size-table
	if n > 0 {
		from = entry(n - 1)
	}
	if n < w.chunks-1 {
		to = entry(n)
	}
	if from < 0 || to < from || to > w.s.a.size-table {
		return 0, 0, guest.Damaged("WOF: chunk %d from %d to %d", n, from, to)
	}
	return table + from, table + to, nil
}
