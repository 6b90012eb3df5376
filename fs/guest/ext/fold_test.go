package ext

import (
	"bytes"
	"compress/gzip"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what TestFoldData makes")

// unicodeData are files of the Unicode Character Database (UAX #44), of version 12.1 or later: what is newer is left out, and what is not
// never changes.
const unicodeData = "/usr/share/unicode/"

// fields calls fn for the lines of a file, with their range of characters and the fields behind it.
func fields(t *testing.T, file string, fn func(first, last rune, f []string)) {
	t.Helper()
	b, err := os.ReadFile(unicodeData + file)
	switch {
	case err == nil:
	case os.Getenv("HOLDFAST_TEST_ALL") != "":
		t.Fatal(err)
	default:
		t.Skip("needs Debian's unicode-data: ", err)
	}
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Split(strings.TrimSpace(line), ";")
		for i := range f {
			f[i] = strings.TrimSpace(f[i])
		}
		first, last, is := strings.Cut(f[0], "..")
		if !is {
			last = first
		}
		if len(f) > 1 {
			fn(character(t, first), character(t, last), f[1:])
		}
	}
}

func character(t *testing.T, hex string) rune {
	t.Helper()
	n, err := strconv.ParseUint(hex, 16, 21)
	if err != nil {
		t.Fatal(err)
	}
	return rune(n)
}

// TestFoldData makes sure that the table is what Unicode says; with -update it writes it. The table has two sections: a character, as its
// distance from the one before, and what it becomes, the first as its distance from the character; and a character, likewise, and its
// combining class.
func TestFoldData(t *testing.T) {
	newer, to, class := map[rune]bool{}, map[rune][]rune{}, map[rune]int{}
	fields(t, "DerivedAge.txt", func(first, last rune, f []string) {
		var major, minor int
		fmt.Sscanf(f[0], "%d.%d", &major, &minor)
		for c := first; c <= last && major*10+minor > 121; c++ {
			newer[c] = true
		}
	})
	characters := func(text string) (out []rune) {
		for hex := range strings.FieldsSeq(text) {
			out = append(out, character(t, hex))
		}
		return out
	}
	fields(t, "UnicodeData.txt", func(c, _ rune, f []string) {
		if f[4] != "" && f[4][0] != '<' {
			to[c] = characters(f[4])
		}
		if n, _ := strconv.Atoi(f[2]); n > 0 {
			class[c] = n
		}
	})
	fields(t, "CaseFolding.txt", func(c, _ rune, f []string) {
		if f[0] == "C" || f[0] == "F" {
			to[c] = characters(f[1])
		}
	})
	fields(t, "DerivedCoreProperties.txt", func(first, last rune, f []string) {
		for c := first; c <= last && f[0] == "Default_Ignorable_Code_Point"; c++ {
			to[c] = nil
		}
	})
	text := foldText(newer, to, class)
	if *update {
		var z bytes.Buffer
		w, _ := gzip.NewWriterLevel(&z, gzip.BestCompression)
		w.Write([]byte(text))
		w.Close()
		if err := os.WriteFile("folding/table.gz", z.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	z, err := gzip.NewReader(bytes.NewReader(foldData))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(z); err != nil || string(got) != text {
		t.Errorf("%d bytes, want %d: %v", len(got), len(text), err)
	}
}

func foldText(newer map[rune]bool, to map[rune][]rune, class map[rune]int) string {
	var text strings.Builder
	line := func(last *rune, c rune, more ...rune) {
		fmt.Fprintf(&text, "%x", c-*last)
		for _, n := range more {
			fmt.Fprintf(&text, " %x", n)
		}
		text.WriteByte('\n')
		*last = c
	}
	var whole func(c rune) []rune
	whole = func(c rune) (out []rune) {
		next, ok := to[c]
		if !ok {
			return []rune{c}
		}
		for _, c := range next {
			out = append(out, whole(c)...)
		}
		return out
	}
	last := rune(0)
	for _, c := range slices.Sorted(maps.Keys(to)) {
		if newer[c] {
			continue
		}
		becomes := whole(c)
		if len(becomes) > 0 {
			becomes[0] -= c
		}
		line(&last, c, becomes...)
	}
	text.WriteByte('\n')
	last = 0
	for _, c := range slices.Sorted(maps.Keys(class)) {
		if !newer[c] {
			line(&last, c, rune(class[c]))
		}
	}
	return text.String()
}

// FuzzFold makes sure that a folded name is one already.
func FuzzFold(f *testing.F) {
	for _, n := range []string{"Stra\u00dfe", "\u1fb3\u0301", "\uac01", "a\u200db", "\xff", "a\u0315\u0300"} {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, n string) {
		once, ok := foldName(n)
		if twice, again := foldName(once); ok && (!again || twice != once) {
			t.Errorf("%+q becomes %+q, and that %+q", n, once, twice)
		}
	})
}
