package guesttest

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// insideName is what the test's own program is called in a guest.
const insideName = "guesttest"

// Filler fills a mounted directory, as Fill does.
type Filler func(dir string, tree Tree) (skipped []string, err error)

// Main is what TestMain calls in a package whose tests use Inside: the program of the tests is a tool, too, when it runs in a guest. It can fill
// by these functions, besides Fill.
func Main(m *testing.M, fillers map[string]Filler) {
	if filepath.Base(os.Args[0]) != insideName {
		os.Exit(m.Run())
	}
	if err := inside(fillers, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, insideName, os.Args[1:], err)
		os.Exit(1)
	}
}

// Inside is Guest for a script that has a further program, guesttest, which does in the guest what this package does on the host:
//
//	guesttest fill DIR TREE       Fill, with TREE from Tree.Text; prints what was refused; a name behind TREE is of another Filler
//	guesttest burst DIR SEED N    Burst
//	guesttest walk DIR            Walk, in JSON
//	guesttest crash DIR           ends all writing to a file system, as if the machine stopped; its log has been written
//	guesttest touch DIR < NAMES   makes empty files; the names are quoted, one in a line; prints those that were refused
//	guesttest protect DIR         makes a directory "secret" that ext4 encrypts, and a file "verity" that it signs
//	guesttest look DIR < NAMES    prints "INODE NAME" for each line, quoted; the inode is 0 when the name is not there
//
// It gives what the script left in /out as well: name => content.
func Inside(t *testing.T, disks []string, script string, extra ...string) (text string, out map[string][]byte) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	left := Sparse(t, 256<<20)
	script = fmt.Sprintf("mkdir /out\n%s\ntar -C /out -cf /dev/vd%c .\n", script, 'a'+len(disks))
	text = boot(t, append(disks, left), script, map[string]string{insideName: self}, extra)
	f, err := os.Open(left)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out = map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return text, out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[filepath.Base(h.Name)], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

// Text is the tree for a script.
func (t Tree) Text() string {
	b, _ := json.Marshal(t)
	return "'" + string(b) + "'"
}

// Manifest reads what guesttest walk wrote.
func Manifest(t *testing.T, b []byte) []Line {
	t.Helper()
	var list []Line
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	for i, l := range list {
		if _, err := fmt.Sscanf(l.Path, "%q", &list[i].Path); err != nil {
			t.Fatalf("%s: %v", l.Path, err)
		}
	}
	return list
}

func inside(fillers map[string]Filler, what string, args []string) error {
	switch what {
	case "fill":
		var tree Tree
		if err := json.Unmarshal([]byte(args[1]), &tree); err != nil {
			return err
		}
		fill := Fill
		if len(args) > 2 {
			fill = fillers[args[2]]
		}
		skipped, err := fill(args[0], tree)
		for _, s := range skipped {
			fmt.Println(s)
		}
		return err
	case "burst":
		seed, _ := strconv.ParseUint(args[1], 10, 64)
		steps, err := strconv.Atoi(args[2])
		return errors.Join(err, Burst(args[0], seed, steps))
	case "walk":
		list, err := Walk(args[0])
		// A path is bytes, which JSON has no strings for.
		for i, l := range list {
			list[i].Path = strconv.QuoteToASCII(l.Path)
		}
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(list))
	case "crash":
		return crash(args[0])
	case "protect":
		return protect(args[0])
	case "touch":
		return names(func(name string) error {
			f, err := os.OpenFile(args[0]+"/"+name, os.O_CREATE|os.O_EXCL, 0o600)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EEXIST) {
				fmt.Println(strconv.QuoteToASCII(name))
				return nil
			}
			return errors.Join(err, f.Close())
		})
	case "look":
		return names(func(name string) error {
			var st unix.Stat_t
			err := unix.Lstat(args[0]+"/"+name, &st)
			if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("%q: %w", name, err)
			}
			fmt.Println(st.Ino, strconv.QuoteToASCII(name))
			return nil
		})
	}
	return errors.New("what?")
}

// crash is XFS_IOC_GOINGDOWN, which ext4 has, too.
func crash(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	const goingDown, flushLog = 0x8004587d, 1
	return unix.IoctlSetPointerInt(int(d.Fd()), goingDown, flushLog)
}

// names calls fn for the names on standard input.
func names(fn func(name string) error) error {
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		name, err := strconv.Unquote(strings.TrimSpace(line))
		if err == nil {
			err = fn(name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
