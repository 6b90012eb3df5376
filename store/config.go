package store

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
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
	configLockName = "config.lock" // held while they are changed
	configMagic    = "holdfast repository\n"
	configSumLabel = "\nblake3 "
	maxConfigLen   = 1 << 20
)

// config is the plaintext description of a repository; see doc.go, "config".
type config struct {
	Version   int           `json:"version"`
	Revision  uint64        `json:"revision,omitempty"` // grows with each change
	ID        hexBytes      `json:"id"`                 // 16 bytes
	Created   time.Time     `json:"created"`
	ChunkSize int           `json:"chunk_size"` // bytes
	Cipher    string        `json:"cipher"`     // "aes-256-gcm" or "none"
	Master    hexBytes      `json:"master,omitempty"`
	Keys      []keySlot     `json:"keys,omitempty"`
	Agents    []agentRecord `json:"agents,omitempty"`

	unknown unknownFields
}

const configFields = "version revision id created chunk_size cipher master keys agents"

const (
	cipherGCM  = "aes-256-gcm"
	cipherNone = "none"
)

// keySlot is one wrapping of the master key by one passphrase.
type keySlot struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	Kind    string    `json:"kind,omitempty"` // keyRecovery, or absent for a passphrase
	Label   string    `json:"label,omitempty"`
	KDF     string    `json:"kdf"`
	kdfParams
	Salt    hexBytes `json:"salt"`
	Wrapped hexBytes `json:"wrapped"` // nonce, encrypted master key, tag

	unknown unknownFields
}

const keySlotFields = "id created kind label kdf time memory_kib threads salt wrapped"

// keyRecovery is the kind of a slot whose passphrase is a recovery key.
const keyRecovery = "recovery"

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

// unknownFields are members of a JSON object that this program knows nothing of:
// name => value. A later program wrote them, and whoever writes the object again keeps them.
type unknownFields map[string]json.RawMessage

// fieldsBeyond gives the members of the object b that are none of known, names with spaces between.
func fieldsBeyond(b []byte, known string) (unknownFields, error) {
	var all unknownFields
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for _, name := range strings.Fields(known) {
		// As encoding/json matches them: "KEYS" was read as "keys".
		maps.DeleteFunc(all, func(got string, _ json.RawMessage) bool { return strings.EqualFold(got, name) })
	}
	return all, nil
}

// marshalWith is the object v, which is not empty, with more members at its end.
func marshalWith(v any, more unknownFields) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil || len(more) == 0 {
		return b, err
	}
	tail, err := json.Marshal(more)
	if err != nil {
		return nil, err
	}
	return slices.Concat(b[:len(b)-1], []byte(","), tail[1:]), nil
}

// MarshalJSON keeps unknown fields.
func (c *config) MarshalJSON() ([]byte, error) {
	type plain config
	return marshalWith((*plain)(c), c.unknown)
}

// UnmarshalJSON keeps unknown fields.
func (c *config) UnmarshalJSON(b []byte) (err error) {
	type plain config
	if err := json.Unmarshal(b, (*plain)(c)); err != nil {
		return err
	}
	c.unknown, err = fieldsBeyond(b, configFields)
	return err
}

// MarshalJSON keeps unknown fields.
func (s keySlot) MarshalJSON() ([]byte, error) {
	type plain keySlot
	return marshalWith(plain(s), s.unknown)
}

// UnmarshalJSON keeps unknown fields.
func (s *keySlot) UnmarshalJSON(b []byte) (err error) {
	type plain keySlot
	if err := json.Unmarshal(b, (*plain)(s)); err != nil {
		return err
	}
	s.unknown, err = fieldsBeyond(b, keySlotFields)
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
	recovery, typo := parseRecoveryKey(passphrase)
	var bad error
	hasRecovery := false
	for _, kind := range []bool{true, false} { // those of recovery keys first: they cost nothing
		for _, slot := range c.Keys {
			if (slot.Kind == keyRecovery) != kind {
				continue
			}
			try := passphrase
			if kind {
				hasRecovery = true
				if try = recovery; try == nil {
					continue
				}
			}
			master, ok, err := unwrapKey(slot, try, c.aad())
			if ok {
				k := newKeys(master, true)
				k.slot = slot.ID
				return k, nil
			}
			bad = errors.Join(bad, err)
		}
	}
	switch {
	case bad != nil:
		return nil, fmt.Errorf("%w: config: %v", ErrDamaged, bad)
	case hasRecovery && typo:
		return nil, fmt.Errorf("%w; if this is a recovery key, it is mistyped", ErrPassphrase)
	case recovery != nil:
		return nil, fmt.Errorf("%w: a recovery key without a typing error, but none of this repository", ErrPassphrase)
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
	// damaged names the copies that are missing, fail their check or are older while
	// the other one is good.
	damaged []string
	older   string // which of them is only older; "" for none
	good    []byte // the bytes of the good copy
}

// what says of a name in damaged what is wrong with it.
func (st configState) what(name string) string {
	if name == st.older {
		return name + " is older than its other copy, which is used"
	}
	return name + " is damaged or missing; its other copy is used"
}

// configCopy is one of the two copies of the config.
type configCopy struct {
	name string
	raw  []byte
	cfg  *config // nil unless it is good
	err  error   // why it is not good: ErrDamaged or ErrNotExist
}

func readConfigCopy(ctx context.Context, b bucket.Bucket, name string) (configCopy, error) {
	c := configCopy{name: name}
	c.raw, c.err = readObject(ctx, b, name, maxConfigLen)
	if c.err == nil {
		c.cfg, c.err = decodeConfig(c.raw)
	} else if !errors.Is(c.err, ErrDamaged) && !errors.Is(c.err, bucket.ErrNotExist) {
		return c, fmt.Errorf("store: read %s: %w", name, c.err)
	}
	if errors.Is(c.err, ErrNewerFormat) {
		return c, c.err
	}
	return c, nil
}

// newerThan reports whether both are good, of one repository, and c is of a later change.
func (c configCopy) newerThan(o configCopy) bool {
	return c.cfg != nil && o.cfg != nil && bytes.Equal(c.cfg.ID, o.cfg.ID) && c.cfg.Revision > o.cfg.Revision
}

// loadConfig reads the config, or its copy when the first is damaged or older.
// ErrNoRepository when there is neither, or only a "config" of something else.
func loadConfig(ctx context.Context, b bucket.Bucket) (configState, error) {
	first, err := readConfigCopy(ctx, b, configName)
	if err != nil {
		return configState{}, err
	}
	second, err := readConfigCopy(ctx, b, configCopyName)
	if err != nil {
		return configState{}, err
	}
	if second.newerThan(first) { // a change may just be going on
		if first, err = readConfigCopy(ctx, b, configName); err != nil {
			return configState{}, err
		}
	}
	if first.cfg == nil && second.cfg == nil {
		return configState{}, noConfig(first, second)
	}
	best, other := first, second
	if first.cfg == nil || second.newerThan(first) {
		best, other = second, first
	}
	st := configState{cfg: best.cfg, good: best.raw}
	if !bytes.Equal(best.raw, other.raw) { // damaged, of before a change, or foreign
		st.damaged = []string{other.name}
		if best.newerThan(other) {
			st.older = other.name
		}
	}
	return st, nil
}

// noConfig tells a damaged repository from a directory that is none.
func noConfig(first, second configCopy) error {
	missing, foreign := 0, 0
	var damaged error
	for _, c := range []configCopy{first, second} {
		if errors.Is(c.err, bucket.ErrNotExist) {
			missing++
			continue
		}
		damaged = cmp.Or(damaged, c.err)
		if !bytes.HasPrefix(c.raw, []byte(configMagic)) {
			foreign++
		}
	}
	// Many programs call a file "config"; damage that makes ours unknown and
	// also takes its copy away is less likely.
	if missing == 2 || missing == 1 && foreign == 1 {
		return ErrNoRepository
	}
	return damaged
}

// mendConfig writes copies of the config that are damaged, missing or old again.
// What was seen on opening says only that there is something to do: the keys may have
// been changed since.
func (r *Repo) mendConfig(ctx context.Context) error {
	if l, ok := r.bucket.(bucket.Locker); ok {
		unlock, err := l.Lock(ctx, configLockName)
		if err != nil {
			return fmt.Errorf("store: mend config: %w", err)
		}
		defer unlock()
	}
	st, err := r.reloadConfig(ctx)
	if err != nil {
		return fmt.Errorf("store: mend config: %w", err)
	}
	for _, name := range st.damaged {
		if err := writeObject(ctx, r.bucket, name, st.good); err != nil {
			return fmt.Errorf("store: mend %s: %w", name, err)
		}
		r.warn(name + " was mended from its other copy")
	}
	return nil
}

// reloadConfig is loadConfig for a repository that is open: its keys may have changed, what they
// wrap has not.
func (r *Repo) reloadConfig(ctx context.Context) (configState, error) {
	st, err := loadConfig(ctx, r.bucket)
	if err == nil && !bytes.Equal(st.cfg.aad(), r.cfg.aad()) {
		err = fmt.Errorf("%w: config: of another repository", ErrDamaged)
	}
	return st, err
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
