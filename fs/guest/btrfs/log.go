package btrfs

import (
	"cmp"
	"errors"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// replayed is what the log says.
type replayed struct {
	trees map[uint64]*tree // subvolumes that it changes, by id
	csums []logSum         // ascending, without overlaps
	doubt error            // why the free space cannot be known; nil without a log, or with one that was replayed
	used  []extent.Extent  // logical addresses of its own nodes and of the data that it refers to
}

// A logSum is an item of checksums in the log.
type logSum struct {
	at   uint64 // logical address of the first
	sums []byte
}

// replay reads the log: a tree for each subvolume, named by a root in the tree that the superblock names. It holds items like those of the
// subvolume, as they were when fsync made them durable.
//
// The kernel does not mount a file system with a log that cannot be read; here the last commit is shown, with a warning.
func (fs *FS) replay(opt guest.Options) error {
	if fs.sb.log == 0 {
		return nil
	}
	if opt.NoReplay {
		fs.warn("the log was not replayed: what fsync made durable since the last commit is not shown")
		fs.log.doubt = guest.Unsupported("a log that was not replayed")
		return nil
	}
	room := opt.Journal
	found, err := fs.readLogs(&room)
	if room < 0 {
		return guest.Unsupported("a log with more to replay than fits into %d bytes of memory", opt.Journal)
	}
	if err != nil {
		fs.warn("the log cannot be replayed, and the last commit is shown instead: %v", err)
		fs.log.doubt = err
		return nil
	}
	fs.log = found
	fs.info.Replayed = true
	return nil
}

func (fs *FS) readLogs(room *int64) (replayed, error) {
	found := replayed{trees: map[uint64]*tree{}}
	logs := &tree{fs: fs, id: objectTreeLog, root: want{fs.sb.log, fs.sb.generation + 1, fs.sb.logLevel}}
	err := logs.each(key{}, func(k key, b []byte) error {
		if k.id != objectTreeLog || k.kind != kindRoot {
			return nil
		}
		item, err := parseRoot(b)
		if err != nil {
			return err
		}
		of, err := fs.subvolume(k.off)
		if errors.Is(err, guest.ErrNotExist) {
			return nil // deleted since
		}
		if err != nil {
			return err
		}
		d := newDraft(of, &tree{fs: fs, id: objectTreeLog, root: item.root}, room)
		if err := d.run(); err != nil {
			return err
		}
		patched := *of
		patched.patch = d.seal()
		found.trees[k.off] = &patched
		found.csums = append(found.csums, d.csums...)
		found.used = append(found.used, d.used...)
		return nil
	})
	found.used = append(found.used, logs.nodes(&err)...)
	found.sortSums(fs.sb)
	return found, err
}

// nodes gives the logical addresses of a tree's nodes.
func (t *tree) nodes(err *error) []extent.Extent {
	var list []extent.Extent
	size := int64(t.fs.sb.node)
	var visit func(n *node, at uint64, s span) error
	visit = func(n *node, at uint64, s span) error {
		list = append(list, extent.Extent{Off: int64(at), Len: size})
		for i := 0; n.level > 0 && i < n.n; i++ {
			c, sub, err := t.below(n, i, s)
			if err != nil {
				return err
			}
			addr, _ := n.ptr(i)
			if err := visit(c, addr, sub); err != nil {
				return err
			}
		}
		return nil
	}
	if *err == nil {
		var n *node
		if n, *err = t.fs.node(t.root); *err == nil {
			*err = visit(n, t.root.addr, span{open: true})
		}
	}
	return list
}

// sortSums puts the checksums in order; of those that overlap the later ones hold.
func (l *replayed) sortSums(sb *super) {
	slices.SortStableFunc(l.csums, func(a, b logSum) int { return cmp.Compare(a.at, b.at) })
	var out []logSum
	for _, s := range l.csums {
		if n := len(out); n > 0 {
			last := &out[n-1]
			if sectors := (s.at - last.at) / uint64(sb.sector); sectors < uint64(len(last.sums)/sb.csum.size) {
				last.sums = last.sums[:int(sectors)*sb.csum.size]
			}
		}
		out = append(out, s)
	}
	l.csums = out
}

// find gives the checksums from a logical address on that the log has, or how many sectors follow that it does not have.
func (l *replayed) find(logical uint64, sb *super) (sums []byte, without int) {
	i, found := slices.BinarySearchFunc(l.csums, logical, func(s logSum, at uint64) int { return cmp.Compare(s.at, at) })
	if !found {
		i--
	}
	if i >= 0 {
		s := l.csums[i]
		if skip := (logical - s.at) / uint64(sb.sector); skip < uint64(len(s.sums)/sb.csum.size) {
			return s.sums[int(skip)*sb.csum.size:], 0
		}
	}
	if i++; i < len(l.csums) {
		return nil, int(max(1, min((l.csums[i].at-logical)/uint64(sb.sector), 1<<30)))
	}
	return nil, 1 << 30
}

var errStop = errors.New("enough")

// each is walk for a fn that may fail; errStop ends it.
func (t *tree) each(k key, fn func(k key, b []byte) error) error {
	var bad error
	err := t.walk(k, func(k key, b []byte) bool {
		bad = fn(k, b)
		return bad == nil
	})
	if bad != nil && bad != errStop {
		return bad
	}
	return err
}
