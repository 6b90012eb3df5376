package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/blake3"
	"golang.org/x/crypto/argon2"
)

// Contexts of the BLAKE3 derive-key mode (BLAKE3 paper §2.3): one per use, so
// that no two uses ever share a key.
const (
	ctxChunkID = "holdfast repository v1 chunk id"
	ctxPageID  = "holdfast repository v1 page id"
	ctxPack    = "holdfast repository v1 pack"
	ctxPoint   = "holdfast repository v1 point"
	ctxIndex   = "holdfast repository v1 index"

	ctxAgentTLS    = "holdfast repository v1 agent tls"
	ctxAgentRecord = "holdfast repository v1 agent record"
	ctxAgentSecret = "holdfast repository v1 agent secret"
)

const (
	keyLen   = 32
	tagLen   = 16 // AES-GCM tag, bytes
	nonceLen = 12 // AES-GCM nonce, bytes
)

// keys are everything derived from the master key. Safe for concurrent use.
type keys struct {
	master  [keyLen]byte
	sealed  bool   // false in a repository made without encryption
	slot    string // id of the key slot that gave the master key
	chunkID [keyLen]byte
	pageID  [keyLen]byte
}

func newKeys(master [keyLen]byte, sealed bool) *keys {
	k := &keys{master: master, sealed: sealed}
	blake3.DeriveKey(ctxChunkID, master[:], k.chunkID[:])
	blake3.DeriveKey(ctxPageID, master[:], k.pageID[:])
	return k
}

// derive gives the key of one object: context, then master key, then salt.
func (k *keys) derive(context string, salt []byte) (key [keyLen]byte) {
	blake3.DeriveKey(context, append(k.master[:len(k.master):len(k.master)], salt...), key[:])
	return key
}

// box encrypts and authenticates with one key. In a repository without
// encryption it is nil inside: bodies are stored as they are, and the CRC-32C of
// the record and the keyed BLAKE3 of the plaintext take the tag's place.
type box struct{ aead cipher.AEAD }

func (k *keys) box(context string, salt []byte) box {
	if !k.sealed {
		return box{}
	}
	key := k.derive(context, salt)
	return box{newGCM(key[:])}
}

func newGCM(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // key length is a constant
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// overhead is how many bytes seal adds.
func (b box) overhead() int {
	if b.aead == nil {
		return 0
	}
	return tagLen
}

// counterNonce is the nonce of record slot in its pack: eight zero bytes, then
// the slot as a little-endian u32. A pack key is never used by another pack.
func counterNonce(slot uint32) (n [nonceLen]byte) {
	binary.LittleEndian.PutUint32(n[8:], slot)
	return n
}

// wrapKey encrypts the master key with a key made from the passphrase.
func wrapKey(master [keyLen]byte, passphrase []byte, aad []byte, p kdfParams) (slot keySlot, err error) {
	slot = keySlot{KDF: "argon2id", kdfParams: p, Salt: make([]byte, 16)}
	nonce := make([]byte, nonceLen)
	if _, err := rand.Read(slot.Salt); err != nil {
		return slot, err
	}
	if _, err := rand.Read(nonce); err != nil {
		return slot, err
	}
	kek := argon2.IDKey(passphrase, slot.Salt, p.Time, p.MemoryKiB, p.Threads, keyLen)
	slot.Wrapped = newGCM(kek).Seal(nonce, nonce, master[:], aad)
	return slot, nil
}

// unwrapKey tries a passphrase on one key slot. ok is false when it does not fit.
func unwrapKey(slot keySlot, passphrase, aad []byte) (master [keyLen]byte, ok bool, err error) {
	if slot.KDF != "argon2id" {
		return master, false, fmt.Errorf("key slot %q: unknown key derivation %q", slot.ID, slot.KDF)
	}
	// Bounds, so that a damaged or hostile config cannot take all memory.
	if slot.Time < 1 || slot.Time > 64 || slot.Threads < 1 || slot.MemoryKiB < 8 || slot.MemoryKiB > 4<<20 ||
		len(slot.Wrapped) != nonceLen+keyLen+tagLen {
		return master, false, fmt.Errorf("key slot %q: parameters out of range", slot.ID)
	}
	kek := argon2.IDKey(passphrase, slot.Salt, slot.Time, slot.MemoryKiB, slot.Threads, keyLen)
	plain, err := newGCM(kek).Open(nil, slot.Wrapped[:nonceLen], slot.Wrapped[nonceLen:], aad)
	if err != nil {
		return master, false, nil
	}
	copy(master[:], plain)
	return master, true, nil
}

// mac is the check of a small object in a repository without encryption:
// 16 bytes of keyed BLAKE3 over the parts.
func mac(key [keyLen]byte, parts ...[]byte) (sum [tagLen]byte) {
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic(err) // key length is a constant
	}
	for _, p := range parts {
		h.Write(p)
	}
	h.Digest().Read(sum[:])
	return sum
}

// sealSmall protects a small object under a key of its own (one message a key,
// so the nonce is zero) and binds the header aad to it.
func (k *keys) sealSmall(context string, salt, aad, plain []byte) []byte {
	key := k.derive(context, salt)
	if !k.sealed {
		sum := mac(key, aad, plain)
		return append(append([]byte(nil), plain...), sum[:]...)
	}
	return newGCM(key[:]).Seal(nil, make([]byte, nonceLen), plain, aad)
}

// openSmall undoes sealSmall; ok is false when anything was changed.
func (k *keys) openSmall(context string, salt, aad, body []byte) (plain []byte, ok bool) {
	if len(body) < tagLen {
		return nil, false
	}
	key := k.derive(context, salt)
	if !k.sealed {
		plain = body[:len(body)-tagLen]
		sum := mac(key, aad, plain)
		return plain, subtle.ConstantTimeCompare(sum[:], body[len(plain):]) == 1
	}
	plain, err := newGCM(key[:]).Open(nil, make([]byte, nonceLen), body, aad)
	return plain, err == nil
}
