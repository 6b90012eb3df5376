package ext

import "github.com/holdfast-backup/holdfast/fs/guest"

// inlineHead is how many bytes of inline data stand in i_block; the rest is the attribute system.data (ext4 doc, Inline Data).
const inlineHead = 60

// inlineData gives the content of an inode that has it inside.
func (f *FS) inlineData(in *inode) ([]byte, error) {
	more, err := f.inlineMore(in)
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, inlineHead+len(more))
	b = append(append(b, in.block()...), more...)
	return b[:min(int64(len(b)), in.size)], nil
}

// inlineMore gives what does not fit into i_block.
func (f *FS) inlineMore(in *inode) (b []byte, err error) {
	found := false
	if f.incompat&incompatInline != 0 {
		err = f.attrs(in, func(a attr) bool {
			if a.index == indexSystem && string(a.name) == "data" && a.inode == 0 {
				b, found = a.value, true
			}
			return !found
		})
	}
	if err == nil && !found {
		err = guest.Damaged("inode %d: inline data", in.no)
	}
	return b, err
}

// inlineParts gives the two stretches of names of a directory with inline data. The first begins behind the four bytes that name the directory
// above.
func (f *FS) inlineParts(in *inode) (first, second []byte, err error) {
	second, err = f.inlineMore(in)
	return in.block()[4:], second, err
}
