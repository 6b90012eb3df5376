package guesttest

import (
	"fmt"
	"strings"
	"testing"
)

// GuestMount is an image, and how a guest mounts it.
type GuestMount struct {
	Image, Type, Options string
}

// TruthGuest is Truth by the kernel of a guest, which knows file systems that the host's may not, for several images in one boot.
// It does not tell times of birth, nor extended attributes, nor the sums of files of 256 MiB and more.
func TruthGuest(t *testing.T, images ...GuestMount) [][]Line {
	t.Helper()
	Needs(t, "find", "stat", "sha256sum")
	var disks []string
	script := "mkdir -p /t\n" // /bin/find, since the shell has one of its own; cat, since on a terminal find hides odd characters
	for i, m := range images {
		disks = append(disks, m.Image)
		script += fmt.Sprintf(`mount -t %s -o ro,%s /dev/vd%c /t
cd /t
/bin/find . -printf '%%P\0%%y\0%%m\0%%n\0%%U\0%%G\0%%s\0%%b\0%%T@\0%%A@\0%%C@\0%%l\0%%i\0' | cat
printf 'END\0'
/bin/find . \( -type b -o -type c \) -exec stat --printf '%%n\0%%Hr:%%Lr\0' {} +
printf 'END\0'
/bin/find . -type f -size -256M -exec sha256sum -z {} +
printf 'END\0'
cd /
umount /t
`, m.Type, m.Options, 'a'+i)
	}
	words := strings.Split(Guest(t, disks, script, "find", "stat", "sha256sum"), "\x00")
	var out [][]Line
	for range images {
		var list []Line
		list, words = guestLines(t, words)
		out = append(out, list)
	}
	return out
}

// guestLines reads what the script wrote of one image.
func guestLines(t *testing.T, words []string) ([]Line, []string) {
	t.Helper()
	all, inodes := map[string]map[string]string{}, map[string]string{}
	const fields = 13
	for ; len(words) > fields && words[0] != "END"; words = words[fields:] {
		w := words[:fields]
		var mode, blocks int64
		fmt.Sscanf(w[2], "%o", &mode)
		fmt.Sscan(w[7], &blocks)
		l := map[string]string{"type": w[1], "mode": fmt.Sprintf("%04o", mode), "nlink": w[3], "uid": w[4], "gid": w[5], "size": w[6], "blocks": fmt.Sprint(blocks * 512)}
		for i, name := range []string{"mtime", "atime", "ctime"} {
			l[name] = (w[8+i] + "0")[:len(w[8+i])-1] // find has ten digits
		}
		if w[1] == "l" {
			l["target"] = Quote(w[11])
		}
		all[w[0]], inodes[w[0]] = l, w[12]
	}
	if len(words) == 0 {
		t.Fatal("the guest's list ends early")
	}
	for words = words[1:]; len(words) > 1 && words[0] != "END"; words = words[2:] {
		all[strings.TrimPrefix(words[0], "./")]["rdev"] = words[1]
	}
	for words = words[1:]; len(words) > 1 && words[0] != "END"; words = words[1:] {
		sum, name, ok := strings.Cut(words[0], "  ./")
		if !ok || all[name] == nil {
			t.Fatalf("the guest's sum: %q", words[0])
		}
		all[name]["sum"] = sum
	}
	return lines(all, inodes), words[1:]
}
