package cluster

import (
	"unicode/utf16"
	"unicode/utf8"
)

// MaxName is the longest name, UTF-16 units.
const MaxName = 255

// Text makes UTF-16 UTF-8. A surrogate without its other half becomes three bytes (WTF-8), so that every name has one text.
func Text(units []uint16) string {
	out := make([]byte, 0, len(units)+len(units)/4)
	for i := 0; i < len(units); i++ {
		r := rune(units[i])
		switch {
		case !utf16.IsSurrogate(r):
			out = utf8.AppendRune(out, r)
			continue
		case i+1 < len(units):
			if full := utf16.DecodeRune(r, rune(units[i+1])); full != utf8.RuneError {
				out = utf8.AppendRune(out, full)
				i++
				continue
			}
		}
		out = append(out, 0xe0|byte(r>>12), 0x80|byte(r>>6&0x3f), 0x80|byte(r&0x3f))
	}
	return string(out)
}

// Units is what Text makes the text of; ok is false for what cannot be a name.
func Units(name string) (units []uint16, ok bool) {
	units = make([]uint16, 0, min(len(name), MaxName))
	for len(name) > 0 && len(units) <= MaxName {
		r, n := utf8.DecodeRuneInString(name)
		if r == utf8.RuneError && n == 1 {
			// A lone surrogate, as Text writes it.
			if len(name) < 3 || name[0] != 0xed || name[1]&0xe0 != 0xa0 || name[2]&0xc0 != 0x80 {
				return nil, false
			}
			r, n = 0xd000|rune(name[1]&0x3f)<<6|rune(name[2]&0x3f), 3
			units = append(units, uint16(r))
		} else {
			units = utf16.AppendRune(units, r)
		}
		name = name[n:]
	}
	return units, len(units) > 0 && len(units) <= MaxName
}
