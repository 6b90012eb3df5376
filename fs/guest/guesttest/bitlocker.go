package guesttest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"unicode/utf16"

	"golang.org/x/crypto/xts"
)

// BitLocker makes BitLocker volumes, as J. Metz's "BitLocker Drive Encryption (BDE) format specification" has them. What it makes is
// worth something only because other programs accept it: dislocker, libbde, cryptsetup.
type BitLocker struct {
	Method    uint16 // 0x8000 to 0x8005
	Sector    int    // bytes
	Header    int    // bytes that are moved; 0 for Vista
	ToGo      bool
	Encrypted int64 // bytes from the start on; 0 for all
	ASCII     bool  // the password is
	// Protectors are those that it has, of "tpm", "password", "recovery", "external", "clear".
	Protectors []string
}

// BitLockerVolume is a volume, what it hides, and what opens it.
type BitLockerVolume struct {
	Image, Plain       []byte
	Password, Recovery string
	BEK                []byte // a file
	Metadata           [3]int // where the copies are
}

func le16(n int) []byte    { return binary.LittleEndian.AppendUint16(nil, uint16(n)) }
func le32(n int) []byte    { return binary.LittleEndian.AppendUint32(nil, uint32(n)) }
func le64(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

func bdeDatum(role, kind int, parts ...[]byte) []byte {
	data := slices.Concat(parts...)
	return slices.Concat(le16(8+len(data)), le16(role), le16(kind), le16(1), data)
}

// bdeSecrets are the random numbers of one volume.
type bdeSecrets struct {
	rnd     *rand.Rand
	counter int
}

func (s *bdeSecrets) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(s.rnd.Uint32())
	}
	return b
}

const (
	bdeTime = 0x01d5323636d7a3f5
	bdeSign = "-FVE-FS-"
	bdeGUID = "\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01"

	// Kinds of datums.
	bdeKey, bdeText, bdeStretched, bdeSealed, bdeProtector, bdeExternal, bdePlace = 1, 2, 3, 5, 8, 9, 15
)

// seal encrypts a key by AES-CCM.
func (s *bdeSecrets) seal(role int, with []byte, method int, key []byte) []byte {
	plain := slices.Concat(le32(12+len(key)), le16(1), le16(0), le32(method), key)
	s.counter++
	nonce := slices.Concat(le64(bdeTime), le32(s.counter))
	block, _ := aes.NewCipher(with)
	mac := slices.Concat([]byte{0x3a}, nonce, []byte{0, 0, byte(len(plain))})
	block.Encrypt(mac, mac)
	padded := append(bytes.Clone(plain), make([]byte, (16-len(plain)%16)%16)...)
	for i := 0; i < len(padded); i += 16 {
		subtle.XORBytes(mac, mac, padded[i:i+16])
		block.Encrypt(mac, mac)
	}
	out := append(mac, plain...)
	for i := 0; i < len(out); i += 16 {
		pad := slices.Concat([]byte{2}, nonce, []byte{0, 0, byte(i / 16)})
		block.Encrypt(pad, pad)
		subtle.XORBytes(out[i:], out[i:], pad)
	}
	return bdeDatum(role, bdeSealed, nonce, out)
}

// bdeStretch is the slow hash.
func bdeStretch(hashed [32]byte, salt []byte) []byte {
	b := slices.Concat(make([]byte, 32), hashed[:], salt, make([]byte, 8))
	for i := range uint64(1 << 20) {
		binary.LittleEndian.PutUint64(b[80:], i)
		last := sha256.Sum256(b)
		copy(b, last[:])
	}
	return b[:32]
}

// protectors makes those that have a key of their own, and one of a TPM.
func (m *BitLocker) protectors(s *bdeSecrets, v *BitLockerVolume, master []byte) (all [][]byte) {
	add := func(name string, kind int, with []byte, datums ...[]byte) (id []byte) {
		id = s.bytes(16)
		if slices.Contains(m.Protectors, name) {
			datums = append(datums, s.seal(0, with, 0x2003, master))
			all = append(all, bdeDatum(2, bdeProtector, id, le64(bdeTime), le16(0), le16(kind), slices.Concat(datums...)))
		}
		return id
	}
	stretched := func(method int, salt []byte, key []byte) []byte {
		return bdeDatum(0, bdeStretched, le32(method), salt, s.seal(0, master, 0x2003, key))
	}
	add("tpm", 0x0500, s.bytes(32), bdeDatum(0, 6, s.bytes(64)))
	if slices.Contains(m.Protectors, "password") {
		v.Password = "pass wörd £ \U0001f40e"
		if m.ASCII {
			v.Password = "a password"
		}
		var u []byte
		for _, c := range utf16.Encode([]rune(v.Password)) {
			u = append(u, le16(int(c))...)
		}
		h, salt := sha256.Sum256(u), s.bytes(16)
		key := bdeStretch(sha256.Sum256(h[:]), salt)
		add("password", 0x2000, key, stretched(0x1001, salt, key))
	}
	if slices.Contains(m.Protectors, "recovery") {
		number, salt := s.bytes(16), s.bytes(16)
		for i := 0; i < 16; i += 2 {
			v.Recovery += fmt.Sprintf("-%06d", 11*int(binary.LittleEndian.Uint16(number[i:])))
		}
		v.Recovery = v.Recovery[1:]
		key := bdeStretch(sha256.Sum256(number), salt)
		add("recovery", 0x0800, key, stretched(0x1000, salt, key))
	}
	external := s.bytes(32)
	name := []byte("E\x00x\x00t\x00e\x00r\x00n\x00a\x00l\x00K\x00e\x00y\x00\x00\x00")
	id := add("external", 0x0200, external, bdeDatum(0, bdeText, name), bdeDatum(0, 4, le32(0x2002), s.seal(0, master, 0x2003, external)))
	key := bdeDatum(6, bdeExternal, id, le64(bdeTime), bdeDatum(0, bdeText, name), bdeDatum(0, bdeKey, le32(0x2002), external))
	v.BEK = slices.Concat(le32(48+len(key)), le32(1), le32(48), le32(48+len(key)), id, le32(1), le32(0), le64(bdeTime), key)
	if slices.Contains(m.Protectors, "clear") {
		key := s.bytes(32)
		add("clear", 0, key, bdeDatum(0, bdeKey, le32(0x2000), key))
	}
	return all
}

// Make encrypts a file system. From gap on it has nothing for 1 MiB, which takes the metadata. The seed makes the keys.
func (m *BitLocker) Make(plain []byte, gap int, seed uint64) *BitLockerVolume {
	s := &bdeSecrets{rnd: rand.New(rand.NewPCG(seed, 9))}
	gap = (gap + 4095) &^ 4095
	v := &BitLockerVolume{Plain: bytes.Clone(plain), Image: bytes.Clone(plain), Metadata: [3]int{gap, gap + 128<<10, gap + 320<<10}}
	headerAt := gap + 512<<10
	master := s.bytes(32)
	all := m.protectors(s, v, master)
	region, version, unit := 64<<10, 2, 16
	if m.Header == 0 {
		region, version, unit = 16<<10, 1, 1
	}
	clear(v.Plain[headerAt : headerAt+m.Header])
	for _, at := range v.Metadata {
		clear(v.Plain[at : at+region])
	}

	key, cryptor := m.cipher(s)
	encrypted := m.Encrypted
	if encrypted == 0 {
		encrypted = int64(len(plain))
	}
	start := 8192
	if version == 2 {
		start = m.Header
	}
	for at := start; at < len(plain); at += m.Sector {
		if int64(at) < encrypted {
			cryptor(v.Image[at:at+m.Sector], v.Plain[at:at+m.Sector], at)
		}
	}
	for i := 0; i < m.Header; i += m.Sector {
		to := v.Image[headerAt+i : headerAt+i+m.Sector]
		if copy(to, plain[i:]); int64(headerAt+i) < encrypted {
			cryptor(to, plain[i:i+m.Sector], headerAt+i)
		}
	}

	label := []byte("V\x00M\x00 \x00C\x00:\x00\x00\x00")
	set := slices.Concat(bdeDatum(7, bdeText, label), slices.Concat(all...), s.seal(3, master, int(m.Method), key))
	last := le64(uint64(headerAt))
	if version == 1 {
		last = plain[56:64]
	} else {
		set = append(set, bdeDatum(15, bdePlace, le64(uint64(headerAt)), le64(uint64(m.Header)))...)
	}
	set = slices.Concat(le32(48+len(set)), le32(1), le32(48), le32(48+len(set)), s.bytes(16), le32(s.counter+2), le32(int(m.Method)), le64(bdeTime), set)
	size := (64 + len(set) + 15) &^ 15
	head := slices.Concat([]byte(bdeSign), le16(size/unit), le16(version), le16(4), le16(4))
	head = slices.Concat(head, le64(uint64(encrypted)), le32(0), le32(m.Header/m.Sector)) // Vista has zeros, which dislocker does not take
	for _, at := range v.Metadata {
		head = append(head, le64(uint64(at))...)
	}
	block := slices.Concat(head, last, set)
	block = append(block, make([]byte, size-len(block))...)
	sum := sha256.Sum256(block)
	block = slices.Concat(block, le16(region-size), le16(version), le32(int(crc32.ChecksumIEEE(block))), s.seal(0, master, 0x2005, sum[:]))
	for _, at := range v.Metadata {
		clear(v.Image[at : at+region])
		copy(v.Image[at:], block)
	}
	m.boot(v, plain)
	return v
}

// boot makes the boot sector.
func (m *BitLocker) boot(v *BitLockerVolume, plain []byte) {
	b := v.Image[:512]
	if m.Header == 0 { // Vista
		copy(b[3:], bdeSign)
		copy(b[56:], le64(uint64(v.Metadata[0]/(m.Sector*int(plain[13])))))
		return
	}
	clear(v.Image[:m.Header])
	copy(b, "\xeb\x58\x90"+bdeSign)
	copy(b[11:], le16(m.Sector))
	b[13], b[21], b[24], b[26] = byte(4096/m.Sector), 0xf8, 0x3f, 0xff
	copy(b[36:], le32(0x1fe0))
	b[48], b[50], b[64], b[66] = 1, 6, 0x80, 0x29
	copy(b[71:], "NO NAME    FAT32   ")
	at := 160
	if m.ToGo {
		at = 424
		copy(b[3:], "MSWIN4.1")
	}
	copy(b[at:], bdeGUID)
	for i, place := range v.Metadata {
		copy(b[at+16+8*i:], le64(uint64(place)))
	}
	b[510], b[511] = 0x55, 0xaa
}

// cipher makes a key, as the metadata has it, and what encrypts a sector at a place.
func (m *BitLocker) cipher(s *bdeSecrets) (key []byte, encrypt func(to, from []byte, at int)) {
	n := 16 << (m.Method & 1)
	if m.Method >= 0x8004 {
		key = s.bytes(2 * n)
		c, _ := xts.NewCipher(aes.NewCipher, key)
		return key, func(to, from []byte, at int) { c.Encrypt(to, from, uint64(at/m.Sector)) }
	}
	diffuse := m.Method <= 0x8001
	key = s.bytes(n)
	if diffuse {
		key = s.bytes(64)
	}
	block, _ := aes.NewCipher(key[:n])
	return key, func(to, from []byte, at int) {
		copy(to, from)
		if diffuse {
			bdeDiffuse(to, key[32:32+n], at)
		}
		iv := slices.Concat(le64(uint64(at)), le64(0))
		block.Encrypt(iv, iv)
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(to, to)
	}
}

// bdeDiffuse is the sector key and the two diffusers in the direction of encryption (Ferguson 2006, §4.4 to 4.6).
func bdeDiffuse(b, tweak []byte, at int) {
	block, _ := aes.NewCipher(tweak)
	key := slices.Concat(le64(uint64(at)), le64(0), le64(uint64(at)), le64(0x80<<56))
	block.Encrypt(key, key[:16])
	block.Encrypt(key[16:], key[16:])
	n := len(b) / 4
	d := make([]uint32, n)
	for i := range d {
		d[i] = binary.LittleEndian.Uint32(b[4*i:]) ^ binary.LittleEndian.Uint32(key[4*i%32:])
	}
	for i := 5*n - 1; i >= 0; i-- {
		d[i%n] -= d[(i+n-2)%n] ^ bits.RotateLeft32(d[(i+n-5)%n], []int{9, 0, 13, 0}[i%4])
	}
	for i := 3*n - 1; i >= 0; i-- {
		d[i%n] -= d[(i+2)%n] ^ bits.RotateLeft32(d[(i+5)%n], []int{0, 10, 0, 25}[i%4])
	}
	for i, w := range d {
		binary.LittleEndian.PutUint32(b[4*i:], w)
	}
}

// BitLockerNTFS makes an NTFS file system with noise in files, "gap" and "noise", and says where the first of them has its 1 MiB, for
// BitLocker's metadata.
func BitLockerNTFS(t testing.TB, size, sector int) (image []byte, gap int) {
	t.Helper()
	dir := t.TempDir()
	fs, files := filepath.Join(dir, "fs"), []string{filepath.Join(dir, "gap"), filepath.Join(dir, "noise")}
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 1<<20+8192)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	if err := errors.Join(os.WriteFile(fs, nil, 0o600), os.Truncate(fs, int64(size))); err != nil {
		t.Fatal(err)
	}
	run("mkntfs", "-q", "-F", "-Q", "-s", fmt.Sprint(sector), "-p", "0", "-H", "0", "-S", "0", fs)
	for i, file := range files {
		if err := os.WriteFile(file, noise, 0o600); err != nil {
			t.Fatal(err)
		}
		run("ntfscp", fs, file, filepath.Base(file))
		noise[0] += byte(i + 1)
	}
	image, err := os.ReadFile(fs)
	if err != nil {
		t.Fatal(err)
	}
	noise[0] -= 3
	if gap = bytes.Index(image, noise[:4096]); gap < 0 || !bytes.Equal(image[gap:gap+len(noise)], noise) {
		t.Fatal("the file is not in one piece")
	}
	return image, gap
}
