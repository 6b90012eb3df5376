package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// FormatVersion is the newest repository format that this code reads and the one it writes.
const FormatVersion = 1

// Limits and default of the chunk size, bytes.
const (
	MinChunkSize     = 64 << 10
	MaxChunkSize     = 4 << 20
	DefaultChunkSize = 128 << 10
)

const (
	configName     = "config"
	configCopyName = "config.copy"
	configMagic    = "holdfast repository\n"
	configSumLabel = "\nblake3 "
	maxConfigLen   = 1 << 20
)

// config is the plaintext description of a repository; see doc.go, "config".
type config struct {
	Version   int       `json:"version"`
	ID        hexBytes  `json:"id"` // 16 bytes
	Created   time.Time `json:"created"`
	ChunkSize int       `json:"chunk_size"` // bytes
	Cipher    string    `json:"cipher"`     // "aes-256-gcm" or "none"
	Master    hexBytes  `json:"master,omitempty"`
	Keys      []keySlot `json:"keys,omitempty"`
}

const (
	cipherGCM  = "aes-256-gcm"
	cipherNone = "none"
)

// keySlot is one wrapping of the master key by one passphrase.
type keySlot struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	KDF     string    `json:"kdf"`
	kdfParams
	Salt    hexBytes `json:"salt"`
	Wrapped hexBytes `json:"wrapped"` // nonce, encrypted master key, tag
}

type kdfParams struct {
	Time      uint32 `json:"time"`
	MemoryKiB uint32 `json:"memory_kib"`
	Threads   uint8  `json:"threads"`
}

// defaultKDF is one of the Argon2id sets that the OWASP Password Storage Cheat
// Sheet calls equivalent (19 MiB, 2 passes, 1 lane): about 20 ms and few page faults, so
// that a mount gives its first byte within 0.1 s. It is stored with each key and
// can be raised for new ones at any time.
var defaultKDF = kdfParams{Time: 2, MemoryKiB: 19456, Threads: 1}

// hexBytes is written as a hexadecimal string.
type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

func (h *hexBytes) UnmarshalText(s []byte) (err error) {
	*h, err = hex.DecodeString(string(s))
	return err
}

// aad binds the parameters that must not be changed under a passphrase.
func (c *config) aad() []byte {
	return fmt.Appendf(nil, "holdfast key %d %x %d %s", c.Version, []byte(c.ID), c.ChunkSize, c.Cipher)
}

// encode gives the config's bytes: magic line, JSON, checksum line.
func (c *config) encode() ([]byte, error) {
	body, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, err
	}
	out := append([]byte(configMagic), body...)
	sum := blake3.Sum256(out)
	return fmt.Appendf(out, "%s%x\n", configSumLabel, sum), nil
}

// decodeConfig checks the envelope, which is the same for every format version,
// before it believes the version.
func decodeConfig(b []byte) (*config, error) {
	sumAt := len(b) - len(configSumLabel) - 2*32 - 1
	if sumAt < len(configMagic) || !bytes.HasPrefix(b, []byte(configMagic)) {
		return nil, fmt.Errorf("%w: config: envelope", ErrDamaged)
	}
	sum := blake3.Sum256(b[:sumAt])
	if string(b[sumAt:]) != fmt.Sprintf("%s%x\n", configSumLabel, sum) {
		return nil, fmt.Errorf("%w: config: checksum", ErrDamaged)
	}
	var c config
	body := b[len(configMagic):sumAt]
	// The version first: a newer format may use fields in other ways.
	var v struct{ Version int }
	if err := json.Unmarshal(body, &v); err != nil {
		return nil, fmt.Errorf("%w: config: %v", ErrDamaged, err)
	}
	if v.Version > FormatVersion {
		return nil, fmt.Errorf("%w: version %d, this program knows up to %d", ErrNewerFormat, v.Version, FormatVersion)
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return nil, fmt.Errorf("%w: config: %v", ErrDamaged, err)
	}
	if c.Version < 1 || len(c.ID) != 16 || !ValidChunkSize(c.ChunkSize) ||
		(c.Cipher != cipherGCM && c.Cipher != cipherNone) || (c.Cipher == cipherNone && len(c.Master) != keyLen) {
		return nil, fmt.Errorf("%w: config: values out of range", ErrDamaged)
	}
	return &c, nil
}

// ValidChunkSize reports whether n is a power of two from 64 KiB to 4 MiB.
func ValidChunkSize(n int) bool {
	return n >= MinChunkSize && n <= MaxChunkSize && n&(n-1) == 0
}

// unlock gives the keys for a passphrase. ErrPassphrase when none of the key slots fits.
func (c *config) unlock(passphrase []byte) (*keys, error) {
	if c.Cipher == cipherNone {
		return newKeys([keyLen]byte(c.Master), false), nil
	}
	var bad error
	for _, slot := range c.Keys {
		master, ok, err := unwrapKey(slot, passphrase, c.aad())
		if ok {
			return newKeys(master, true), nil
		}
		bad = errors.Join(bad, err)
	}
	if bad != nil {
		return nil, fmt.Errorf("%w: config: %v", ErrDamaged, bad)
	}
	return nil, ErrPassphrase
}

// newConfig makes the config of a new repository.
func newConfig(opt InitOptions, now time.Time) (*config, *keys, error) {
	c := &config{
		Version: FormatVersion, ID: make([]byte, 16), Created: now.UTC().Truncate(time.Second),
		ChunkSize: opt.ChunkSize, Cipher: cipherGCM,
	}
	var master [keyLen]byte
	for _, b := range [][]byte{c.ID, master[:]} {
		if _, err := rand.Read(b); err != nil {
			return nil, nil, err
		}
	}
	if opt.NoEncryption {
		c.Cipher, c.Master = cipherNone, master[:]
		return c, newKeys(master, false), nil
	}
	slot, err := wrapKey(master, opt.Passphrase, c.aad(), defaultKDF)
	if err != nil {
		return nil, nil, err
	}
	slot.ID, slot.Created = hex.EncodeToString(slot.Salt[:4]), c.Created
	c.Keys = []keySlot{slot}
	return c, newKeys(master, true), nil
}

// configState says what was found of the two copies of the config.
type configState struct {
	cfg *config
	// damaged names the copies that are missing or fail their check while the
	// other one is good.
	damaged []string
	good    []byte // the bytes of the good copy
}

// loadConfig reads the config, or its copy when the first is damaged.
// ErrNoRepository when there is neither, or only a "config" of something else.
func loadConfig(ctx context.Context, b bucket.Bucket) (configState, error) {
	var st configState
	var firstErr error
	missing, foreign := 0, 0
	for _, name := range []string{configName, configCopyName} {
		raw, err := readObject(ctx, b, name, maxConfigLen)
		if errors.Is(err, bucket.ErrNotExist) {
			missing++
			st.damaged = append(st.damaged, name)
			continue
		}
		if err != nil {
			return st, fmt.Errorf("store: read %s: %w", name, err)
		}
		cfg, err := decodeConfig(raw)
		if errors.Is(err, ErrDamaged) {
			st.damaged = append(st.damaged, name)
			if firstErr == nil {
				firstErr = err
			}
			if !bytes.HasPrefix(raw, []byte(configMagic)) {
				foreign++
			}
			continue
		}
		if err != nil {
			return st, err
		}
		if st.cfg == nil {
			st.cfg, st.good = cfg, raw
		} else if !bytes.Equal(raw, st.good) {
			st.damaged = append(st.damaged, name) // of before a change, or foreign
		}
	}
	switch {
	case st.cfg != nil:
		return st, nil
	case missing == 2, missing == 1 && foreign == 1:
		// Many programs call a file "config"; damage that makes ours unknown and
		// also takes its copy away is less likely.
		return st, ErrNoRepository
	default:
		return st, firstErr
	}
}

// readObject reads a whole object of at most limit bytes.
func readObject(ctx context.Context, b bucket.Bucket, name string, limit int64) ([]byte, error) {
	o, err := b.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	if o.Size() > limit {
		return nil, fmt.Errorf("%w: %s: %d bytes, at most %d expected", ErrDamaged, name, o.Size(), limit)
	}
	buf := make([]byte, o.Size())
	if n, err := o.ReadAt(buf, 0); n < len(buf) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return buf, nil
}

// writeObject writes a whole object durably.
func writeObject(ctx context.Context, b bucket.Bucket, name string, data []byte) error {
	w, err := b.Create(ctx, name)
	if err != nil {
		return err
	}
	if _, err := w.WriteAt(data, 0); err != nil {
		w.Abort()
		return err
	}
	if err := w.Commit(); err != nil {
		w.Abort()
		return err
	}
	return nil
}
