package ntfs

import "unicode/utf16"

// text makes UTF-16 of the disk UTF-8. A surrogate without its other half becomes the three bytes that UTF-8 would have for it (WTF-8), so that
// every name has one text and every text one name.
func text(b []byte) string {
	out := make([]byte, 0, len(b)/2)
	for i := 0; i+1 < len(b); i += 2 {
		r := rune(le.Uint16(b[i:]))
		if utf16.IsSurrogate(r) && i+3 < len(b) {
			if full := utf16.DecodeRune(r, rune(le.Uint16(b[i+2:]))); full != '\uFFFD' {
				r, i = full, i+2
			}
		}
		out = appendRune(out, r)
	}
	return string(out)
}

// appendRune is utf8.AppendRune for surrogates too.
func appendRune(out []byte, r rune) []byte {
	switch {
	case r < 0x80:
		return append(out, byte(r))
	case r < 0x800:
		return append(out, 0xc0|byte(r>>6), 0x80|byte(r&0x3f))
	case r < 0x10000:
		return append(out, 0xe0|byte(r>>12), 0x80|byte(r>>6&0x3f), 0x80|byte(r&0x3f))
	}
	return append(out, 0xf0|byte(r>>18), 0x80|byte(r>>12&0x3f), 0x80|byte(r>>6&0x3f), 0x80|byte(r&0x3f))
}

// maxName is the longest name, UTF-16 units.
const maxName = 255

// encode makes the UTF-16 of a name as the disk has it. ok is false for what no name can be.
func encode(name string) (b []byte, ok bool) {
	b = make([]byte, 0, 2*min(len(name), maxName))
	for i := 0; i < len(name); {
		r, n := decodeRune(name[i:])
		if n == 0 || len(b) > 2*maxName {
			return nil, false
		}
		i += n
		if r >= 0x10000 {
			hi, lo := utf16.EncodeRune(r)
			b = le.AppendUint16(le.AppendUint16(b, uint16(hi)), uint16(lo))
		} else {
			b = le.AppendUint16(b, uint16(r))
		}
	}
	return b, len(b) <= 2*maxName
}

// decodeRune takes the first character off s, which may be a surrogate; n is 0 when it is no character in its shortest form.
func decodeRune(s string) (r rune, n int) {
	c := s[0]
	switch {
	case c < 0x80:
		return rune(c), 1
	case c >= 0xc2 && c < 0xe0:
		r, n = rune(c&0x1f), 2
	case c >= 0xe0 && c < 0xf0:
		r, n = rune(c&0x0f), 3
	case c >= 0xf0 && c < 0xf5:
		r, n = rune(c&0x07), 4
	default:
		return 0, 0
	}
	if len(s) < n {
		return 0, 0
	}
	for i := 1; i < n; i++ {
		if s[i]&0xc0 != 0x80 {
			return 0, 0
		}
		r = r<<6 | rune(s[i]&0x3f)
	}
	if n == 3 && r < 0x800 || n == 4 && (r < 0x10000 || r > 0x10ffff) {
		return 0, 0
	}
	return r, n
}

// upcase is what each UTF-16 unit is in upper case: the volume's $UpCase.
type upcase []uint16

func (u upcase) of(c uint16) uint16 {
	if int(c) < len(u) {
		return u[c]
	}
	return c
}

// upper is a name in upper case.
func (u upcase) upper(name []byte) []byte {
	out := make([]byte, 0, len(name))
	for ; len(name) > 1; name = name[2:] {
		out = le.AppendUint16(out, u.of(le.Uint16(name)))
	}
	return out
}

// compare orders names as directories do: by their upper case, and those alike in it by their units.
func (u upcase) compare(a, b []byte) int {
	if c := u.fold(a, b); c != 0 {
		return c
	}
	for i := 0; i+1 < len(a) && i+1 < len(b); i += 2 {
		if x, y := le.Uint16(a[i:]), le.Uint16(b[i:]); x != y {
			return int(x) - int(y)
		}
	}
	return 0
}

// fold orders names without regard to case.
func (u upcase) fold(a, b []byte) int {
	for i := 0; i+1 < len(a) && i+1 < len(b); i += 2 {
		if x, y := le.Uint16(a[i:]), le.Uint16(b[i:]); x != y {
			if x, y = u.of(x), u.of(y); x != y {
				return int(x) - int(y)
			}
		}
	}
	return len(a) - len(b)
}
