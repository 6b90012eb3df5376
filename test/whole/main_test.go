package whole

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// program is the binary under test, built by TestMain.
var program string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp(scratch(), "holdfast-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// Some tests run it as another user.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	program = filepath.Join(dir, "holdfast")
	build := exec.Command("go", "build", "-o", program, "github.com/holdfast-backup/holdfast/cmd/holdfast")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build holdfast:", err)
		return 1
	}
	return m.Run()
}

// scratch is where large sparse files can be made.
func scratch() string { return cmp.Or(os.Getenv("HOLDFAST_TEST_DIR"), "/var/tmp") }

// newDir is like t.TempDir, on a disk and readable by all users.
func newDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch(), "holdfast-whole-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

// needs skips a test on a machine that lacks something: "root", "fuse", a module as
// "/usr/bin/python3 NAME", or else a program.
func needs(t *testing.T, things ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short")
	}
	for _, thing := range things {
		var err error
		switch thing {
		case "root":
			if os.Geteuid() != 0 {
				err = syscall.EPERM
			}
		case "fuse":
			var f *os.File
			if f, err = os.OpenFile("/dev/fuse", os.O_RDWR, 0); err == nil {
				f.Close()
			}
		default:
			program, module, ok := strings.Cut(thing, " ")
			if _, err = exec.LookPath(program); ok && err == nil {
				err = exec.Command(program, "-c", "import "+module).Run()
			}
		}
		switch {
		case err == nil:
		case os.Getenv("HOLDFAST_TEST_ALL") == "1":
			t.Fatalf("needs %s: %v", thing, err)
		default:
			t.Skipf("needs %s: %v", thing, err)
		}
	}
}
