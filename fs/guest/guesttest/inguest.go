package guesttest

import (
	"fmt"
	"strings"
	"testing"
)

// Job is what a kernel of a guest does with a file system that the host's kernel may not know: mount it, fill it, unmount it, and
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

// InGuest has the kernel of a guest do all jobs, one after the other. The package's TestMain calls Main. It skips the test as Guest does.
func InGuest(t *testing.T, jobs []Job, programs ...string) []Done {
	t.Helper()
	var disks []string
	script := ""
	for i, j := range jobs {
		disks = append(disks, j.Image)
		mount := func(how, dir string) string {
			return fmt.Sprintf("mount -t %s -o %s /dev/vd%c %s\n", j.Type, strings.TrimSuffix(how+",noatime,"+j.Options, ","), 'a'+i, dir)
		}
		if j.Fill != "" {
			script += mount("rw", "/mnt") + fmt.Sprintf("guesttest fill /mnt %s %s > /out/skipped%d\numount /mnt\n", j.Tree.Text(), j.Fill, i)
		}
		script += mount("ro", "/mnt") + fmt.Sprintf("guesttest walk /mnt > /out/lines%d\numount /mnt\n", i)
		if j.Keep {
			script += fmt.Sprintf("mkdir /kept%d\n%secho x > /kept%d/kept\n", i, mount("rw", fmt.Sprintf("/kept%d", i)), i)
		}
	}
	_, out := Inside(t, disks, script, programs...)
	done := make([]Done, len(jobs))
	for i := range jobs {
		done[i].Lines = Manifest(t, out[fmt.Sprint("lines", i)])
		if text := strings.TrimSpace(string(out[fmt.Sprint("skipped", i)])); text != "" {
			done[i].Skipped = strings.Split(text, "\n")
		}
	}
	return done
}
