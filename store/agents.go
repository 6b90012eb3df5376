package store

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/zeebo/blake3"
)

const (
	// MaxAgents is how many tokens a repository can have, so that they fit into its config.
	MaxAgents = 128
	// AgentIDLen and AgentSecretLen are the lengths of what a token has, bytes.
	AgentIDLen     = 8
	AgentSecretLen = 32

	maxAgentVMs    = 32  // patterns of one token
	maxAgentVMText = 200 // bytes of one
)

// ErrToken: the token is unknown, removed, expired, or its record is not from a holder of the master key.
var ErrToken = errors.New("token refused")

// agentRecord is a token that lets a helper on another host add points; see doc.go, "Tokens".
type agentRecord struct {
	ID      hexBytes  `json:"id"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"`
	Label   string    `json:"label,omitempty"`
	VMs     []string  `json:"vms,omitempty"` // patterns of path.Match
	Secret  hexBytes  `json:"secret"`        // a hash of it
	MAC     hexBytes  `json:"mac"`

	unknown unknownFields
}

const agentFields = "id created expires label vms secret mac"

// MarshalJSON keeps unknown fields.
func (a agentRecord) MarshalJSON() ([]byte, error) {
	type plain agentRecord
	return marshalWith(plain(a), a.unknown)
}

// UnmarshalJSON keeps unknown fields.
func (a *agentRecord) UnmarshalJSON(b []byte) (err error) {
	type plain agentRecord
	if err := json.Unmarshal(b, (*plain)(a)); err != nil {
		return err
	}
	a.unknown, err = fieldsBeyond(b, agentFields)
	return err
}

// authenticated is what the MAC covers; see doc.go, "Tokens".
func (a *agentRecord) authenticated(repo [16]byte) []byte {
	le := binary.LittleEndian
	b := slices.Clone(repo[:])
	text := func(s []byte) { b = append(le.AppendUint32(b, uint32(len(s))), s...) }
	seconds := func(t time.Time) {
		s := int64(0)
		if !t.IsZero() {
			s = t.Unix()
		}
		b = le.AppendUint64(b, uint64(s))
	}
	text(a.ID)
	seconds(a.Created)
	seconds(a.Expires)
	text([]byte(a.Label))
	b = le.AppendUint32(b, uint32(len(a.VMs)))
	for _, vm := range a.VMs {
		text([]byte(vm))
	}
	text(a.Secret)
	return b
}

func (r *Repo) agentMAC(a *agentRecord) (sum [keyLen]byte) {
	key := r.keys.derive(ctxAgentRecord, nil)
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic(err) // key length is a constant
	}
	h.Write(a.authenticated(r.id))
	h.Sum(sum[:0])
	return sum
}

// genuine reports whether somebody with the master key made the record and nobody changed it. One
// with fields that this program does not know is not: they may be limits.
func (r *Repo) genuine(a *agentRecord) bool {
	sum := r.agentMAC(a)
	return len(a.ID) == AgentIDLen && len(a.unknown) == 0 && subtle.ConstantTimeCompare(sum[:], a.MAC) == 1
}

func agentSecretHash(secret []byte) (sum [keyLen]byte) {
	blake3.DeriveKey(ctxAgentSecret, secret, sum[:])
	return sum
}

// AgentInfo describes a token with which a helper on another host adds points.
type AgentInfo struct {
	ID      string    `json:"id"` // 16 hexadecimal digits
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"` // zero: never
	Label   string    `json:"label,omitempty"`
	// VMs are patterns of path.Match. Only VMs whose names match one may be added to; without
	// any, those that nobody else has added to.
	VMs []string `json:"vms,omitempty"`
	// Forged: the record was not written by somebody who could open the repository, or is of a
	// newer program. It is refused.
	Forged bool `json:"forged,omitempty"`
}

// Expired reports whether the token has come to its end.
func (a AgentInfo) Expired(now time.Time) bool { return !a.Expires.IsZero() && !now.Before(a.Expires) }

// May reports whether the patterns of the token allow the VM. With no patterns they do
// not decide: decided is false.
func (a AgentInfo) May(vm string) (allowed, decided bool) {
	for _, p := range a.VMs {
		if ok, err := path.Match(p, vm); err == nil && ok {
			return true, true
		}
	}
	return false, len(a.VMs) > 0
}

func (r *Repo) agentInfo(a *agentRecord) AgentInfo {
	return AgentInfo{hex.EncodeToString(a.ID), a.Created, a.Expires, a.Label, a.VMs, !r.genuine(a)}
}

// Agents lists the tokens as they are now.
func (r *Repo) Agents(ctx context.Context) ([]AgentInfo, error) {
	st, err := r.reloadConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	var list []AgentInfo
	for i := range st.cfg.Agents {
		list = append(list, r.agentInfo(&st.cfg.Agents[i]))
	}
	return list, nil
}

// CheckAgent gives the token with that id if it is valid now and has that secret, else
// ErrToken. What it says of an unknown id and of a wrong secret is the same.
func (r *Repo) CheckAgent(ctx context.Context, id, secret []byte, now time.Time) (AgentInfo, error) {
	a, hash, err := r.agent(ctx, id)
	if err != nil {
		return a, err
	}
	given := agentSecretHash(secret)
	if subtle.ConstantTimeCompare(given[:], hash) != 1 {
		return AgentInfo{}, fmt.Errorf("%w: it is wrong, or was removed", ErrToken)
	}
	if a.Expired(now) {
		return AgentInfo{}, fmt.Errorf("%w: it expired on %s", ErrToken, a.Expires.UTC().Format(time.RFC3339))
	}
	return a, nil
}

// agent finds a genuine record, and the hash of its secret; hash is empty when there is none.
func (r *Repo) agent(ctx context.Context, id []byte) (AgentInfo, []byte, error) {
	st, err := r.reloadConfig(ctx)
	if err != nil {
		return AgentInfo{}, nil, fmt.Errorf("store: %w", err)
	}
	for i := range st.cfg.Agents {
		if a := &st.cfg.Agents[i]; string(a.ID) == string(id) && r.genuine(a) {
			return r.agentInfo(a), a.Secret, nil
		}
	}
	return AgentInfo{}, nil, nil
}

// AgentValid is nil while the token with that id is there and has not expired, else ErrToken.
func (r *Repo) AgentValid(ctx context.Context, id string, now time.Time) error {
	raw, err := hex.DecodeString(id)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrToken, err)
	}
	a, hash, err := r.agent(ctx, raw)
	switch {
	case err != nil:
		return err
	case len(hash) == 0:
		return fmt.Errorf("%w: it was removed", ErrToken)
	case a.Expired(now):
		return fmt.Errorf("%w: it has expired", ErrToken)
	}
	return nil
}

// AddAgent makes a token. info says its label, patterns and end. The secret is kept nowhere.
// Errors are as with AddKey.
func (r *Repo) AddAgent(ctx context.Context, info AgentInfo, now time.Time) (secret []byte, _ AgentInfo, _ error) {
	if err := checkLabel(info.Label); err != nil {
		return nil, AgentInfo{}, fmt.Errorf("store: %w", err)
	}
	if err := CheckAgentVMs(info.VMs); err != nil {
		return nil, AgentInfo{}, fmt.Errorf("store: %w", err)
	}
	secret = make([]byte, AgentSecretLen)
	a := agentRecord{ID: make([]byte, AgentIDLen), Created: now.UTC().Truncate(time.Second), Label: info.Label, VMs: info.VMs}
	if !info.Expires.IsZero() {
		a.Expires = info.Expires.UTC().Truncate(time.Second)
	}
	for _, b := range [][]byte{secret, a.ID} {
		if _, err := rand.Read(b); err != nil {
			return nil, AgentInfo{}, err
		}
	}
	hash := agentSecretHash(secret)
	a.Secret = hash[:]
	sum := r.agentMAC(&a)
	a.MAC = sum[:]
	err := r.changeConfig(ctx, func(c *config) error {
		if len(c.Agents) >= MaxAgents {
			return fmt.Errorf("%d tokens are as many as there can be", MaxAgents)
		}
		c.Agents = append(c.Agents, a)
		return nil
	})
	if err != nil {
		return nil, AgentInfo{}, err
	}
	return secret, r.agentInfo(&a), nil
}

// CheckAgentVMs refuses patterns that match nothing or cannot be kept.
func CheckAgentVMs(patterns []string) error {
	if len(patterns) > maxAgentVMs {
		return fmt.Errorf("a token has at most %d patterns", maxAgentVMs)
	}
	for _, p := range patterns {
		_, err := path.Match(p, "")
		if err != nil || p == "" || len(p) > maxAgentVMText || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == '/' || r == 0x7f }) {
			return fmt.Errorf("%q is no pattern for names of VMs", p)
		}
	}
	return nil
}

// RemoveAgent ends a token, also one whose record is not genuine. ErrNotExist when there is none.
func (r *Repo) RemoveAgent(ctx context.Context, id string) error {
	return r.changeConfig(ctx, func(c *config) error {
		n := len(c.Agents)
		c.Agents = slices.DeleteFunc(c.Agents, func(a agentRecord) bool { return hex.EncodeToString(a.ID) == id })
		if len(c.Agents) == n {
			return fmt.Errorf("no token %q: %w", id, ErrNotExist)
		}
		return nil
	})
}

// AgentTLSKey is the key by which the server of this repository proves itself to
// helpers on other hosts.
func (r *Repo) AgentTLSKey() ed25519.PrivateKey {
	seed := r.keys.derive(ctxAgentTLS, nil)
	return ed25519.NewKeyFromSeed(seed[:])
}

// ChunkIDKey names chunks: who has it can compute the id of any content.
func (r *Repo) ChunkIDKey() [32]byte { return r.keys.chunkID }

// RawID is the repository's id.
func (r *Repo) RawID() [16]byte { return r.id }
