package store

import (
	"bytes"
	"crypto/rand"
	"encoding/base32"
	"strings"
	"unicode"

	"github.com/zeebo/blake3"
)

// A recovery key is 32 random bytes and 3 check bytes, in Crockford's base 32
// (https://www.crockford.com/base32.html, without its check symbol): 56 characters,
// shown in 14 groups. See doc.go, "config".
const (
	recoveryLen   = 32 // bytes
	recoveryCheck = 3  // bytes; a typing error goes unseen once in 2^24
	recoveryText  = 56 // characters
	recoveryGroup = 4  // characters
)

var crockford = base32.NewEncoding("0123456789ABCDEFGHJKMNPQRSTVWXYZ").WithPadding(base32.NoPadding)

// recoveryKDF is the least that Argon2id takes: there are 2^256 keys to try.
var recoveryKDF = kdfParams{Time: 1, MemoryKiB: 8, Threads: 1}

// newRecoveryKey makes a recovery key in its canonical form, the passphrase of its slot.
func newRecoveryKey() ([]byte, error) {
	raw := make([]byte, recoveryLen)
	if _, err := rand.Read(raw); err != nil {
		return nil, err
	}
	sum := blake3.Sum256(raw)
	return crockford.AppendEncode(nil, append(raw, sum[:recoveryCheck]...)), nil
}

// printRecoveryKey is the form for people: groups with dashes between them.
func printRecoveryKey(canonical []byte) string {
	var b strings.Builder
	for i := 0; i < len(canonical); i += recoveryGroup {
		if i > 0 {
			b.WriteByte('-')
		}
		b.Write(canonical[i:min(i+recoveryGroup, len(canonical))])
	}
	return b.String()
}

// parseRecoveryKey gives the canonical form of a recovery key that somebody typed: in either
// case, with any spaces and dashes, O for 0, I and L for 1. It is nil for anything else;
// typo says that it looks much like one.
func parseRecoveryKey(typed []byte) (canonical []byte, typo bool) {
	if len(typed) > 4*recoveryText {
		return nil, false
	}
	canonical = bytes.Map(func(r rune) rune {
		switch r = unicode.ToUpper(r); {
		case unicode.IsSpace(r), unicode.Is(unicode.Dash, r):
			return -1
		case r == 'O':
			return '0'
		case r == 'I', r == 'L':
			return '1'
		}
		return r
	}, typed)
	raw, err := crockford.DecodeString(string(canonical))
	if err == nil && len(raw) == recoveryLen+recoveryCheck {
		sum := blake3.Sum256(raw[:recoveryLen])
		if bytes.Equal(raw[recoveryLen:], sum[:recoveryCheck]) {
			return canonical, false
		}
	}
	return nil, len(canonical) > recoveryText-2*recoveryGroup && len(canonical) < recoveryText+2*recoveryGroup && alphanumeric(canonical)
}

func alphanumeric(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}
