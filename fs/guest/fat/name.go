package fat

import (
	"unicode"

	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

// high437 is the upper half of code page 437 (unicode.org/Public/MAPPINGS/VENDORS/MICSFT/PC/CP437.TXT).
var high437 = []rune("ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0")

func rune437(c byte) rune {
	if c < 0x80 {
		return rune(c)
	}
	return high437[c-0x80]
}

func text437(b []byte) string {
	out := make([]rune, len(b))
	for i, c := range b {
		out[i] = rune437(c)
	}
	return string(out)
}

// Bits of an entry's byte 12: Windows NT notes there that a half of the short name is in lower case.
const (
	lowerBase = 0x08
	lowerExt  = 0x10
)

// shortName is the text of 11 bytes, 8 before the dot and 3 behind it (fatgen, "FAT Directory Structure").
func shortName(b []byte, lower byte) string {
	out := make([]rune, 0, 12)
	part := func(b []byte, down bool) {
		for len(b) > 0 && b[len(b)-1] == ' ' {
			b = b[:len(b)-1]
		}
		for _, c := range b {
			r := rune437(c)
			if down {
				r = lower437(r)
			}
			out = append(out, r)
		}
	}
	base := [8]byte(b[:8])
	if base[0] == 0x05 { // what stands for the mark of a deleted entry
		base[0] = deleted
	}
	part(base[:], lower&lowerBase != 0)
	n := len(out)
	out = append(out, '.')
	if part(b[8:11], lower&lowerExt != 0); len(out) == n+1 {
		out = out[:n]
	}
	return string(out)
}

// lower437 is the lower case of a character, where the code page has it.
func lower437(r rune) rune {
	down := unicode.ToLower(r)
	if down < 0x80 {
		return down
	}
	for _, have := range high437 {
		if have == down {
			return down
		}
	}
	return r
}

// checksum is that of a short name, which the entries of a long one have (fatgen, "ChkSum").
func checksum(short []byte) (sum byte) {
	for _, c := range short[:11] {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

// fold makes names alike that differ by case only.
func fold(units []uint16) []uint16 {
	for i, u := range units {
		if up := unicode.ToUpper(rune(u)); up <= 0xffff {
			units[i] = uint16(up)
		}
	}
	return units
}

// folded is fold of a text; nil for what cannot be a name.
func folded(name string) []uint16 {
	units, ok := cluster.Units(name)
	if !ok {
		return nil
	}
	return fold(units)
}

// longName collects the entries of a long name, which come last part first (fatgen, "FAT Long Directory Entries"):
//
//	0 order: the number of the part, from 1, and 0x40 in the last   1 five units   11 attributes   13 checksum   14 six units   28 two units
type longName struct {
	units [maxParts * partLen]uint16
	first uint32 // slot of the first entry
	parts int
	left  int // parts still to come
	sum   byte
	ok    bool
}

const (
	partLen  = 13
	maxParts = 20
	lastPart = 0x40
)

func (l *longName) add(b []byte, slot uint32) {
	order := int(b[0])
	if order&lastPart != 0 {
		order &^= lastPart
		*l = longName{first: slot, parts: order, left: order, sum: b[13], ok: order >= 1 && order <= maxParts}
	} else if order != l.left || b[13] != l.sum {
		l.ok = false
	}
	if !l.ok || order == 0 {
		l.ok = false
		return
	}
	l.left--
	part := l.units[(order-1)*partLen:]
	for i := range partLen {
		part[i] = le.Uint16(b[unitAt[i]:])
	}
}

// unitAt is where the units of a part are in its entry.
var unitAt = [partLen]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30}

// of gives the name, when it is whole and belongs to a short one.
func (l *longName) of(short []byte) (units []uint16, ok bool) {
	if !l.ok || l.left != 0 || l.sum != checksum(short) {
		return nil, false
	}
	units = l.units[:l.parts*partLen]
	for i, u := range units {
		if u == 0 {
			units = units[:i]
			break
		}
	}
	return units, len(units) > 0 && len(units) <= cluster.MaxName
}
