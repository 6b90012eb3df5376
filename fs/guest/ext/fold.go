package ext

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

// encodingUTF8 is the only encoding of names: Unicode 12.1 (ext4 doc, Super Block).
const encodingUTF8 = 1

// foldData is what Unicode 12.1 says of characters, in hexadecimal numbers, made and described by TestFoldData.
//
//go:embed folding/table.gz
var foldData []byte

// A folding makes names that differ only by case alike: canonical decomposition (UAX #15), full case folding and no default
// ignorable characters (Linux 6.1, seen by what it finds). A character that Unicode 12.1 does not know is itself.
type folding struct {
	to    map[rune][]rune // character => what it becomes, when that is not itself
	class map[rune]uint8  // character => its combining class, when that is not 0
}

var loadFolding = sync.OnceValue(func() *folding {
	z, err := gzip.NewReader(bytes.NewReader(foldData))
	if err != nil {
		panic(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		panic(err)
	}
	t := &folding{to: map[rune][]rune{}, class: map[rune]uint8{}}
	section, last := 0, rune(0)
	for line := range strings.Lines(string(text)) {
		n := numbers(line)
		if len(n) == 0 {
			section, last = section+1, 0
			continue
		}
		last += n[0]
		if section > 0 {
			t.class[last] = uint8(n[1])
			continue
		}
		t.to[last] = n[1:]
		if len(n) > 1 {
			n[1] += last
		}
	}
	return t
})

func numbers(line string) []rune {
	var out []rune
	for word := range strings.FieldsSeq(line) {
		n, err := strconv.ParseInt(word, 16, 32)
		if err != nil {
			panic(err)
		}
		out = append(out, rune(n))
	}
	return out
}

// foldName folds a name; ok is false for one that is no UTF-8: that is like itself only.
func foldName(n string) (folded string, ok bool) {
	if folded, ok = foldASCII(n); ok {
		return folded, true
	}
	t := loadFolding()
	var out []rune
	for at, c := range n {
		if c == utf8.RuneError && !strings.HasPrefix(n[at:], "\uFFFD") {
			return "", false
		}
		if to, ok := t.to[c]; ok {
			out = append(out, to...)
		} else {
			out = hangul(out, c)
		}
	}
	t.order(out)
	return string(out), true
}

// hangul appends a character, a syllable of Hangul as its two or three parts (Unicode 12.1 §3.12).
func hangul(out []rune, c rune) []rune {
	const first, syllables, vowels, tails = 0xAC00, 11172, 21, 28
	s := c - first
	if s < 0 || s >= syllables {
		return append(out, c)
	}
	out = append(out, 0x1100+s/(vowels*tails), 0x1161+s/tails%vowels)
	if tail := s % tails; tail > 0 {
		out = append(out, 0x11A7+tail)
	}
	return out
}

// order brings marks behind a character into the canonical order (Unicode 12.1 §3.11, D109).
func (t *folding) order(text []rune) {
	for i := 0; i < len(text); i++ {
		end := i
		for end < len(text) && t.class[text[end]] > 0 {
			end++
		}
		slices.SortStableFunc(text[i:end], func(a, b rune) int { return int(t.class[a]) - int(t.class[b]) })
		i = end
	}
}

// foldASCII folds a name that is ASCII.
func foldASCII(n string) (string, bool) {
	for i := range len(n) {
		if n[i] >= utf8.RuneSelf {
			return "", false
		}
	}
	return strings.ToLower(n), true
}

// A sought is a name that is looked for.
type sought struct {
	name   string
	folded string
	folds  bool // others with the same folded name are it, too
}

func (f *FS) sought(in *inode, name string) sought {
	s := sought{name: name}
	if f.ignoresCase(in) {
		s.folded, s.folds = foldName(name)
	}
	return s
}

func (f *FS) ignoresCase(in *inode) bool {
	return in.flags&flagCasefold != 0 && f.encoding == encodingUTF8
}

// is reports whether a name is the one that is looked for.
func (s *sought) is(n []byte) bool {
	if string(n) == s.name {
		return true
	}
	if !s.folds {
		return false
	}
	folded, ok := foldName(string(n))
	return ok && folded == s.folded
}
