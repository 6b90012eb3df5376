package reader

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
)

// ReadDisk writes the data of d to w, which reads as zeros before. Holes are not written.
func (r *Repo) ReadDisk(d Disk, w io.WriterAt) error {
	return r.Walk(d, func(off int64, p []byte) error {
		_, err := w.WriteAt(p, off)
		return err
	})
}

// A Range is a part of an object.
type Range struct {
	Object   string
	Off, Len int64
}

// Records returns where the records are that a disk needs, each once: pages from the
// root down, and chunks.
func (r *Repo) Records(d Disk) ([]Range, error) {
	var list []Range
	seen := map[ID]bool{}
	err := r.walk(d, func(id ID) {
		if seen[id] {
			return
		}
		seen[id] = true
		for _, at := range r.records[id] {
			list = append(list, Range{"packs/" + at.pack.String(), int64(at.offset), recordHeader + int64(at.stored)})
		}
	}, func(int64, []byte) error { return nil })
	return list, err
}

// Bytes returns all of a disk that fits in memory.
func (r *Repo) Bytes(d Disk) ([]byte, error) {
	b := make([]byte, d.Size)
	err := r.Walk(d, func(off int64, p []byte) error {
		copy(b[off:], p)
		return nil
	})
	return b, err
}

// Walk calls fn for each chunk of the disk that is no hole, in order. The last one is cut at
// the end of the disk. The bytes are fn's to keep.
func (r *Repo) Walk(d Disk, fn func(off int64, p []byte) error) error {
	return r.walk(d, func(ID) {}, fn)
}

func (r *Repo) walk(d Disk, needs func(ID), fn func(off int64, p []byte) error) error {
	if d.Size < 0 {
		return fmt.Errorf("disk %s: size %d", d.Name, d.Size)
	}
	if d.Root == "" {
		return nil
	}
	var root ID
	if err := unhex(root[:], d.Root); err != nil {
		return fmt.Errorf("disk %s: root: %w", d.Name, err)
	}
	size := int64(r.ChunkSize)
	chunks := (d.Size + size - 1) / size
	level := 0
	for span := int64(256); span < chunks; span *= 256 {
		level++
	}
	w := walk{r: r, disk: d, chunks: chunks, needs: needs, fn: fn}
	if err := w.page(root, level, 0); err != nil {
		return fmt.Errorf("disk %s: %w", d.Name, err)
	}
	return nil
}

type walk struct {
	r      *Repo
	disk   Disk
	chunks int64
	needs  func(ID) // told of every page and chunk before it is read
	fn     func(off int64, p []byte) error
}

func (w *walk) page(id ID, level int, first int64) error {
	w.needs(id)
	b, err := w.r.read(id, kindPage)
	if err != nil {
		return fmt.Errorf("page at chunk %d, level %d: %w", first, level, err)
	}
	entries, err := decodePage(b, level)
	if err != nil {
		return fmt.Errorf("page at chunk %d, level %d: %w", first, level, err)
	}
	span := int64(1) << (8 * level) // chunks of one entry
	for k, id := range entries {
		at := first + int64(k)*span
		switch {
		case id == ID{}:
			continue
		case at >= w.chunks:
			return fmt.Errorf("page at chunk %d, level %d: entry %d is past the end", first, level, k)
		case level > 0:
			err = w.page(id, level-1, at)
		default:
			err = w.chunk(id, at)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) chunk(id ID, n int64) error {
	w.needs(id)
	b, err := w.r.read(id, kindChunk)
	off := n * int64(w.r.ChunkSize)
	if err != nil {
		return fmt.Errorf("chunk at %d: %w", off, err)
	}
	if zero(b) {
		return fmt.Errorf("chunk at %d: zeros are stored", off)
	}
	if left := w.disk.Size - off; left < int64(len(b)) {
		if !zero(b[left:]) {
			return fmt.Errorf("chunk at %d: padded with something else than zeros", off)
		}
		b = b[:left]
	}
	return w.fn(off, b)
}

// decodePage returns the ids of a page, zero for holes.
func decodePage(b []byte, level int) (entries [256]ID, err error) {
	if len(b) < 36 || b[0] != 'm' || b[1] != 1 || int(b[2]) != level || b[3] != 0 {
		return entries, fmt.Errorf("%d bytes, %q", len(b), b[:min(len(b), 4)])
	}
	present := 0
	for _, c := range b[4:36] {
		present += bits.OnesCount8(c)
	}
	if present == 0 || len(b) != 36+32*present {
		return entries, fmt.Errorf("%d entries in %d bytes", present, len(b))
	}
	rest := b[36:]
	for k := range entries {
		if b[4+k/8]>>(k%8)&1 == 0 {
			continue
		}
		entries[k] = ID(rest[:32])
		if entries[k] == (ID{}) {
			return entries, errors.New("an id of zero")
		}
		rest = rest[32:]
	}
	return entries, nil
}
