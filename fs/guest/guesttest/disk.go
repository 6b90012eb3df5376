package guesttest

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Needs skips a test that needs root and these programs, unless all tests are asked for.
func Needs(t *testing.T, programs ...string) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "root"
	}
	needs(t, missing, programs)
}

// NeedsPrograms is Needs for a test that any user may run.
func NeedsPrograms(t *testing.T, programs ...string) {
	t.Helper()
	needs(t, "", programs)
}

func needs(t *testing.T, missing string, programs []string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = p
		}
	}
	switch {
	case missing == "":
	case os.Getenv("HOLDFAST_TEST_ALL") != "":
		t.Fatal("needs ", missing)
	default:
		t.Skip("needs ", missing)
	}
}

// Run runs a program.
func Run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// Input runs a program with a text on its standard input.
func Input(t *testing.T, text string, args ...string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// Sparse makes an empty disk, a file in a directory of the test.
func Sparse(t *testing.T, size int64) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	SparseAt(t, image, size)
	return image
}

// SparseAt makes an empty disk at a path.
func SparseAt(t *testing.T, image string, size int64) {
	t.Helper()
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// Mount mounts an image by a loop device of the kernel. The end of the test unmounts it, unless that has been done.
func Mount(t *testing.T, image, fstype, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	Run(t, "mount", "-t", fstype, "-o", "loop,"+options, image, dir)
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		// Somebody who looks at all mounts of the machine makes one busy for a moment.
		for try := 0; ; try++ {
			out, err := exec.Command("umount", dir).CombinedOutput()
			if err == nil {
				return
			}
			if try == 50 {
				t.Fatalf("umount %s: %v\n%s", dir, err, out)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// Copy copies a disk as it is on the host now, with its holes: what a backup without an agent sees while the guest runs.
func Copy(t *testing.T, image string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "copy")
	Run(t, "cp", "--sparse=always", "--reflink=never", image, out)
	return out
}

// Device is an image as a guest.Device.
type Device struct {
	*os.File
	size int64
}

// Size implements guest.Device.
func (d Device) Size() int64 { return d.size }

// OpenDevice opens an image, read-only, until the end of the test.
func OpenDevice(t testing.TB, image string) Device {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	return Device{f, size}
}

// Truth walks an image as the kernel's own mount of a copy shows it. The copy is mounted for writing first, which
// replays a journal, and then for reading.
func Truth(t *testing.T, image, fstype, options string) []Line {
	t.Helper()
	copied := Copy(t, image)
	_, unmount := Mount(t, copied, fstype, options)
	unmount()
	dir, unmount := Mount(t, copied, fstype, "ro,noatime,"+options)
	defer unmount()
	want, err := Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return want
}

// Same fails the test when a reader does not show what want says.
func Same(t *testing.T, want, got []Line, ignore ...string) {
	t.Helper()
	for _, d := range Diff(want, got, ignore...) {
		t.Error(d)
	}
	for _, l := range got {
		if l.Fields["error"] != "" {
			t.Logf("%s: %s", Quote(l.Path), l.Fields["error"])
		}
	}
}

// Label is what blkid finds as the label of an image, "" for none.
func Label(t *testing.T, image string) string {
	t.Helper()
	out := Run(t, "blkid", "-p", "-o", "export", image)
	for line := range strings.SplitSeq(out, "\n") {
		if label, ok := strings.CutPrefix(line, "LABEL="); ok {
			return strings.ReplaceAll(label, `\ `, " ")
		}
	}
	return ""
}
