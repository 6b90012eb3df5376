package store

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

const (
	// MaxKeys is how many keys a repository can have: a wrong passphrase is tried on each.
	MaxKeys = 32
	// maxLabel is the longest label of a key. bytes
	maxLabel = 200
)

// KeyInfo describes a key of a repository: one way to open it.
type KeyInfo struct {
	ID       string    `json:"id"`
	Created  time.Time `json:"created"`
	Label    string    `json:"label,omitempty"`
	Recovery bool      `json:"recovery"` // a recovery key, else a passphrase
	InUse    bool      `json:"in_use"`   // it opened this Repo
}

// keyring is what a Repo knows of the key that opened it.
type keyring struct {
	mu sync.Mutex // guards following
	// moved is the id of the key that took the place of the one that opened the
	// repository; empty while that has not happened.
	moved string
}

// inUse is the id of the key slot that this Repo stands on.
func (r *Repo) inUse() string {
	r.ring.mu.Lock()
	defer r.ring.mu.Unlock()
	return cmp.Or(r.ring.moved, r.keys.slot)
}

func (r *Repo) keyInfo(s keySlot) KeyInfo {
	return KeyInfo{s.ID, s.Created, s.Label, s.Kind == keyRecovery, s.ID == r.inUse()}
}

// Keys lists the keys as they are now, in the order in which they are tried on a
// passphrase, recovery keys aside. ErrNotEncrypted when there are none.
func (r *Repo) Keys(ctx context.Context) ([]KeyInfo, error) {
	if !r.keys.sealed {
		return nil, fmt.Errorf("store: %w", ErrNotEncrypted)
	}
	st, err := r.reloadConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	var list []KeyInfo
	for _, s := range st.cfg.Keys {
		list = append(list, r.keyInfo(s))
	}
	return list, nil
}

// AddKey lets one more passphrase open the repository. ErrExists when it opens it already.
// Like every change of keys it is durable when it returns nil; after an error that matches
// ErrUnsure it may have taken effect or not, and Keys tells; after any other it has not.
func (r *Repo) AddKey(ctx context.Context, passphrase []byte, label string, now time.Time) (KeyInfo, error) {
	return r.addKey(ctx, passphrase, keySlot{Label: label}, defaultKDF, now)
}

// AddRecoveryKey makes a random key that opens the repository as a passphrase does, in a form to
// be printed. It is kept nowhere else.
func (r *Repo) AddRecoveryKey(ctx context.Context, now time.Time) (printable string, _ KeyInfo, _ error) {
	key, err := newRecoveryKey()
	if err != nil {
		return "", KeyInfo{}, err
	}
	info, err := r.addKey(ctx, key, keySlot{Kind: keyRecovery}, recoveryKDF, now)
	if err != nil {
		return "", KeyInfo{}, err
	}
	return printRecoveryKey(key), info, nil
}

func (r *Repo) addKey(ctx context.Context, passphrase []byte, slot keySlot, p kdfParams, now time.Time) (KeyInfo, error) {
	err := r.changeKeys(ctx, func(c *config) (err error) {
		if len(c.Keys) >= MaxKeys {
			return fmt.Errorf("%d keys are as many as there can be", MaxKeys)
		}
		if slot, err = r.newSlot(c, passphrase, slot, p, now); err == nil {
			c.Keys = append(c.Keys, slot)
		}
		return err
	})
	if err != nil {
		return KeyInfo{}, err
	}
	return r.keyInfo(slot), nil
}

// ChangeKey puts a passphrase in the place of the one that opened this Repo, in one
// step. An empty label keeps the old one. A Repo that a recovery key opened has no
// passphrase to change: ErrKeyInUse.
func (r *Repo) ChangeKey(ctx context.Context, passphrase []byte, label string, now time.Time) (KeyInfo, error) {
	var slot keySlot
	err := r.changeKeys(ctx, func(c *config) (err error) {
		i := c.key(r.inUse())
		if c.Keys[i].Kind == keyRecovery {
			return fmt.Errorf("%w: it is a recovery key, not a passphrase", ErrKeyInUse)
		}
		slot = keySlot{Label: cmp.Or(label, c.Keys[i].Label)}
		if slot, err = r.newSlot(c, passphrase, slot, defaultKDF, now); err == nil {
			c.Keys[i] = slot
		}
		return err
	})
	if err != nil {
		return KeyInfo{}, err
	}
	r.ring.mu.Lock()
	r.ring.moved = slot.ID
	r.ring.mu.Unlock()
	return r.keyInfo(slot), nil
}

// RemoveKey makes the key with that id open the repository no longer. Only a key other
// than the one in use can be removed, so that whoever removes one has just proved that
// another opens the repository: ErrKeyInUse, or ErrLastKey when there is no other.
// ErrNotExist when there is no such key.
//
// The master key stays. Who kept a copy of the config and knows the removed passphrase
// has had the master key, and can use it on what is stored later, too.
func (r *Repo) RemoveKey(ctx context.Context, id string) error {
	return r.changeKeys(ctx, func(c *config) error {
		switch i := c.key(id); {
		case i < 0:
			return fmt.Errorf("no key %q: %w", id, ErrNotExist)
		case len(c.Keys) == 1:
			return ErrLastKey
		case id == r.inUse():
			return ErrKeyInUse
		default:
			c.Keys = slices.Delete(c.Keys, i, i+1)
			return nil
		}
	})
}

// key is the place of the slot with that id, -1 for none.
func (c *config) key(id string) int {
	return slices.IndexFunc(c.Keys, func(s keySlot) bool { return s.ID == id })
}

// newSlot wraps the master key for one more passphrase; slot says what it is.
func (r *Repo) newSlot(c *config, passphrase []byte, slot keySlot, p kdfParams, now time.Time) (keySlot, error) {
	if len(passphrase) == 0 {
		return slot, errors.New("an empty passphrase protects nothing")
	}
	if err := checkLabel(slot.Label); err != nil {
		return slot, err
	}
	// Two slots with one passphrase: to remove one of them would remove nothing.
	if k, err := c.unlock(passphrase); err == nil {
		return slot, fmt.Errorf("a key with this passphrase %w: %s", ErrExists, k.slot)
	}
	for {
		s, err := wrapKey(r.keys.master, passphrase, c.aad(), p)
		if err != nil {
			return slot, err
		}
		s.ID, s.Created = hex.EncodeToString(s.Salt[:4]), now.UTC().Truncate(time.Second)
		s.Kind, s.Label = slot.Kind, slot.Label
		if c.key(s.ID) < 0 {
			return s, nil
		}
	}
}

func checkLabel(label string) error {
	if len(label) > maxLabel || !utf8.ValidString(label) {
		return fmt.Errorf("a label is text of at most %d bytes", maxLabel)
	}
	for _, c := range label {
		if !unicode.IsPrint(c) {
			return fmt.Errorf("a label has a character that cannot be printed: %q", c)
		}
	}
	return nil
}

// changeKeys replaces the keys in the config.
func (r *Repo) changeKeys(ctx context.Context, change func(*config) error) error {
	if !r.keys.sealed {
		return fmt.Errorf("store: %w", ErrNotEncrypted)
	}
	return r.changeConfig(ctx, change)
}

// changeConfig replaces the config. The lock keeps all others, in other processes too,
// from replacing it between the reading and the writing, so that no change is lost.
//
// The copy is written first. A crash between the two leaves a copy of a higher
// revision: that one holds, and the next who writes mends the other. A crash before
// leaves all as it was. When change returned nil and both are written the keys of before
// are in neither, so that no damage to one of them brings a removed key back.
func (r *Repo) changeConfig(ctx context.Context, change func(*config) error) error {
	l, ok := r.bucket.(bucket.Locker)
	if !ok {
		return fmt.Errorf("store: change config: %w: the bucket has no locks", errors.ErrUnsupported)
	}
	unlock, err := l.Lock(ctx, configLockName)
	if err != nil {
		return fmt.Errorf("store: change config: %w", err)
	}
	defer unlock()
	st, err := r.reloadConfig(ctx)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if r.keys.sealed && st.cfg.key(r.inUse()) < 0 {
		return fmt.Errorf("store: %w: the key %s that opened the repository was removed meanwhile", ErrPassphrase, r.inUse())
	}
	if err := change(st.cfg); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	st.cfg.Revision++
	raw, err := st.cfg.encode()
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if len(raw) > maxConfigLen {
		return fmt.Errorf("store: a config of %d bytes is too large", len(raw))
	}
	for _, name := range []string{configCopyName, configName} {
		if err := writeObject(ctx, r.bucket, name, raw); err != nil {
			return fmt.Errorf("store: change config: write %s: %w: %w", name, err, ErrUnsure)
		}
	}
	return nil
}
