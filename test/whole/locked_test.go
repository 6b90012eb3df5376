package whole

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestLocked: an encrypted volume is shown as locked, and opened with a passphrase out of a file.
func TestLocked(t *testing.T) {
	guesttest.Needs(t, "cryptsetup")
	dir := newDir(t)
	image, key, wrong := filepath.Join(dir, "luks.img"), filepath.Join(dir, "key"), filepath.Join(dir, "wrong")
	guesttest.SparseAt(t, image, 40<<20)
	for file, text := range map[string]string{key: "other\nsecret words\n", wrong: "other\n", dir + "/made": "secret words"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	guesttest.Run(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", image, dir+"/made")
	r := newRepository(t)
	r.must(t, "backup", image, "--vm", "vm")
	r.wants(t, 12, "LUKS2 aes-xts-plain64: locked", "ls", "vm/latest/files/disk0")
	r.wants(t, 12, "locked", "ls", "vm/latest/files/disk0", "--guest-key-file", wrong)
	if got := r.must(t, "ls", "vm/latest/files", "--guest-key-file", wrong, "--guest-key-file", key).out; got != "disk0.raw\nvolumes.json\n" {
		t.Errorf("opened: %q", got)
	}
	m := r.mount(t, "--guest-key-file", key)
	if _, err := os.ReadDir(filepath.Join(m.dir, "vm/latest/files")); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(filepath.Join(m.dir, "vm/latest/files/disk0.raw")); err != nil || st.Size() != 24<<20 {
		t.Errorf("%v, %v", st, err)
	}
}
