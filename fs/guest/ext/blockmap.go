package ext

import "github.com/holdfast-backup/holdfast/fs/guest"

// direct is how many block numbers stand in the inode itself, before those of the three levels of maps (ext4
// doc, Direct/Indirect Block Addressing).
const direct = 12

// findMapped finds a block in the maps of ext2 and ext3.
func (f *FS) findMapped(in *inode, at int64) (run, error) {
	b := in.block()
	if at < direct {
		return mapped(b[:direct*4], at, at), nil
	}
	perBlock := f.blockSize / 4
	rest, span := at-direct, int64(1)
	for level := range 3 {
		span *= perBlock
		if rest < span {
			return f.descend(in, int64(le.Uint32(b[4*(direct+level):])), at, rest, span)
		}
		rest -= span
	}
	return run{}, guest.Damaged("inode %d: block %d, past what maps can hold", in.no, at)
}

// descend finds a block in a map of span blocks, of which it is block rest.
func (f *FS) descend(in *inode, block, at, rest, span int64) (run, error) {
	perBlock := f.blockSize / 4
	for {
		if block == 0 {
			return run{at: at, n: span - rest}, nil
		}
		if block < f.firstData || block >= f.blocks {
			return run{}, guest.Damaged("inode %d: a map in block %d", in.no, block)
		}
		b, err := f.meta.Block(block, nil)
		if err != nil {
			return run{}, err
		}
		span /= perBlock
		if span == 1 {
			return mapped(b, rest, at), nil
		}
		block = int64(le.Uint32(b[rest/span*4:]))
		rest %= span
	}
}

// mapped gives the run that begins with entry i of a table of block numbers, and is block at of the file.
func mapped(table []byte, i, at int64) run {
	r := run{at: at, n: 1, phys: int64(le.Uint32(table[i*4:]))}
	for i++; i < int64(len(table)/4); i++ {
		next := int64(le.Uint32(table[i*4:]))
		if r.phys == 0 && next != 0 || r.phys != 0 && next != r.phys+r.n {
			break
		}
		r.n++
	}
	return r
}
