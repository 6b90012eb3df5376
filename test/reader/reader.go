package reader

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/bits"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"
	"golang.org/x/crypto/argon2"
)

// Options say how to open a repository.
type Options struct {
	Passphrase string // not used when the cipher is "none"
	Scan       bool   // find records by going through the packs, as if all tables were lost
}

// A Repo is an open repository. It is safe for concurrent use.
type Repo struct {
	ID        [16]byte
	ChunkSize int
	Sealed    bool     // bodies and manifests are encrypted
	Points    []*Point // by name of the manifest

	// Damage lists the objects that could not be used, or only in part. What is listed
	// is no hindrance to reading points that do not need it.
	Damage []error

	fsys    fs.FS
	keys    keys
	packs   map[ID]*pack
	records map[ID][]place // chunk or page => where it is
}

// An ID names a chunk, page or pack.
type ID [32]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// A Point is what a manifest says.
type Point struct {
	ID   string `json:"-"` // name of the manifest
	Name string `json:"name"`
	VM   struct {
		Name string `json:"name"`
	} `json:"vm"`
	Disks  []Disk `json:"disks"`
	Config []Disk `json:"config"`
	JSON   []byte `json:"-"` // the whole object
}

// Disk returns the disk of that name.
func (p *Point) Disk(name string) (Disk, error) {
	for _, d := range p.Disks {
		if d.Name == name {
			return d, nil
		}
	}
	return Disk{}, fmt.Errorf("point %s has no disk %q", p.Name, name)
}

// A Disk is a disk or a configuration file of a point.
type Disk struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	Root string `json:"root"` // hexadecimal; "" for a disk that is one hole
}

type keys struct {
	master, chunk, page []byte
}

type config struct {
	Version   int    `json:"version"`
	Revision  uint64 `json:"revision"`
	ID        string `json:"id"`
	ChunkSize int    `json:"chunk_size"`
	Cipher    string `json:"cipher"`
	Master    string `json:"master"`
	Keys      []slot `json:"keys"`
}

type slot struct {
	Kind      string `json:"kind"`
	KDF       string `json:"kdf"`
	Time      uint32 `json:"time"`
	MemoryKiB uint32 `json:"memory_kib"`
	Threads   uint8  `json:"threads"`
	Salt      string `json:"salt"`
	Wrapped   string `json:"wrapped"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Open reads the config, all manifests and the tables of all packs. A damaged manifest or
// pack is put on the list Damage; an error is returned when nothing can be read.
func Open(fsys fs.FS, o Options) (*Repo, error) {
	r := &Repo{fsys: fsys, packs: map[ID]*pack{}, records: map[ID][]place{}}
	c, err := readConfig(fsys, "config")
	other, otherErr := readConfig(fsys, "config.copy")
	switch {
	case err != nil && otherErr != nil:
		return nil, errors.Join(err, otherErr)
	case err != nil:
		r.Damage = append(r.Damage, err)
		c = other
	case otherErr == nil && other.ID == c.ID && other.Revision > c.Revision:
		c = other
	}
	if err := r.unlock(c, o.Passphrase); err != nil {
		return nil, err
	}
	if err := r.readPoints(); err != nil {
		return nil, err
	}
	return r, r.readPacks(o.Scan)
}

func readConfig(fsys fs.FS, name string) (*config, error) {
	b, err := fs.ReadFile(fsys, name)
	if err != nil {
		return nil, err
	}
	const head, tail = "holdfast repository\n", "\nblake3 "
	end := len(b) - len(tail) - 64 - 1
	if end < len(head) || string(b[:len(head)]) != head ||
		string(b[end:end+len(tail)]) != tail || b[len(b)-1] != '\n' {
		return nil, fmt.Errorf("%s: no envelope", name)
	}
	sum := blake3.Sum256(b[:end])
	if hex.EncodeToString(sum[:]) != string(b[end+len(tail):len(b)-1]) {
		return nil, fmt.Errorf("%s: wrong checksum", name)
	}
	c := new(config)
	if err := json.Unmarshal(b[len(head):end], c); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if c.Version != 1 {
		return nil, fmt.Errorf("%s: version %d", name, c.Version)
	}
	if c.ChunkSize < 65536 || c.ChunkSize > 4194304 || bits.OnesCount(uint(c.ChunkSize)) != 1 {
		return nil, fmt.Errorf("%s: chunk size %d", name, c.ChunkSize)
	}
	return c, nil
}

func (r *Repo) unlock(c *config, passphrase string) error {
	r.ChunkSize = c.ChunkSize
	if err := unhex(r.ID[:], c.ID); err != nil {
		return fmt.Errorf("config: id: %w", err)
	}
	master := make([]byte, 32)
	switch c.Cipher {
	case "none":
		if err := unhex(master, c.Master); err != nil {
			return fmt.Errorf("config: master: %w", err)
		}
	case "aes-256-gcm":
		r.Sealed = true
		var err error
		if master, err = unwrap(c, passphrase); err != nil {
			return err
		}
	default:
		return fmt.Errorf("config: cipher %q", c.Cipher)
	}
	r.keys = keys{
		master: master,
		chunk:  derive("holdfast repository v1 chunk id", master),
		page:   derive("holdfast repository v1 page id", master),
	}
	return nil
}

func unwrap(c *config, passphrase string) ([]byte, error) {
	ad := fmt.Sprintf("holdfast key %d %s %d %s", c.Version, c.ID, c.ChunkSize, c.Cipher)
	for i, s := range c.Keys {
		salt, err := hex.DecodeString(s.Salt)
		if err != nil || s.KDF != "argon2id" {
			return nil, fmt.Errorf("config: key %d: kdf %q, salt %q", i, s.KDF, s.Salt)
		}
		wrapped := make([]byte, 12+32+16)
		if err := unhex(wrapped, s.Wrapped); err != nil {
			return nil, fmt.Errorf("config: key %d: %w", i, err)
		}
		given := passphrase
		if s.Kind == "recovery" {
			if given, err = recoveryKey(passphrase); err != nil {
				continue
			}
		}
		kek := argon2.IDKey([]byte(given), salt, s.Time, s.MemoryKiB, s.Threads, 32)
		master, err := gcm(kek).Open(nil, wrapped[:12], wrapped[12:], []byte(ad))
		if err == nil {
			return master, nil
		}
	}
	return nil, errors.New("config: the passphrase opens no key slot")
}

// recoveryKey is the passphrase that a recovery key stands for, as it was typed.
func recoveryKey(typed string) (string, error) {
	const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
	text := strings.Join(strings.Fields(strings.ReplaceAll(strings.ToUpper(typed), "-", "")), "")
	text = strings.NewReplacer("O", "0", "I", "1", "L", "1").Replace(text)
	if len(text) != 56 {
		return "", fmt.Errorf("a recovery key of %d characters", len(text))
	}
	var raw []byte
	bits, n := uint32(0), 0
	for _, c := range text {
		v := strings.IndexRune(alphabet, c)
		if v < 0 {
			return "", fmt.Errorf("a recovery key with %q", c)
		}
		bits, n = bits<<5|uint32(v), n+5
		if n >= 8 {
			n -= 8
			raw = append(raw, byte(bits>>n))
		}
	}
	sum := blake3.Sum256(raw[:32])
	if !bytes.Equal(raw[32:], sum[:3]) {
		return "", errors.New("a mistyped recovery key")
	}
	return text, nil
}

func (r *Repo) readPoints() error {
	entries, err := fs.ReadDir(r.fsys, "points")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		p, err := r.readPoint(e.Name())
		if err != nil {
			r.Damage = append(r.Damage, fmt.Errorf("points/%s: %w", e.Name(), err))
			continue
		}
		r.Points = append(r.Points, p)
	}
	return nil
}

func (r *Repo) readPoint(name string) (*Point, error) {
	b, err := fs.ReadFile(r.fsys, path.Join("points", name))
	if err != nil {
		return nil, err
	}
	const head = 72
	if len(b) < head+16+4 {
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	body, sum := b[:len(b)-4], le32(b[len(b)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, errors.New("wrong CRC")
	}
	if string(b[:8]) != "HFPOINT\n" || le32(b[8:]) != 1 || le32(b[12:]) != r.flag() {
		return nil, fmt.Errorf("header %q", b[:16])
	}
	if !bytes.Equal(b[16:32], r.ID[:]) {
		return nil, fmt.Errorf("of repository %x", b[16:32])
	}
	if hex.EncodeToString(b[32:48]) != name {
		return nil, fmt.Errorf("of point %x", b[32:48])
	}
	if n := binary.LittleEndian.Uint64(b[64:]); n != uint64(len(body)-head-16) {
		return nil, fmt.Errorf("plaintext of %d bytes", n)
	}
	key := derive("holdfast repository v1 point", slices.Concat(r.keys.master, b[48:64]))
	var plain []byte
	if r.Sealed {
		plain, err = gcm(key).Open(nil, make([]byte, 12), body[head:], body[:head])
		if err != nil {
			return nil, err
		}
	} else {
		signed, mac := body[:len(body)-16], body[len(body)-16:]
		if !bytes.Equal(keyed(key, signed)[:16], mac) {
			return nil, errors.New("wrong keyed sum")
		}
		plain = signed[head:]
	}
	p := &Point{ID: name}
	if p.JSON, err = inflate(plain, 1<<30); err != nil {
		return nil, err
	}
	return p, json.Unmarshal(p.JSON, p)
}

func (r *Repo) flag() uint32 {
	if r.Sealed {
		return 1
	}
	return 0
}

func derive(context string, material []byte) []byte {
	out := make([]byte, 32)
	blake3.DeriveKey(context, material, out)
	return out
}

func keyed(key []byte, b []byte) []byte {
	h, err := blake3.NewKeyed(key)
	if err != nil {
		panic(err) // only for a key that has not 32 bytes
	}
	h.Write(b)
	return h.Sum(nil)
}

func gcm(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for a key of a wrong length
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// inflate takes exactly one zstd frame, of at most limit bytes.
func inflate(b []byte, limit uint64) ([]byte, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(limit))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	return dec.DecodeAll(b, nil)
}

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// unhex fills dst with the lower-case hexadecimal s.
func unhex(dst []byte, s string) error {
	if len(s) != 2*len(dst) || s != strings.ToLower(s) {
		return fmt.Errorf("%q is not %d bytes in hexadecimal", s, len(dst))
	}
	_, err := hex.Decode(dst, []byte(s))
	return err
}
