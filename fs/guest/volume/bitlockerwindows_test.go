package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// bdeWindows gives a directory with volumes that Windows made: those of cryptsetup's tests, out of Debian's source package, kept in the
// user's cache.
func bdeWindows(t *testing.T) string {
	t.Helper()
	if os.Getenv("HOLDFAST_TEST_ALL") == "" {
		t.Skip("gets Debian's source package of cryptsetup; HOLDFAST_TEST_ALL asks for it")
	}
	guesttest.NeedsPrograms(t, "apt-get", "tar", "xz", "sh")
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	cache = filepath.Join(cache, "holdfast-test")
	dir := filepath.Join(cache, "bitlk-images")
	if _, err := os.Stat(filepath.Join(dir, "images.conf")); err == nil {
		return dir
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp(cache, "bitlk")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	// The sources of the packages that are installed here, with the word changed that makes them sources of sources.
	guesttest.Run(t, "sh", "-e", "-c", `cd "$1"; mkdir -p parts lists/partial
for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
	[ -e "$f" ] && sed 's/^deb /deb-src /; s/^Types:.*/Types: deb-src/' "$f" > parts/$(basename "$f" | sed 's/^sources.list$/all.list/')
done
get() { apt-get -q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$PWD/parts" -o Dir::State::Lists="$PWD/lists" -o APT::Sandbox::User=root "$@"; }
get update
get source --download-only cryptsetup
tar xf cryptsetup_*.orig.tar.* --wildcards '*/tests/bitlk-images.tar.xz' --strip-components=2
tar xf bitlk-images.tar.xz`, "sh", tmp)
	// Another test may have been quicker.
	if err := os.Rename(filepath.Join(tmp, "bitlk-images"), dir); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return dir
}

// TestBitLockerWindows: what Windows encrypted has the SHA-256 that cryptsetup's list says, by each of the keys there.
func TestBitLockerWindows(t *testing.T) {
	dir := bdeWindows(t)
	list, err := os.ReadFile(filepath.Join(dir, "images.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for _, section := range strings.Split("\n"+string(list), "\n[")[1:] {
		name, rest, _ := strings.Cut(section, "]")
		is := map[string]string{}
		for _, line := range strings.Split(rest, "\n") {
			key, value, _ := strings.Cut(line, "=")
			is[key] = value
		}
		t.Run(name, func(t *testing.T) { windowsVolume(t, dir, name, is) })
	}
}

// windowsVolume opens one of them with each of its keys, as the list names them.
func windowsVolume(t *testing.T, dir, name string, is map[string]string) {
	image := filepath.Join(dir, name+".img")
	got, warnings := scanImages(t, Options{}, image)
	v := got["disk0"]
	if v.UUID != is["GUID"] || len(warnings) > 0 && !strings.HasSuffix(name, "-crc") {
		t.Errorf("%+v %v", v, warnings)
	}
	var keys []string
	for _, key := range []string{is["PW"], is["RP"], is["RP2"]} {
		if key != "" {
			keys = append(keys, key)
		}
	}
	if id := is["SK_VMK_GUID"]; id != "" {
		b, err := os.ReadFile(filepath.Join(dir, strings.ToUpper(id)+".BEK"))
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, string(b))
	}
	switch {
	case is["SHA256SUM"] == "": // cryptsetup does not open it: a conversion was under way
		if !errors.Is(v.Err, guest.ErrUnsupported) {
			t.Errorf("%+v", v)
		}
		return
	case strings.Contains(v.Encryption, "clear key"):
		keys = append(keys, "")
	case !errors.Is(v.Err, ErrLocked):
		t.Errorf("without a key: %+v", v)
	}
	for i, key := range keys {
		got, _ := scanImages(t, withKeys(key), image)
		v := got["disk0"]
		if v.Device == nil {
			t.Errorf("key %d: %+v", i, v)
			continue
		}
		first := make([]byte, 512)
		if err := guest.ReadFull(v.Device, first, 0); err != nil || first[510] != 0x55 || v.Signature != "ntfs" && v.Signature != "vfat" {
			t.Errorf("key %d: %+v, %v", i, v, err)
		}
		if i > 0 {
			continue // the key of the volume is the same, or nothing would be right
		}
		if sum := sum(t, v.Device); sum != is["SHA256SUM"] {
			t.Errorf("%s, want %s", sum, is["SHA256SUM"])
		}
	}
}
