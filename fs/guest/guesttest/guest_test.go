package guesttest

import (
	"strings"
	"testing"
)

// TestGuest makes sure that a guest writes to the disk of a test and says what it did, and that it has the modules.
func TestGuest(t *testing.T) {
	image := Sparse(t, 64<<20)
	out := Guest(t, []string{image}, `
uname -r
modprobe -a dm-raid dm-thin-pool xfs
lsmod | awk '{print $1}' | tr '\n' ' '
echo
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
echo hello > /mnt/file
umount /mnt
dmsetup version 2>/dev/null || true
cat /proc/mdstat
`, "mkfs.ext4")
	for _, want := range []string{"dm_thin_pool", "raid456", "xfs", "Personalities"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	dir, _ := Mount(t, image, "ext4", "ro")
	if got := Run(t, "cat", dir+"/file"); got != "hello\n" {
		t.Errorf("got %q", got)
	}
	t.Log(out)
}
