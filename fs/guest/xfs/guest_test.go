package xfs

import (
	"fmt"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func TestMain(m *testing.M) { guesttest.Main(m, nil) }

// guestScript fills a file system, stops while its log has what is not elsewhere yet, and lets the kernel replay that on a copy.
const guestScript = `
mount -t xfs %[1]s /mnt
guesttest fill /mnt %[3]s
umount /mnt
mount -t xfs %[1]s /mnt
guesttest burst /mnt 1 60 >&2
guesttest crash /mnt
umount /mnt
dd if=%[1]s of=%[2]s bs=1M 2>/dev/null
mount -t xfs %[2]s /mnt
umount /mnt
mount -t xfs -o ro,noatime %[2]s /mnt
guesttest walk /mnt > /out/%[4]d
umount /mnt
`

// TestVersion4InGuest reads what a kernel that has version 4 makes, before and after that kernel replays the log.
func TestVersion4InGuest(t *testing.T) {
	tree := guesttest.Tree{Seed: 7, Files: 60, Big: 256 << 10, Names: 300, Fragments: 12, NoHuge: true}
	variants := []variant{
		{name: "4 old", mkfs: []string{"-m", "crc=0", "-n", "ftype=0,size=4096", "-i", "size=256,attr=1,projid32bit=0", "-b", "size=512", "-l", "version=1"}},
		{name: "4 with types", mkfs: []string{"-m", "crc=0", "-n", "ftype=1,size=65536,version=ci", "-l", "su=64k"}},
	}
	var images []string
	script := ""
	for i, v := range variants {
		v.size = 96 << 20
		images = append(images, v.empty(t), guesttest.Sparse(t, v.size))
		script += fmt.Sprintf(guestScript, fmt.Sprintf("/dev/vd%c", 'a'+2*i), fmt.Sprintf("/dev/vd%c", 'b'+2*i), tree.Text(), i)
	}
	text, out := guesttest.Inside(t, images, script)
	t.Log(text)
	for i, v := range variants {
		t.Run(strings.ReplaceAll(v.name, " ", "-"), func(t *testing.T) {
			want := guesttest.Manifest(t, out[fmt.Sprint(i)])
			dirty := open(t, images[2*i], guest.Options{})
			if i := dirty.Info(); !i.Replayed || len(i.Warnings) > 0 {
				t.Errorf("%+v", i)
			}
			guesttest.SameFS(t, want, dirty)
			guesttest.SameFS(t, want, open(t, images[2*i+1], guest.Options{}))
			stale, err := guesttest.WalkFS(open(t, images[2*i], guest.Options{NoReplay: true}))
			if err == nil && len(guesttest.Diff(want, stale)) == 0 {
				t.Error("nothing was to be replayed")
			}
			t.Log(len(want), "lines")
		})
	}
}
