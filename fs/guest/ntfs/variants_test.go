package ntfs

import (
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// small is a tree with everything in it, and less of that.
var small = guesttest.Tree{Seed: 2, Files: 150, Names: 150, Big: 3 << 20, NoHuge: true}

func TestVariants(t *testing.T) {
	for name, v := range map[string]struct {
		mkfs   []string
		mount  string
		ignore []string
	}{
		"clusters of 512":             {mkfs: []string{"-c", "512"}},
		"clusters of 1 KiB":           {mkfs: []string{"-c", "1024"}},
		"clusters of 64 KiB":          {mkfs: []string{"-c", "65536"}},
		"clusters of 2 MiB":           {mkfs: []string{"-c", "2097152"}},
		"sectors of 4096":             {mkfs: []string{"-s", "4096"}},
		"compressed":                  {mkfs: []string{"-C"}, mount: "compression"},
		"compressed, clusters of 512": {mkfs: []string{"-C", "-c", "512"}, mount: "compression"},
		"descriptors in $Secure":      {mount: "permissions,acl"},
		// Mode: ntfs-3g writes the $LXMOD of a special file, and shows 0 for it.
		"special files of WSL": {mount: "special_files=wsl", ignore: []string{"mode"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			size, tree := int64(1<<30), small
			if name == "clusters of 2 MiB" { // all of which are written
				size, tree.Files, tree.Names, tree.Big = 4<<30, 20, 40, 1<<20
			}
			if testing.Short() && len(v.ignore) == 0 && !strings.HasPrefix(name, "compressed") {
				t.Skip("takes seconds")
			}
			image := filled(t, tree, size, v.mount, v.mkfs...)
			same(t, image, "", v.ignore...)
			if !testing.Short() && v.mount == "compression" {
				guesttest.Conform(t, open(t, image))
			}
		})
	}
}
