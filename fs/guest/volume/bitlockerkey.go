package volume

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// protector holds the master key, sealed by something that somebody has (BDE, "FVE Volume Master Key").
type protector struct {
	id     []byte // GUID
	kind   uint16
	clear  []byte // the key itself, if it is no secret
	salt   []byte // nil for none, or of a way of stretching that is not known
	master []byte // sealed
}

// Kinds of protectors (BDE, "Key protection types"). Those with a TPM have more bits for what must be there beside it.
const (
	protectClear    = 0
	protectTPM      = 0x0100
	protectExternal = 0x0200
	protectPIN      = 0x0400
	protectRecovery = 0x0800
	protectPublic   = 0x1000
	protectPassword = 0x2000
)

// newProtector reads a datum of at least 28 bytes:
//
//	0 GUID 16 | 16 time 8 | 24 unknown 2 | 26 kind 2 | 28 datums
//	a key: 0 method 4 | 4 key
//	a stretched key: 0 method 4 | 4 salt 16 | 20 datums
func newProtector(b []byte) protector {
	const algorithm = 0x14 // of a text in a stretched key: another way of stretching (G. Chappell, "FVE_DATUM_UNICODE")
	p := protector{id: b[:16], kind: binary.LittleEndian.Uint16(b[26:])}
	for d := range datums(b[28:]) {
		switch {
		case d.kind == datumKey && p.kind == protectClear && len(d.data) == 4+32:
			p.clear = d.data[4:]
		case d.kind == datumStretch && len(d.data) >= 20:
			p.salt = d.data[4:20]
			for in := range datums(d.data[20:]) {
				if in.kind == datumText && in.role == algorithm {
					p.salt = nil
				}
			}
		case d.kind == datumSealed:
			p.master = d.data
		}
	}
	return p
}

func (p protector) String() string {
	switch p.kind {
	case protectClear:
		return "clear key"
	case protectExternal:
		return "external key " + GUID(p.id)
	case protectRecovery:
		return "recovery password " + GUID(p.id)
	case protectPublic:
		return "smart card"
	case protectPassword:
		return "password"
	}
	if p.kind&^(protectTPM|protectExternal|protectPIN) != 0 || p.kind&protectTPM == 0 {
		return fmt.Sprintf("protector of type %#04x", p.kind)
	}
	name := "TPM"
	if p.kind&protectPIN != 0 {
		name += " and PIN"
	}
	if p.kind&protectExternal != 0 {
		name += " and external key"
	}
	return name
}

// secret is what a key that somebody gave is to BitLocker: one of these.
type secret struct {
	external map[string][]byte // GUID => key
	recovery []byte            // hashed
	password []byte            // hashed
}

// newSecret tells what a key is. One that can be nothing gives an empty secret.
func newSecret(key []byte) (s secret) {
	if s.external = externalKeys(key); s.external != nil {
		return s
	}
	if number := recoveryNumber(string(key)); number != nil {
		h := sha256.Sum256(number)
		s.recovery = h[:]
		return s
	}
	// A passphrase has up to 256 characters that can be typed.
	if len(key) == 0 || len(key) > 4*256 || !utf8.Valid(key) || bytes.ContainsFunc(key, unicode.IsControl) {
		return s
	}
	var b []byte
	for _, u := range utf16.Encode([]rune(string(key))) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	h := sha256.Sum256(b)
	h = sha256.Sum256(h[:])
	s.password = h[:]
	return s
}

// recoveryNumber reads a recovery password: eight numbers of six digits, each 11 times 16 bits (BDE, "Recovery key"). Nil for anything else.
func recoveryNumber(text string) []byte {
	groups := strings.FieldsFunc(strings.TrimSpace(text), func(r rune) bool { return r == '-' || r == ' ' })
	if len(groups) != 8 {
		return nil
	}
	var b []byte
	for _, g := range groups {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil || len(g) != 6 || n%11 != 0 || n/11 > 1<<16-1 {
			return nil
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(n/11))
	}
	return b
}

// externalKeys reads a .BEK file (BDE, "BitLocker External Key (BEK) file"), little-endian; nil for anything else:
//
//	0 size 4 | 4 version 4 | 8 size of the header 4 | 12 size again 4 | 16 GUID 16 | 32 … 48 datums
//	an external key: 0 GUID 16 | 16 time 8 | 24 datums
func externalKeys(b []byte) map[string][]byte {
	const header = 48
	le := binary.LittleEndian
	if len(b) < header || int64(le.Uint32(b)) > int64(len(b)) || le.Uint32(b) < header || le.Uint32(b[4:]) != 1 || le.Uint32(b[8:]) != header {
		return nil
	}
	keys := map[string][]byte{}
	for d := range datums(b[header:le.Uint32(b)]) {
		if d.kind != datumExternal || len(d.data) < 24 {
			continue
		}
		for k := range datums(d.data[24:]) {
			if k.kind == datumKey && len(k.data) == 4+32 {
				keys[string(d.data[:16])] = k.data[4:]
			}
		}
	}
	return keys
}

// stretcher makes keys of secrets. It keeps what it made, for the copies of the metadata.
type stretcher map[string][]byte // salt and hashed secret => key

// key hashes a secret 2²⁰ times (BDE, "Recovery key"), about a quarter of a second.
func (s stretcher) key(salt, hashed []byte) []byte {
	id := string(salt) + string(hashed)
	if key := s[id]; key != nil {
		return key
	}
	var b [88]byte // 0 last hash 32 | 32 the secret's 32 | 64 salt 16 | 80 count 8
	copy(b[32:64], hashed)
	copy(b[64:80], salt)
	for i := range uint64(1 << 20) {
		binary.LittleEndian.PutUint64(b[80:], i)
		sum := sha256.Sum256(b[:])
		copy(b[:32], sum[:])
	}
	s[id] = slices.Clone(b[:32])
	return s[id]
}

// maxTries is how many protectors of a kind a key is tried on.
const maxTries = 8

// unlock gives the master key, by a clear key or the first of the secrets that fits; ErrLocked when none does.
func (h *bitLocker) unlock(secrets []secret, s stretcher) ([]byte, error) {
	for _, p := range h.protectors {
		if p.clear != nil {
			if master, err := unsealKey(p.clear, p.master); err == nil {
				return master, nil
			}
		}
	}
	for _, x := range secrets {
		tries := 0
		for _, p := range h.protectors {
			var key []byte
			hashed := x.password
			if p.kind == protectRecovery {
				hashed = x.recovery
			}
			switch {
			case p.kind == protectExternal:
				key = x.external[string(p.id)]
			case (p.kind == protectRecovery || p.kind == protectPassword) && hashed != nil && p.salt != nil && tries < maxTries:
				tries++
				key = s.key(p.salt, hashed)
			}
			if key == nil {
				continue
			}
			if master, err := unsealKey(key, p.master); err == nil {
				return master, nil
			}
		}
	}
	return nil, ErrLocked
}

// unsealKey opens a sealed datum that holds a key:
//
//	0 size 4 | 4 version 2 | 6 unknown 2 | 8 method 4 | 12 key
func unsealKey(key, sealed []byte) ([]byte, error) {
	b, err := unseal(key, sealed)
	if err != nil {
		return nil, err
	}
	if len(b) < 12 || int64(binary.LittleEndian.Uint32(b)) != int64(len(b)) {
		return nil, guest.Damaged("BitLocker: a sealed key of %d bytes", len(b))
	}
	return b[12:], nil
}

// unseal decrypts and checks a datum by AES-CCM (NIST SP 800-38C, appendix A, with a length of 3 bytes and a MAC of 16):
//
//	0 nonce 12 | 12 MAC 16 | 28 encrypted
func unseal(key, sealed []byte) ([]byte, error) {
	const nonce, mac = 12, 16
	if len(sealed) < nonce+mac || len(sealed) > 1<<16 {
		return nil, guest.Damaged("BitLocker: a sealed datum of %d bytes", len(sealed))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, guest.Damaged("BitLocker: a key of %d bytes", len(key))
	}
	counter := make([]byte, aes.BlockSize)
	counter[0] = 2 // bytes of the length, less one
	copy(counter[1:], sealed[:nonce])
	b := bytes.Clone(sealed[nonce:]) // the MAC is encrypted as block 0
	cipher.NewCTR(block, counter).XORKeyStream(b, b)
	plain := b[mac:]
	sum := bytes.Clone(counter)
	sum[0] |= (mac - 2) / 2 << 3
	sum[14], sum[15] = byte(len(plain)>>8), byte(len(plain))
	block.Encrypt(sum, sum)
	for rest := plain; len(rest) > 0; rest = rest[min(len(rest), len(sum)):] {
		subtle.XORBytes(sum, sum, rest[:min(len(rest), len(sum))])
		block.Encrypt(sum, sum)
	}
	if subtle.ConstantTimeCompare(sum, b[:mac]) != 1 {
		return nil, guest.Damaged("BitLocker: the MAC of a sealed datum")
	}
	return plain, nil
}
