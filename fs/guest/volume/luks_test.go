package volume

import (
	"bytes"
	"crypto/aes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/xts"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// luksKinds are what cryptsetup formats in the guest, each on a partition.
var luksKinds = []string{
	"--type luks1 --pbkdf-force-iterations 1000",
	"--type luks1 --pbkdf-force-iterations 1000 -c aes-cbc-essiv:sha256 -s 256 -h sha1",
	"--type luks1 --pbkdf-force-iterations 1000 -c aes-cbc-plain64 -s 128 -h sha512",
	"--type luks1 --pbkdf-force-iterations 1000 -c aes-xts-plain -s 256 -h ripemd160",
	"--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --sector-size 512",
	"--type luks2 --pbkdf argon2id --pbkdf-force-iterations 4 --pbkdf-memory 1024 --sector-size 4096",
	"--type luks2 --pbkdf argon2i --pbkdf-force-iterations 4 --pbkdf-memory 1024 --sector-size 2048 -s 256",
	"--type luks2 --pbkdf argon2id --pbkdf-force-iterations 4 --pbkdf-memory 1024 -c aes-cbc-essiv:sha256 -s 256 --sector-size 1024 -h sha512 --label name",
	"--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 -c serpent-xts-plain64 -s 512",
}

// luksScript fills each, adds a second passphrase and removes some first ones. At last there is a nest: an array of two
// partitions, encrypted, with a volume group, and a volume in that encrypted once more.
func luksScript() string {
	var s strings.Builder
	s.WriteString(`
echo -n first > /tmp/1; echo -n 'the second one' > /tmp/2
`)
	for i, args := range luksKinds {
		if strings.Contains(args, "luks2") {
			args += " --luks2-metadata-size 16k --luks2-keyslots-size 1m --offset 4096"
		}
		fmt.Fprintf(&s, `cryptsetup luksFormat -q %s --key-file /tmp/1 /dev/vda%d >&2
cryptsetup luksAddKey -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /tmp/1 /dev/vda%[2]d /tmp/2 >&2
cryptsetup open --key-file /tmp/2 /dev/vda%[2]d c >&2
noise /dev/mapper/c 0 1000 || true
sum disk0/p%[2]d /dev/mapper/c
cryptsetup close c
`, args, i+1)
	}
	n := len(luksKinds)
	fmt.Fprintf(&s, `cryptsetup luksRemoveKey -q /dev/vda5 /tmp/1 >&2
yes | mdadm --create /dev/md0 --homehost=h --name=arr --metadata=1.2 --run --level=1 --raid-devices=2 /dev/vda%d /dev/vda%d >&2
fast="-q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /tmp/1 --luks2-metadata-size 16k --luks2-keyslots-size 1m --offset 4096"
cryptsetup luksFormat $fast /dev/md0 >&2
cryptsetup open --key-file /tmp/1 /dev/md0 inner
pvcreate -q /dev/mapper/inner >&2; vgcreate -q -s 1M deep /dev/mapper/inner >&2
lvcreate -q -Wn -n lv -L 8M deep >&2
cryptsetup luksFormat $fast /dev/deep/lv >&2
cryptsetup open --key-file /tmp/1 /dev/deep/lv innermost
noise /dev/mapper/innermost 0 1000 || true
sum deep-lv /dev/mapper/innermost
cryptsetup close innermost; vgchange -an deep >&2; cryptsetup close inner; mdadm --wait /dev/md0 >&2 || true; mdadm --stop /dev/md0 >&2
`, n+1, n+2)
	return s.String()
}

// TestXTS compares XTS with golang.org/x/crypto.
func TestXTS(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		key, want := make([]byte, 32+32*rnd.IntN(2)), make([]byte, 512<<rnd.IntN(4))
		for i := range key {
			key[i] = byte(rnd.Uint32())
		}
		for i := range want {
			want[i] = byte(rnd.Uint32())
		}
		sector := rnd.Uint64() >> rnd.IntN(64)
		other, err := xts.NewCipher(aes.NewCipher, key)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(want))
		other.Encrypt(b, want, sector)
		c, err := newSectorCipher("aes-xts-plain64", key)
		if err != nil {
			t.Fatal(err)
		}
		if c.decrypt(b, len(b), sector, 1); !bytes.Equal(b, want) {
			t.Fatalf("%d bytes of sector %d differ", len(b), sector)
		}
	}
}

func TestLUKS(t *testing.T) {
	image := guesttest.Sparse(t, 100<<20)
	sfdisk(t, image, "label: gpt\n"+strings.Repeat("size=6M\n", len(luksKinds))+"size=20M\nsize=20M\n")
	want, _ := guesttest.Sums(t, []string{image}, luksScript())
	got, warnings := scanImages(t, Options{}, image)
	if len(warnings) > 0 {
		t.Error(warnings)
	}
	for i := range luksKinds {
		v := got[fmt.Sprintf("disk0/p%d", i+1)]
		if v.Device != nil || !errors.Is(v.Err, ErrLocked) || v.Signature != "crypto_LUKS" || len(v.UUID) != 36 {
			t.Errorf("without a key: %+v", v)
		}
		if id := strings.TrimSpace(guesttest.Run(t, "blkid", "-p", "-O", fmt.Sprint((1+6*i)<<20), "-s", "UUID", "-o", "value", image)); id != v.UUID {
			t.Errorf("UUID %s, want %s", v.UUID, id)
		}
	}
	for _, keys := range [][][]byte{{[]byte("wrong"), []byte("first")}, {[]byte("the second one"), []byte("first")}} {
		opt := Options{Unlock: func(l Locked) [][]byte { return keys }}
		got, warnings := scanImages(t, opt, image)
		if len(warnings) > 0 {
			t.Error(warnings)
		}
		for name, w := range want {
			v := got[name]
			switch {
			case name == "disk0/p9": // serpent
				if !errors.Is(v.Err, guest.ErrUnsupported) {
					t.Errorf("%+v", v)
				}
			case name == "disk0/p5" && slices.ContainsFunc(keys, func(k []byte) bool { return string(k) == "wrong" }): // its first key was removed
				if !errors.Is(v.Err, ErrLocked) {
					t.Errorf("%+v", v)
				}
			default:
				sameSum(t, got, name, w)
				if at, err := v.Map(0, 4096); name != "deep-lv" && (err != nil || len(at) != 1 || at[0].Len != 4096) {
					t.Errorf("%s is at %v, %v", name, at, err)
				}
			}
		}
	}
	damagedLUKS(t, image, want["disk0/p6"])
}

// damagedLUKS: with the first header gone the second is used.
func damagedLUKS(t *testing.T, image, want string) {
	t.Helper()
	opt := Options{Unlock: func(Locked) [][]byte { return [][]byte{[]byte("first")} }}
	for _, bad := range []struct{ off, n int64 }{{5000, 1}, {0, 4096}} {
		image := guesttest.Copy(t, image)
		damage(t, image, 31<<20+bad.off, bad.n)
		got, warnings := scanImages(t, opt, image)
		sameSum(t, got, "disk0/p6", want)
		if len(warnings) != 1 {
			t.Error(warnings)
		}
	}
	// Memory is bounded.
	opt.KeyMemory = 512 << 10
	if got, _ := scanImages(t, opt, image); !errors.Is(got["disk0/p6"].Err, ErrLocked) || !errors.Is(got["disk0/p6"].Err, guest.ErrUnsupported) {
		t.Errorf("%+v", got["disk0/p6"])
	}
}
