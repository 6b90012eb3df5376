//go:build linux

package testimage

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
)

func TestFindMirror(t *testing.T) {
	const release = "NAME=x\nVERSION_CODENAME=bookworm\n"
	for name, c := range map[string]struct {
		file, content string
		want          mirror
	}{
		"one line": {
			"sources.list", "# deb http://old.example/debian bookworm main\ndeb-src http://src.example/debian bookworm main\ndeb http://sec.example/debian bookworm-security main\ndeb http://a.example/debian bookworm main contrib # here\n",
			mirror{uri: "http://a.example/debian", suite: "bookworm"},
		},
		"options": {
			"sources.list.d/x.list", "deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] https://b.example/debian/ bookworm main\n",
			mirror{uri: "https://b.example/debian/", suite: "bookworm", keyring: "/usr/share/keyrings/k.gpg"},
		},
		"deb822": {
			"sources.list.d/debian.sources", "Types: deb\nURIs: http://c.example/n\nSuites: nodistro\nComponents: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n\nTypes: deb deb-src\n# a comment\nURIs: http://d.example/debian http://e.example\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n",
			mirror{uri: "http://d.example/debian", suite: "bookworm", keyring: "/k.gpg"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			etc := t.TempDir()
			write(t, filepath.Join(etc, "os-release"), release)
			write(t, filepath.Join(etc, "apt", c.file), c.content)
			got, err := findMirror(etc)
			if err != nil || got != c.want {
				t.Errorf("got %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
	etc := t.TempDir()
	write(t, filepath.Join(etc, "os-release"), release)
	if m, err := findMirror(etc); err == nil {
		t.Errorf("found %v where there is none", m)
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "4096": 4096, "64K": 64 << 10, "512m": 512 << 20, "4G": 4 << 30} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "G", "1T", "-1", "1.5G", "9999999999G"} {
		if got, err := ParseSize(s); err == nil {
			t.Errorf("ParseSize(%q) = %d", s, got)
		}
	}
	f := SizeFlag(512 << 20)
	if f.String() != "512M" {
		t.Errorf("512 MiB prints as %s", f.String())
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := int64(30<<20 + 123)
	for _, off := range []int64{0, 4095, 5 << 20, 9<<20 + 1000, size - 7} {
		if _, err := f.WriteAt([]byte("content"), off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(make([]byte, 4<<20), 12<<20); err != nil { // allocated zeros
		t.Fatal(err)
	}
	if err := CopySparse(t.Context(), src, dst); err != nil {
		t.Fatal(err)
	}
	if _, err := command.Run(t.Context(), "cmp", src, dst); err != nil {
		t.Error(err)
	}
	if n, err := Allocated(dst); err != nil || n > 1<<20 {
		t.Errorf("the copy takes %d bytes, %v: the zeros did not become a hole", n, err)
	}
}

func TestUnescapeOctal(t *testing.T) {
	if got := unescapeOctal(`/a\040b\134c\`); got != `/a b\c\` {
		t.Errorf("got %q", got)
	}
}

// needRoot skips where loop devices cannot be had.
func needRoot(t *testing.T, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for loop mounts")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices here")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s", p)
		}
	}
}

// TestMakeBench builds the smallest pair and has e2fsck look at it.
func TestMakeBench(t *testing.T) {
	needRoot(t, "mkfs.ext4", "e2fsck", "losetup")
	dir := t.TempDir()
	b, err := MakeBench(t.Context(), dir, MinSize)
	if err != nil {
		t.Fatal(err)
	}
	if share := float64(b.Changed*4096) / float64(b.Size); share < 0.003 || share > 0.03 {
		t.Errorf("%.2f %% of the blocks differ", share*100)
	}
	before := filepath.Join(dir, "before.img")
	if err := CopySparse(t.Context(), b.V2, before); err != nil {
		t.Fatal(err)
	}
	if err := Increment(t.Context(), b.V2, 1); err != nil {
		t.Fatal(err)
	}
	n, err := ChangedBlocks(t.Context(), before, b.V2)
	if err != nil || n < b.Changed/2 || n > b.Changed*2 {
		t.Errorf("an increment changed %d blocks, v2 %d: %v", n, b.Changed, err)
	}
	for _, img := range []string{b.V1, b.V2} {
		if _, err := command.Run(t.Context(), "e2fsck", "-fn", img); err != nil {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// TestClean: a mount and a loop device below the folder are no obstacle, and
// nothing of them stays.
func TestClean(t *testing.T) {
	needRoot(t, "mkfs.ext4", "losetup")
	dir := filepath.Join(t.TempDir(), "a b")
	write(t, filepath.Join(dir, "file"), "x")
	img := filepath.Join(dir, "img")
	if err := emptyFile(img, 16<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := command.Run(t.Context(), "mkfs.ext4", "-q", img); err != nil {
		t.Fatal(err)
	}
	if _, err := Mount(t.Context(), Part{Image: img}, "ext4", filepath.Join(dir, "mnt")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(dir, "mnt"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := Clean(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	out, err := command.Run(t.Context(), "losetup", "--list", "--noheadings", "--output", "BACK-FILE")
	if err != nil || bytes.Contains(out, []byte(img)) {
		t.Errorf("loop devices left: %s, %v", out, err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
