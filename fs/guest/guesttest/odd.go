package guesttest

import (
	"cmp"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// oddNames are names in one case, in two, and with characters of one byte, two and three units in UTF-8 and one or two in UTF-16.
var oddNames = []string{"UPPER.TXT", "lower.txt", "lower.EXT", "BASE.ext", "Mixed Case.Txt", "NODOT", "nodot2", "a.b.c.d", "ünï.txt", "ÄÖÜ", "日本語のファイル", "emoji \U0001F680 here",
	strings.Repeat("x", 255), strings.Repeat("é", 255), strings.Repeat("\U0001F600", 127), "exactly13char", "exactly 26 characters long", " lead", "a b", "+,;=[]", "x~1", "sharp ß", "dotted İ", "Ωmega"}

// Little is a smaller Odd.
func Little(dir string, _ Tree) ([]string, error) { return Odd(dir, Tree{Names: 60}) }

// Odd fills a directory with what is peculiar to FAT and exFAT; tree.Names is how many names its large directory gets.
func Odd(dir string, tree Tree) ([]string, error) {
	var failed error
	do := func(err error) {
		if failed == nil && err != nil {
			failed = err
		}
	}
	content := func(n int) []byte { return []byte(strings.Repeat(fmt.Sprint(n, " "), n/2+1))[:n] }
	do(os.Mkdir(dir+"/names", 0o755))
	for i, name := range oddNames {
		do(os.WriteFile(dir+"/names/"+name, content(i), 0o644))
		do(os.Mkdir(dir+"/names/d"+string([]rune(name)[:min(20, len([]rune(name)))]), 0o755))
	}
	// A large directory with holes, in which new names then take the room of old ones.
	do(os.Mkdir(dir+"/holes", 0o755))
	names := cmp.Or(tree.Names, 400)
	for i := range names {
		do(os.WriteFile(fmt.Sprintf("%s/holes/some file number %d", dir, i), content(i%50), 0o644))
	}
	for i := 0; i < names; i += 3 {
		do(os.Remove(fmt.Sprintf("%s/holes/some file number %d", dir, i)))
	}
	for i := range 40 {
		do(os.WriteFile(fmt.Sprintf("%s/holes/%d", dir, i), content(i), 0o644))
	}
	do(os.Rename(dir+"/holes/1", dir+"/renamed to something longer"))
	at := dir
	for i := range 12 {
		at = fmt.Sprintf("%s/level %d", at, i)
		do(os.Mkdir(at, 0o755))
		do(os.WriteFile(at+"/file", content(i), 0o644))
	}
	for _, n := range []int{0, 1, 511, 512, 513, 2048, 4095, 4096, 4097, 8192, 65536, 262144, 262145} {
		do(os.WriteFile(fmt.Sprint(dir, "/size ", n), content(n), 0o644))
	}
	do(os.WriteFile(dir+"/readonly", []byte("x"), 0o644))
	do(os.Chmod(dir+"/readonly", 0o555))
	do(os.Mkdir(dir+"/readonly dir", 0o755))
	os.Chmod(dir+"/readonly dir", 0o555)
	var w [3]*os.File
	for i := range w {
		f, err := os.Create(fmt.Sprint(dir, "/taking turns ", i))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		w[i] = f
	}
	for i := range 60 {
		for _, f := range w {
			_, err := f.WriteAt(content(4096 + i)[:4096], int64(i)*4096)
			do(err)
			do(f.Sync())
		}
	}
	if err := unix.Fallocate(int(w[0].Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 300000); err != unix.EOPNOTSUPP {
		do(err)
	}
	for i, sec := range []int64{315532800, 315532801, 951782399, 951782400, 1e9 + 7, 4102444799, 4354819198} {
		p := fmt.Sprint(dir, "/time ", i)
		do(os.WriteFile(p, nil, 0o644))
		do(os.Chtimes(p, time.Unix(sec+86400, 5), time.Unix(sec, 123456789)))
	}
	return nil, failed
}
