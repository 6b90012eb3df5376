package vspheretest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Sizes in bytes.
const (
	grain  = 4 << 10  // of a delta: what it has, it has in whole grains
	unit   = 64 << 10 // of change tracking, and of what is allocated
	sector = 512
)

// Kinds of extents, as the descriptor says it.
const (
	flat       = "vmfs"
	seSparse   = "seSparse"
	vmfsSparse = "vmfsSparse"
	rawMapping = "vmfsRawDeviceMap"
	passRaw    = "vmfsPassthroughRawDeviceMap"
)

// A grain of a delta.
const (
	hasData = 1 + iota
	hasZero
)

// layer is a file of a disk: the flat one at the bottom, or a delta over another layer. The VM's mu guards it.
type layer struct {
	dir    *directory
	name   string // of the descriptor: "web01-000001.vmdk"
	kind   string
	parent *layer // nil at the bottom
	size   int64
	uuid   string
	cid    uint32
	raw    *os.File       // the bytes: the extent itself at the bottom, a file of ours with holes for a delta
	have   map[int64]byte // of a delta: number of the grain => hasData or hasZero
	stale  bool           // of a delta: its extent on the datastore is older than raw
	// While a layer at the bottom moves, the guest's writes go to both files, as far as it has been copied.
	mirror *os.File
	copied int64
}

// directory is where files are: a folder of a datastore. Relocating a VM changes it for all of its layers.
type directory struct {
	datastore string // name
	root      string // where the datastore is on this machine
	path      string // below it
}

func (d *directory) file(name string) string { return filepath.Join(d.root, d.path, name) }
func (d *directory) String() string          { return fmt.Sprintf("[%s] %s", d.datastore, d.path) }
func (d *directory) ref(name string) string {
	return fmt.Sprintf("[%s] %s", d.datastore, path.Join(d.path, name))
}

// extent is the name of the file with the bytes.
func (l *layer) extent() string {
	suffix := map[string]string{flat: "-flat", seSparse: "-sesparse", vmfsSparse: "-delta", rawMapping: "-rdm", passRaw: "-rdmp"}[l.kind]
	return strings.TrimSuffix(l.name, ".vmdk") + suffix + ".vmdk"
}

func (l *layer) isDelta() bool { return l.have != nil }

// source is the layer that has the grain, nil for none, which reads as zeros.
func (l *layer) source(g int64) *layer {
	for ; l != nil; l = l.parent {
		if !l.isDelta() {
			return l
		}
		switch l.have[g] {
		case hasData:
			return l
		case hasZero:
			return nil
		}
	}
	return nil
}

// ReadAt reads what a guest whose disk l is sees.
func (l *layer) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > l.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), l.size-off))
	for done := 0; done < n; {
		at := off + int64(done)
		src, end := l.source(at/grain), at-at%grain+grain
		for end < off+int64(n) && l.source(end/grain) == src {
			end += grain
		}
		part := p[done:min(n, int(end-off))]
		if src == nil {
			clear(part)
		} else if err := readFull(src.raw, part, at); err != nil {
			return done, err
		}
		done += len(part)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readFull reads zeros behind the end of the file.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return err
}

// WriteAt writes to l, below which the other layers stay as they are.
func (l *layer) WriteAt(p []byte, off int64) (int, error) {
	if !l.isDelta() {
		if l.mirror != nil && off < l.copied {
			if _, err := l.mirror.WriteAt(p[:min(int64(len(p)), l.copied-off)], off); err != nil {
				return 0, err
			}
		}
		return l.raw.WriteAt(p, off)
	}
	end := off + int64(len(p))
	for _, edge := range []int64{off, end} {
		if edge%grain == 0 || edge == l.size {
			continue
		}
		if err := l.fill(edge / grain); err != nil {
			return 0, err
		}
	}
	l.stale = true
	for g := off / grain; g*grain < end; g++ {
		l.have[g] = hasData
	}
	return l.raw.WriteAt(p, off)
}

// fill brings a grain into the delta that only the layers below have, before a part of it is written.
func (l *layer) fill(g int64) error {
	if l.have[g] == hasData {
		return nil
	}
	b := make([]byte, min(grain, l.size-g*grain))
	if _, err := l.ReadAt(b, g*grain); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err := l.raw.WriteAt(b, g*grain)
	return err
}

// merge puts what the delta has into the layer below it.
func (l *layer) merge() error {
	down := l.parent
	b := make([]byte, grain)
	for _, g := range slices.Sorted(maps.Keys(l.have)) {
		if down.isDelta() && l.have[g] == hasZero {
			down.have[g], down.stale = hasZero, true
			continue
		}
		p := b[:min(grain, l.size-g*grain)]
		clear(p)
		if l.have[g] == hasData {
			if err := readFull(l.raw, p, g*grain); err != nil {
				return err
			}
		}
		if _, err := down.WriteAt(p, g*grain); err != nil {
			return err
		}
	}
	return nil
}

// remove closes the layer and deletes its files.
func (l *layer) remove() {
	_ = l.raw.Close()
	for _, name := range []string{l.name, l.extent()} {
		_ = os.Remove(l.dir.file(name))
	}
}

// disk is a virtual disk of a VM. The VM's mu guards it.
type disk struct {
	key       int32
	size      int64
	dependent bool // snapshots and change tracking are for it
	thick     bool
	active    *layer   // what the guest writes to
	layers    []*layer // all, the bottom first
	allocated map[int64]bool
	unscanned bool      // allocated lacks what was on the disk at first
	track     *tracking // nil while changes are not tracked
}

func (d *disk) writeAt(p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > d.size {
		return fmt.Errorf("write of %d bytes at %d of a disk of %d", len(p), off, d.size)
	}
	if len(p) == 0 {
		return nil
	}
	if _, err := d.active.WriteAt(p, off); err != nil {
		return err
	}
	for u := off / unit; u*unit < off+int64(len(p)); u++ {
		d.allocated[u] = true
		d.changed(u)
	}
	return nil
}

// zero is a TRIM by the guest: what is whole in the range is no longer allocated.
func (d *disk) zero(off, n int64) error {
	if off < 0 || n < 0 || off+n > d.size {
		return fmt.Errorf("trim of %d bytes at %d of a disk of %d", n, off, d.size)
	}
	if d.unscanned {
		if err := d.scan(); err != nil {
			return err
		}
	}
	for _, u := range slices.Sorted(maps.Keys(d.allocated)) {
		from, to := max(off, u*unit), min(off+n, u*unit+unit, d.size)
		if from >= to {
			continue
		}
		if err := d.zeroPart(from, to); err != nil {
			return err
		}
		d.changed(u)
		if from == u*unit && to == min(u*unit+unit, d.size) {
			delete(d.allocated, u)
		}
	}
	return nil
}

func (d *disk) zeroPart(from, to int64) error {
	whole := from%grain == 0 && (to%grain == 0 || to == d.size)
	if !d.active.isDelta() || !whole {
		_, err := d.active.WriteAt(make([]byte, to-from), from)
		return err
	}
	for g := from / grain; g*grain < to; g++ {
		d.active.have[g], d.active.stale = hasZero, true
	}
	return nil
}

func (d *disk) changed(u int64) {
	if d.track != nil {
		d.track.changed[u] = d.track.seq
	}
}

// scan finds out what is allocated on a disk without deltas: what is not zero.
func (d *disk) scan() error {
	d.allocated, d.unscanned = map[int64]bool{}, false
	b := make([]byte, unit)
	return eachData(d.active.raw, d.size, func(off int64) error {
		p := b[:min(unit, d.size-off)]
		if err := readFull(d.active.raw, p, off); err != nil {
			return err
		}
		if !isZero(p) {
			d.allocated[off/unit] = true
		}
		return nil
	})
}

// push puts an empty delta over the active layer.
func (d *disk) push(l *layer) {
	d.active = l
	d.layers = append(d.layers, l)
}

// children are the layers that stand on l.
func (d *disk) children(l *layer) []*layer {
	var all []*layer
	for _, c := range d.layers {
		if c.parent == l {
			all = append(all, c)
		}
	}
	return all
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// newUUID is random, 8-4-4-4-12.
func newUUID() string {
	b := randomBytes(16)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // RFC 9562 §5.4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// vmwareUUID is random, in the form that VMware gives those in its files: "52 9c 3b 1c 8f 4a 11 d2-9a 6e 5c 0b 7d 3f 21 88".
func vmwareUUID() string {
	b := randomBytes(16)
	b[0] = 0x52
	return fmt.Sprintf("% x-% x", b[:8], b[8:])
}

// diskUUID is random, in the form that the backing of a disk has it: "6000C298-...".
func diskUUID() string { return "6000C29" + newUUID()[7:] }

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: crypto/rand
	return b
}
