package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store"
)

const (
	tokenPrefix = "hfa1_"
	tokenCheck  = 4 // bytes; a typing error goes unseen once in 2^32
	tokenLen    = store.AgentIDLen + store.AgentSecretLen + sha256.Size + tokenCheck
)

// ErrToken: a text is no token, or a mistyped one.
var ErrToken = errors.New("not a token, or a mistyped one")

// Token is what a client needs to add points: who it is, its secret, and which server it
// tells that to.
type Token struct {
	ID     [store.AgentIDLen]byte
	Secret [store.AgentSecretLen]byte
	Pin    [sha256.Size]byte // SHA-256 of the server's SubjectPublicKeyInfo
}

// NewToken is the token of a record that was just made.
func NewToken(repo *store.Repo, info store.AgentInfo, secret []byte) (t Token, err error) {
	id, err := hex.DecodeString(info.ID)
	if err != nil || len(id) != len(t.ID) || len(secret) != len(t.Secret) {
		return t, ErrToken
	}
	copy(t.ID[:], id)
	copy(t.Secret[:], secret)
	t.Pin, err = pinOf(repo.AgentTLSKey())
	return t, err
}

// pinOf is the pin of a server with that key.
func pinOf(key ed25519.PrivateKey) (pin [sha256.Size]byte, err error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	return sha256.Sum256(spki), err
}

// Text is the token as users have it. It is a secret.
func (t Token) Text() string {
	b := bytes.Join([][]byte{t.ID[:], t.Secret[:], t.Pin[:]}, nil)
	sum := blake3.Sum256(b)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:tokenCheck]...))
}

// String names the token without its secret.
func (t Token) String() string { return "token " + hex.EncodeToString(t.ID[:]) }

// GoString is String: no way of printing shows the secret.
func (t Token) GoString() string { return t.String() }

// ParseToken reads what Text gave; white space around it is left out. Every error is ErrToken:
// none repeats the text.
func ParseToken(text string) (t Token, err error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(text), tokenPrefix)
	if !ok || base64.RawURLEncoding.DecodedLen(len(rest)) != tokenLen || strings.ContainsAny(rest, "\r\n") {
		return t, ErrToken
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(rest)
	if err != nil || len(b) != tokenLen {
		return t, ErrToken
	}
	body, check := b[:tokenLen-tokenCheck], b[tokenLen-tokenCheck:]
	sum := blake3.Sum256(body)
	if subtle.ConstantTimeCompare(sum[:tokenCheck], check) != 1 {
		return t, ErrToken
	}
	body = body[copy(t.ID[:], body):]
	body = body[copy(t.Secret[:], body):]
	copy(t.Pin[:], body)
	return t, nil
}
