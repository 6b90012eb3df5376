package guesttest

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Job is what a kernel of a guest does with a file system that the host's kernel does not know: mount it, fill it, unmount it, and
// walk a fresh mount of it.
type Job struct {
	Image   string // a raw disk; what is filled in is there afterwards
	Type    string // as mount(8) takes it
	Options string // of the mount, besides ro or rw
	Fill    string // which of the functions that Main has fills it; "" for none
	Tree    Tree   // for that function
	Keep    bool   // at the end it stays mounted for writing, as on a machine that runs
}

// Done is what came of a Job.
type Done struct {
	Lines   []Line   // what the kernel shows
	Skipped []string // what it refused while filling
}

// Filler fills a mounted directory, as Fill does.
type Filler func(dir string, tree Tree) (skipped []string, err error)

// jobsFile is where a test's program finds its jobs when it runs in a guest. The last disk takes the answer.
const jobsFile = "/jobs.json"

// answerSize is that disk's size, bytes.
const answerSize = 64 << 20

// Main is the TestMain of a package that calls InGuest: there, the test's own program does the work in the guest.
func Main(m *testing.M, fillers map[string]Filler) {
	if os.Getenv("HOLDFAST_GUEST_JOBS") == "" {
		os.Exit(m.Run())
	}
	if err := runJobs(fillers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// InGuest has the kernel of a guest do all jobs, one after the other. It skips the test as Guest does.
func InGuest(t *testing.T, jobs []Job, programs ...string) []Done {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(jobs)
	if err != nil {
		t.Fatal(err)
	}
	answer := Sparse(t, answerSize)
	var disks []string
	for _, j := range jobs {
		disks = append(disks, j.Image)
	}
	Guest(t, append(disks, answer), fmt.Sprintf("cat > %s <<'END'\n%s\nEND\nHOLDFAST_GUEST_JOBS=1 %s >&2\n", jobsFile, text, filepath.Base(self)), append(programs, self)...)
	f, err := os.Open(answer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	z.Multistream(false)
	var done []Done
	if err := json.NewDecoder(z).Decode(&done); err != nil {
		t.Fatal(err)
	}
	return done
}

func runJobs(fillers map[string]Filler) error {
	text, err := os.ReadFile(jobsFile)
	if err != nil {
		return err
	}
	var jobs []Job
	if err := json.Unmarshal(text, &jobs); err != nil {
		return err
	}
	var done []Done
	disk := func(i int) string { return fmt.Sprintf("/dev/vd%c", 'a'+i) }
	for i, j := range jobs {
		d, err := runJob(j, disk(i), fillers[j.Fill])
		if err != nil {
			return fmt.Errorf("%s: %w", j.Image, err)
		}
		done = append(done, d)
		fmt.Fprintln(os.Stderr, j.Image, len(d.Lines), "lines")
	}
	return answerWith(disk(len(jobs)), done)
}

func answerWith(disk string, done []Done) error {
	w, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err := json.NewEncoder(z).Encode(done); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	if err := w.Sync(); err != nil {
		return err
	}
	return w.Close()
}

func runJob(j Job, disk string, fill Filler) (d Done, err error) {
	const dir = "/mnt"
	if fill != nil {
		if err := unix.Mount(disk, dir, j.Type, unix.MS_NOATIME, j.Options); err != nil {
			return d, fmt.Errorf("mount: %w", err)
		}
		if d.Skipped, err = fill(dir, j.Tree); err != nil {
			return d, err
		}
		if err := unix.Unmount(dir, 0); err != nil {
			return d, fmt.Errorf("umount: %w", err)
		}
	}
	if err := unix.Mount(disk, dir, j.Type, unix.MS_RDONLY|unix.MS_NOATIME, j.Options); err != nil {
		return d, fmt.Errorf("mount to read: %w", err)
	}
	if d.Lines, err = Walk(dir); err != nil {
		return d, err
	}
	if err := unix.Unmount(dir, 0); err != nil || !j.Keep {
		return d, err
	}
	kept := "/kept " + strings.TrimPrefix(disk, "/dev/")
	if err := os.Mkdir(kept, 0o755); err != nil {
		return d, err
	}
	if err := unix.Mount(disk, kept, j.Type, unix.MS_NOATIME, j.Options); err != nil {
		return d, err
	}
	return d, os.WriteFile(kept+"/kept", []byte("x"), 0o644)
}
