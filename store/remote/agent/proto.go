package agent

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

// Version of the protocol; see doc.go.
const Version = 1

// Operations: none is one of the protocol between processes of one host.
const (
	opHello = 0x40 + iota
	opBegin
	opBase
	opIDs
	opPut
	opMap
	opWrite
	opFinish
	opCommit
	opPing
)

const (
	statusOK = iota
	statusRefused
	statusAccess
	statusVersion
	statusFull
	statusDamaged
	statusFailed
)

const (
	maxHello     = 128
	maxVM        = 4 << 10
	maxSmall     = 64
	maxWrite     = 256 << 10
	maxCommit    = 1 << 20
	maxText      = 1 << 10 // bytes of an error's text that a client looks at
	maxIDs       = 4096    // chunks in one answer: 196 KiB
	receiptLen   = 16
	entryLen     = 1 + 8 + 32 + receiptLen // of a chunk in write
	maxDiskSize  = 1 << 50                 // bytes: 1 PiB
	beforeHello  = 8 << 10                 // bytes that are read from a peer that has shown no token
	handshake    = 10 * time.Second        // for TLS and hello
	silence      = 2 * time.Minute         // after which a peer is taken for dead
	pingInterval = 20 * time.Second
)

// maxPut is the longest put, bytes: one job of a backup, and its heads.
func maxPut(chunkSize int) int { return max(1<<20, chunkSize) + 64<<10 }

// chunksOfPut is how many chunks a put may have.
func chunksOfPut(chunkSize int) int { return max(1, 1<<20/chunkSize) }

// bound is the longest request of an operation, bytes.
func bound(op uint8, chunkSize int) int {
	switch op {
	case opHello:
		return maxHello
	case opBegin:
		return maxVM
	case opPut:
		return maxPut(chunkSize)
	case opWrite:
		return maxWrite
	case opCommit:
		return maxCommit
	case opBase, opIDs, opMap, opFinish, opPing:
		return maxSmall
	}
	return 0
}

// readRequest reads a request whose bound depends on its operation: nothing is allocated
// for one that is longer.
func readRequest(r io.Reader, chunkSize int) ([]byte, error) {
	var head [4 + wire.HeadLen]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	op := head[len(head)-1]
	if n := binary.LittleEndian.Uint32(head[:]); n < wire.HeadLen || int64(n) > int64(bound(op, chunkSize))+wire.HeadLen {
		return nil, fmt.Errorf("%w: operation %#x of %d bytes", errProtocol, op, n)
	}
	return wire.ReadFrame(io.MultiReader(bytes.NewReader(head[:]), r), nil, maxPut(store.MaxChunkSize)+wire.HeadLen)
}

// errProtocol: the peer does not keep to the protocol.
var errProtocol = errors.New("protocol error")

// receiptKey makes the receipts of one session.
type receiptKey [32]byte

// of is the receipt of a chunk.
func (k *receiptKey) of(id store.ID) (r [receiptLen]byte) {
	h, err := blake3.NewKeyed(k[:])
	if err != nil {
		panic(err) // key length is a constant
	}
	h.Write(id[:])
	h.Digest().Read(r[:])
	return r
}

// shows reports whether r is the receipt of id.
func (k *receiptKey) shows(id store.ID, r []byte) bool {
	want := k.of(id)
	return subtle.ConstantTimeCompare(want[:], r) == 1
}

// parentMessage answers begin.
type parentMessage struct {
	ID    *store.PointID `json:"id,omitempty"` // absent: there is none
	Disks []parentDisk   `json:"disks,omitempty"`
}

type parentDisk struct {
	Name     string    `json:"name"`
	Key      string    `json:"key"`
	Size     int64     `json:"size"`
	ChangeID string    `json:"change_id,omitempty"`
	Compared time.Time `json:"compared,omitzero"` // as Disk.Compared
	Data     int64     `json:"bytes_data"`
}

// pointMessage describes a point to be committed: what only the client knows. Lists stay JSON until
// they are counted: what is 3 bytes there, "{},", is 60 times as long here.
type pointMessage struct {
	Tags        json.RawMessage `json:"tags,omitempty"` // list of texts
	Consistency string          `json:"consistency"`
	Program     string          `json:"program,omitempty"`
	Warnings    json.RawMessage `json:"warnings,omitempty"` // list of texts
	Disks       json.RawMessage `json:"disks"`              // list of diskMessage
	Config      json.RawMessage `json:"config,omitempty"`   // list of fileMessage
}

type diskMessage struct {
	Key      string          `json:"key"`
	Size     int64           `json:"size"`
	Root     []byte          `json:"root,omitempty"` // as finish gave it; empty for one hole
	ChangeID string          `json:"change_id,omitempty"`
	Compared time.Time       `json:"compared,omitzero"`
	How      string          `json:"read"` // as Disk.Read
	Data     int64           `json:"bytes_data"`
	Read     int64           `json:"bytes_read"`
	Warnings json.RawMessage `json:"warnings,omitempty"`
}

type fileMessage struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	Root []byte `json:"root,omitempty"`
}

// committedMessage answers commit.
type committedMessage struct {
	ID   store.PointID `json:"id"`
	Name string        `json:"name"`
	Time time.Time     `json:"time"`
}

// serverTLS is the server's side, with a certificate made for its key.
func serverTLS(key ed25519.PrivateKey) (*tls.Config, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "holdfast"},
		// Clients look at the key alone. RFC 5280 §4.1.2.5: no well-defined end.
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		Certificates:           []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}, nil
}

// ErrOtherServer: what answers is not the server that the token is for.
var ErrOtherServer = errors.New("the server is not the one that the token is for")

// clientTLS accepts the server with the key of the pin and no other. The handshake proves that
// the server has the key (RFC 8446 §4.4.3); name, issuer and dates of the certificate say nothing.
func clientTLS(pin [sha256.Size]byte) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // VerifyConnection does it, in every handshake
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return ErrOtherServer
			}
			got := sha256.Sum256(cs.PeerCertificates[0].RawSubjectPublicKeyInfo)
			if subtle.ConstantTimeCompare(got[:], pin[:]) != 1 {
				return ErrOtherServer
			}
			return nil
		},
	}
}

// peerConn bounds what is read from a peer: at first the bytes, then how long it may be silent.
type peerConn struct {
	net.Conn
	silence time.Duration
	left    atomic.Int64 // bytes that may still be read
	proven  atomic.Bool  // no bound, but each read and write has silence for its time
}

var errTooMuch = errors.New("too much before a token was shown")

func newPeerConn(c net.Conn, silence time.Duration) *peerConn {
	p := &peerConn{Conn: c, silence: silence}
	p.left.Store(beforeHello)
	return p
}

func (p *peerConn) Read(b []byte) (int, error) {
	if p.proven.Load() {
		if err := p.SetReadDeadline(time.Now().Add(p.silence)); err != nil {
			return 0, err
		}
		return p.Conn.Read(b)
	}
	left := p.left.Load()
	if left <= 0 {
		return 0, errTooMuch
	}
	n, err := p.Conn.Read(b[:min(int64(len(b)), left)])
	p.left.Add(-int64(n))
	return n, err
}

func (p *peerConn) Write(b []byte) (int, error) {
	if p.proven.Load() {
		if err := p.SetWriteDeadline(time.Now().Add(p.silence)); err != nil {
			return 0, err
		}
	}
	return p.Conn.Write(b)
}
