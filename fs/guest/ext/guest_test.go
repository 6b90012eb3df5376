package ext

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func TestMain(m *testing.M) { guesttest.Main(m, nil) }

// caseNames are names for a directory that ignores case, and names to look up in it: all characters that the table changes, others,
// known or not, marks in any order, and what is no text.
func caseNames() (names, asked []string) {
	rng := rand.New(rand.NewPCG(5, 5))
	add := func(name string, ask ...string) {
		names = append(names, name)
		asked = append(append(asked, name), ask...)
	}
	t := loadFolding()
	for c, to := range t.to {
		add(fmt.Sprintf("k%x %c.", c, c), fmt.Sprintf("K%x %s.", c, string(to)))
	}
	for i := range 1500 {
		c := rune(rng.IntN(0x30000))
		if i%3 == 0 {
			c = rune(rng.IntN(0x110000))
		}
		if utf8.ValidRune(c) && c > 0 && c != '/' {
			add(fmt.Sprintf("r%d%ca", i, c), fmt.Sprintf("R%d%cA", i, c))
		}
	}
	var marks []rune
	for c := range t.class {
		marks = append(marks, c)
	}
	slices.Sort(marks)
	for i := range 300 {
		three := []rune{marks[rng.IntN(len(marks))], marks[rng.IntN(len(marks))], marks[rng.IntN(len(marks))]}
		add(fmt.Sprintf("m%d o%s", i, string(three)), fmt.Sprintf("M%d O%c%c%c", i, three[2], three[0], three[1]))
		s := rune(0xAC00 + rng.IntN(11172))
		add(fmt.Sprintf("h%d %c", i, s), fmt.Sprintf("H%d %s", i, string(hangul(nil, s))))
	}
	add("Straße", "STRASSE", "strasse", "STRAẞE")
	add("odd \xff Name", "ODD \xff NAME", "odd \xff name")
	add("cut \xe2\x82", "CUT \xe2\x82")
	add("surrogate \xed\xa0\x80", "SURROGATE \xed\xa0\x80")
	add("no\u00adwhere", "NOWHERE", "now\u200dhere")
	add(strings.Repeat("ΐ", 100), strings.Repeat("Ϊ́", 50), strings.Repeat("\u03b9\u0308\u0301", 40))
	return names, append(asked, "none", "strass", "nowher")
}

func everyNth(names []string, n int) (out []string) {
	for i := 0; i < len(names); i += n {
		out = append(out, names[i])
	}
	return out
}

func quoted(names []string) string {
	var b strings.Builder
	for _, n := range names {
		b.WriteString(strconv.QuoteToASCII(n) + "\n")
	}
	return b.String()
}

const caseScript = `
mount -t ext4 %[1]s /mnt
mkdir /mnt/any /mnt/few
chattr +F /mnt/any /mnt/few
guesttest touch /mnt/any > /out/refused%[2]d <<'END'
%[3]sEND
guesttest touch /mnt/few <<'END'
"Ärger"
"plain"
END
umount /mnt
mount -t ext4 -o ro %[1]s /mnt
guesttest look /mnt/any > /out/found%[2]d <<'END'
%[4]sEND
guesttest look /mnt/few >> /out/few%[2]d <<'END'
"\u00e4RGER"
"PLAIN"
"a\u0308rger"
END
umount /mnt
`

const protectScript = `
mount -t ext4 %[1]s /mnt
guesttest protect /mnt
umount /mnt
mount -t ext4 -o ro,noatime %[1]s /mnt
guesttest walk /mnt > /out/protected
umount /mnt
`

// TestInGuest looks names up as a kernel does that ignores case, and reads what one encrypts and signs.
func TestInGuest(t *testing.T) {
	guesttest.Needs(t, "mkfs.ext4", "chattr")
	names, asked := caseNames()
	var images []string
	script := ""
	for i, mkfs := range [][]string{{"-b", "1024", "-E", "encoding=utf8"}, {"-b", "4096", "-E", "encoding=utf8,encoding_flags=strict"}} {
		images = append(images, guesttest.Sparse(t, 64<<20))
		guesttest.Run(t, slices.Concat([]string{"mkfs.ext4", "-q", "-F", "-O", "casefold", "-N", "16000"}, mkfs, []string{images[i]})...)
		if i > 0 { // it takes a while in a machine that is emulated
			names, asked = everyNth(names, 10), everyNth(asked, 10)
		}
		script += fmt.Sprintf(caseScript, fmt.Sprintf("/dev/vd%c", 'a'+i), i, quoted(names), quoted(asked))
	}
	protected := guesttest.Sparse(t, 64<<20)
	guesttest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "encrypt,verity", protected)
	script += fmt.Sprintf(protectScript, "/dev/vdc")
	_, out := guesttest.Inside(t, append(images, protected), script, "chattr")
	compareProtected(t, open(t, protected, guest.Options{}), guesttest.Manifest(t, out["protected"]))
	for i, image := range images {
		f := open(t, image, guest.Options{})
		d, err := guesttest.Find(f, "any")
		if err != nil {
			t.Fatal(err)
		}
		in, err := f.dir(d)
		if err != nil || in.flags&(flagCasefold|flagIndex) != flagCasefold|flagIndex {
			t.Fatalf("%#x %v", in.flags, err)
		}
		said := string(out[fmt.Sprint("found", i)])
		compareLookups(t, f, "any", said)
		compareLookups(t, f, "few", string(out[fmt.Sprint("few", i)]))
		if !f.sound.has(in.no) {
			t.Error("an index of the kernel's is not sound")
		}
		t.Logf("%d refused, %d asked for, %d not there", strings.Count(string(out[fmt.Sprint("refused", i)]), "\n"), strings.Count(said, "\n"),
			strings.Count("\n"+said, "\n0 "))
	}
}

// compareLookups looks up what the kernel was asked for.
func compareLookups(t *testing.T, f *FS, dir, said string) {
	t.Helper()
	d, err := guesttest.Find(f, dir)
	if err != nil || said == "" {
		t.Fatal(said, err)
	}
	for line := range strings.Lines(said) {
		number, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, err := strconv.Unquote(text)
		if err != nil {
			t.Fatal(err)
		}
		ino, err := f.Lookup(d, name)
		if err != nil && !errors.Is(err, guest.ErrNotExist) {
			t.Error(err)
		}
		if number != fmt.Sprint(ino) {
			t.Errorf("%s: inode %d, the kernel says %s", text, ino, number)
		}
	}
}

// compareProtected compares what the kernel shows without the key.
func compareProtected(t *testing.T, f *FS, want []guesttest.Line) {
	t.Helper()
	inside := func(l guesttest.Line) bool { return strings.HasPrefix(l.Path, "secret/") }
	n := len(want)
	if want = slices.DeleteFunc(want, inside); n-len(want) != 3 {
		t.Errorf("%d encrypted names", n-len(want))
	}
	got, err := guesttest.WalkFS(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range got {
		if l.Path == "secret" && strings.Contains(l.Fields["error"], "encrypted directory") {
			delete(l.Fields, "error")
		}
	}
	guesttest.Same(t, want, got)
	if i := slices.IndexFunc(want, func(l guesttest.Line) bool { return l.Path == "verity" && l.Fields["size"] == "300007" }); i < 0 {
		t.Error("no file with a signature")
	}
}
