package whole

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

// TestExclude: a Debian system that has deleted and swapped is stored smaller without what it does not need; what is restored has
// all files, passes e2fsck, finds its swap by its old name, and boots.
func TestExclude(t *testing.T) {
	d := newBootable(t)
	used := filepath.Join(newDir(t), "used.raw")
	if err := testimage.CopySparse(t.Context(), d.disk.Path, used); err != nil {
		t.Fatal(err)
	}
	root, swap := d.disk.Root, d.disk.Swap
	within := fmt.Sprintf("offset=%d,sizelimit=%d", root.Off, root.Len)
	dir, unmount := guesttest.Mount(t, used, "ext4", within)
	const junk = 300 << 20
	if err := os.WriteFile(dir+"/junk", randomBytes(1, junk), 0o600); err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "sync", "-f", dir)
	if err := os.Remove(dir + "/junk"); err != nil {
		t.Fatal(err)
	}
	unmount()
	f, err := os.OpenFile(used, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const swapped = 100 << 20
	if _, err := f.WriteAt(randomBytes(2, swapped), swap.Off+256<<10); err != nil {
		t.Fatal(err)
	}

	stored := map[string]int64{}
	for _, what := range []string{"none", "swap", "swap,free"} {
		r := newRepository(t)
		p, _ := r.backup(t, used, "--vm", "debian", "--exclude", what)
		stored[what] = p.Stored
	}
	t.Logf("bytes stored: %v", stored)
	if got := stored["none"] - stored["swap"]; got < swapped*9/10 {
		t.Errorf("without swap %d bytes less are stored", got)
	}
	if got := stored["swap"] - stored["swap,free"]; got < junk*9/10 {
		t.Errorf("without free space %d bytes less are stored", got)
	}

	p, _ := d.backup(t, used, "--vm", "debian", "--exclude", "swap,free")
	out := newDir(t)
	d.must(t, "restore", p.path(), "--to", out)
	restored := filepath.Join(out, "disk0.raw")
	guesttest.Run(t, "e2fsck", "-fn", fmt.Sprintf("%s?offset=%d", restored, root.Off))
	want, got := walkPart(t, used, within), walkPart(t, restored, within)
	guesttest.Same(t, want, got)
	if len(want) < 5000 {
		t.Errorf("only %d files", len(want))
	}
	name := func(image string) string {
		return guesttest.Run(t, "blkid", "-p", "-o", "value", "-s", "UUID", "-O", fmt.Sprint(swap.Off), image)
	}
	if a, b := name(used), name(restored); a != b || strings.TrimSpace(a) == "" {
		t.Errorf("the swap area is %q, was %q", b, a)
	}

	b := d.boot(t, p.path(), "--name", "excluded")
	line := b.line(t)
	line.shell(t)
	if said := line.do(t, "swapon /dev/vda4 2>/dev/null; grep -c vda4 /proc/swaps"); !strings.Contains(said, "1") {
		t.Errorf("swapon: %q", said)
	}
	d.must(t, "boot", "stop", b.ID, "--boots", d.boots, "--patience", "0s")
}

// walkPart walks a file system within an image.
func walkPart(t *testing.T, image, within string) []guesttest.Line {
	t.Helper()
	dir, unmount := guesttest.Mount(t, image, "ext4", "ro,noatime,"+within)
	defer unmount()
	lines, err := guesttest.Walk(dir)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}
