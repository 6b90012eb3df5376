package exfat

import (
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// upcase is what each UTF-16 unit is in upper case; those behind its end are what they are.
type upcase []uint16

// maxUpcase is the largest table on a disk, bytes: one unit for each, and some that say how many are skipped.
const maxUpcase = 4 << 16

func (f *FS) readUpcase() (upcase, error) {
	if f.letter.size < 2 || f.letter.size > maxUpcase {
		return nil, guest.Damaged("an up-case table of %d bytes", f.letter.size)
	}
	b := make([]byte, f.letter.size)
	if err := f.table.Chain(f.letter.first).ReadAt(f.dev, b, 0); err != nil {
		return nil, err
	}
	if checksum32(0, b) != f.letter.sum {
		return nil, guest.Damaged("the up-case table: its checksum")
	}
	return parseUpcase(b)
}

// parseUpcase reads the table in its compressed form: 0xffff and a number are that many units that are what they are (§7.2.5).
func parseUpcase(b []byte) (upcase, error) {
	var u upcase
	for len(b) >= 2 {
		c := le.Uint16(b)
		b = b[2:]
		n := 1
		if c == 0xffff && len(b) >= 2 {
			n, b = int(le.Uint16(b)), b[2:]
		}
		if len(u)+n > 1<<16 {
			return nil, guest.Damaged("an up-case table of more than %d units", 1<<16)
		}
		if c != 0xffff {
			u = append(u, c)
			continue
		}
		for range n {
			u = append(u, uint16(len(u)))
		}
	}
	return u, nil
}

// asciiUpcase knows the letters that every table has (§7.2.5.1).
func asciiUpcase() upcase {
	u := make(upcase, 128)
	for i := range u {
		u[i] = uint16(i)
		if i >= 'a' && i <= 'z' {
			u[i] -= 'a' - 'A'
		}
	}
	return u
}

// fold makes names alike that differ by case only; nil for what cannot be a name.
func (u upcase) fold(name string) []uint16 {
	units, ok := cluster.Units(name)
	if !ok {
		return nil
	}
	for i, c := range units {
		if int(c) < len(u) {
			units[i] = u[c]
		}
	}
	return units
}

func (u upcase) same(name string, folded []uint16) bool { return slices.Equal(u.fold(name), folded) }
