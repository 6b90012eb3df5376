package whole

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
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

// TestLockedBitLocker: a disk of Windows with a BitLocker partition. A locked one says what opens it, and each of that does.
func TestLockedBitLocker(t *testing.T) {
	guesttest.NeedsPrograms(t, "mkntfs", "ntfscp", "sfdisk")
	dir := newDir(t)
	image := filepath.Join(dir, "windows.img")
	fs, gap := guesttest.BitLockerNTFS(t, 8<<20, 512)
	m := guesttest.BitLocker{Method: 0x8004, Sector: 512, Header: 8192, Protectors: []string{"tpm", "password", "recovery", "external"}}
	v := m.Make(fs, gap, 12)
	m.Protectors = []string{"tpm", "clear"}
	suspended := m.Make(fs, gap, 13)
	guesttest.SparseAt(t, image, 32<<20)
	guesttest.Input(t, "label: gpt\nsize=8M, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\nsize=8M, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\n", "sfdisk", "-q", image)
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := f.WriteAt(v.Image, 1<<20)
	_, err2 := f.WriteAt(suspended.Image, 9<<20)
	if err := errors.Join(err1, err2, f.Close()); err != nil {
		t.Fatal(err)
	}
	r := newRepository(t)
	r.must(t, "backup", image, "--vm", "vm")
	r.wants(t, 12, "BitLocker XTS-AES 128 (TPM and PIN, password, recovery password ", "ls", "vm/latest/files/disk0/p1")
	for name, key := range map[string][]byte{"password": []byte("other\n" + v.Password + "\n"), "recovery": []byte(v.Recovery), "key.BEK": v.BEK} {
		file, out := filepath.Join(dir, name), filepath.Join(dir, name+".out")
		if err := os.WriteFile(file, key, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := r.must(t, "ls", "vm/latest/files/disk0/p1", "--guest-key-file", file).out; !strings.Contains(got, "noise\n") {
			t.Errorf("%s: %q", name, got)
		}
		r.must(t, "cp", "vm/latest/files/disk0/p1/noise", out, "--guest-key-file", file)
		sameNoise(t, out, fs)
	}
	// With protection suspended no key is needed.
	out := filepath.Join(dir, "suspended.out")
	r.must(t, "cp", "vm/latest/files/disk0/p2/noise", out)
	sameNoise(t, out, fs)
}

// sameNoise: a file out of the file system is in it in one piece, as it was put there.
func sameNoise(t *testing.T, file string, fs []byte) {
	t.Helper()
	if b, err := os.ReadFile(file); err != nil || len(b) < 1<<20 || !bytes.Contains(fs, b) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}
