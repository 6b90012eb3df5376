package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Point is one restore point, as its manifest describes it. Points are immutable.
type Point struct {
	ID          PointID      `json:"id"`
	Name        string       `json:"name"` // 2026-11-21T063000Z, with -2, -3… for further ones of that second
	VM          VM           `json:"vm"`
	Time        time.Time    `json:"time"`             // when the VM was frozen, UTC
	Tags        []string     `json:"tags,omitempty"`   //
	Consistency string       `json:"consistency"`      // "crash", "application" or "offline"
	Parent      *PointID     `json:"parent,omitempty"` // a hint: the point that this run compared with
	Disks       []Disk       `json:"disks"`
	Config      []ConfigFile `json:"config,omitempty"`
	Stats       Stats        `json:"stats"`
	Warnings    []string     `json:"warnings,omitempty"`
	// Kept says why some of what a guest may not need was stored all the same.
	Kept    []string `json:"kept,omitempty"`
	Program string   `json:"program,omitempty"` // version of holdfast that made the point
	// LockedUntil is when the point may be forgotten; zero: at any time. UTC, whole seconds.
	LockedUntil time.Time `json:"locked_until,omitzero"`
	// CopiedFrom is the point that this one is a copy of, in another repository. Of a copy
	// of a copy it is the first. Nil: this is no copy.
	CopiedFrom *Origin `json:"copied_from,omitempty"`
	// Agent is the id of the token with which a helper on another host added the point;
	// empty for a backup of this host. What such a point says is the helper's word.
	Agent string `json:"agent,omitempty"`
}

// Origin names a point wherever it is.
type Origin struct {
	Repository string  `json:"repository"` // id, hexadecimal
	Point      PointID `json:"point"`
}

// VM identifies the machine that a point is of.
type VM struct {
	Name   string `json:"name"`
	UUID   string `json:"uuid,omitempty"`
	Source string `json:"source"` // kind of source: "imagefile", "vsphere"…
}

// Disk is one disk of a point.
type Disk struct {
	Name     string   `json:"name"`                // disk0, disk1…: its place in the address space
	Key      string   `json:"key"`                 // stable name of the disk at its source
	Size     int64    `json:"size"`                // bytes
	Root     hexBytes `json:"root,omitempty"`      // id of the root page, 32 bytes; absent when the disk is all holes
	ChangeID string   `json:"change_id,omitempty"` // change tracking of the source at the freeze
	// Compared is when the whole disk was last read, in this point or in one that it continues.
	Compared time.Time `json:"compared,omitzero"`
	Read     string    `json:"read"`          // "changes", or "full: why"
	Via      string    `json:"via,omitempty"` // which of the source's ways it was read
	Stats    Stats     `json:"stats"`
	Warnings []string  `json:"warnings,omitempty"`
	LeftOut  *LeftOut  `json:"left_out,omitempty"`
}

// LeftOut is what of a disk was not read and is stored as holes, because its guest does not need it.
type LeftOut struct {
	Items  []LeftOutItem `json:"items"`
	Ranges hexBytes      `json:"ranges"` // BLAKE3 of the ranges: offset and length of each, 8 bytes little-endian
}

// LeftOutItem is one thing that was left out.
type LeftOutItem struct {
	Volume string `json:"volume"` // as below files/
	What   string `json:"what"`   // "swap area", "free space", or the path of a file
	Bytes  int64  `json:"bytes"`
}

// Map is the chunk map of the disk.
func (d *Disk) Map() Root {
	r := Root{Size: d.Size}
	copy(r.Page[:], d.Root)
	return r
}

// ConfigFile is a file that the source gave beside the disks. It is stored as a
// small disk.
type ConfigFile struct {
	Name string   `json:"name"` // slash-separated, below config/
	Size int64    `json:"size"` // bytes
	Root hexBytes `json:"root,omitempty"`
}

// Map is the chunk map of the file.
func (c *ConfigFile) Map() Root {
	r := Root{Size: c.Size}
	copy(r.Page[:], c.Root)
	return r
}

// Stats are the sums of one run, in bytes where not said otherwise.
type Stats struct {
	Total    int64   `json:"bytes_total"`  // size of the disks
	Data     int64   `json:"bytes_data"`   // of it in chunks that are not holes
	Read     int64   `json:"bytes_read"`   // read from the source
	New      int64   `json:"bytes_new"`    // in chunks that the repository did not hold
	Stored   int64   `json:"bytes_stored"` // those compressed and encrypted, with their pages
	Duration float64 `json:"duration_s"`   // seconds
}

// Add sums sizes; the duration stays.
func (s *Stats) Add(o Stats) {
	s.Total += o.Total
	s.Data += o.Data
	s.Read += o.Read
	s.New += o.New
	s.Stored += o.Stored
}

// Summary is what a listing shows of a point without reading its manifest.
type Summary struct {
	ID       PointID   `json:"id"`
	VM       string    `json:"vm"`
	Name     string    `json:"name"`
	Time     time.Time `json:"time"`
	Tags     []string  `json:"tags,omitempty"`
	Disks    int       `json:"disks"`
	Total    int64     `json:"bytes_total"`
	New      int64     `json:"bytes_new"`
	Stored   int64     `json:"bytes_stored"`
	Warnings int       `json:"warnings,omitempty"`
	// LockedUntil is when the point may be forgotten; zero: at any time. The
	// manifest decides, this is a copy for listings.
	LockedUntil time.Time `json:"locked_until,omitzero"`
	// Damaged says why the manifest cannot be read; VM and Name may be unknown then.
	Damaged string `json:"damaged,omitempty"`
	// Hit is what is known to be damaged of the disks; only WithDamage fills it in.
	Hit []DiskDamage `json:"damaged_disks,omitempty"`
}

// Path is VM/POINT, the point's place in the address space, or its id when the
// manifest is damaged and the place unknown.
func (s *Summary) Path() string {
	if s.VM == "" {
		return s.ID.String()
	}
	return s.VM + "/" + s.Name
}

// Path is VM/POINT, the point's place in the address space.
func (p *Point) Path() string { return p.VM.Name + "/" + p.Name }

func (p *Point) summary() Summary {
	return Summary{ID: p.ID, VM: p.VM.Name, Name: p.Name, Time: p.Time, Tags: p.Tags, Disks: len(p.Disks),
		Total: p.Stats.Total, New: p.Stats.New, Stored: p.Stats.Stored, Warnings: len(p.Warnings), LockedUntil: p.LockedUntil}
}

// CheckVMName refuses names of VMs that are not a single, printable path element.
func CheckVMName(name string) error {
	switch {
	case name == "" || name == "." || name == ".." || len(name) > 200:
	case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == '/' || r == '\\' || r == 0x7f }):
	case strings.TrimSpace(name) != name:
	default:
		return nil
	}
	return fmt.Errorf("%q cannot be the name of a VM: it must be one path element of at most 200 bytes", name)
}

// PointName is the name that a point of that time gets.
func PointName(t time.Time) string { return t.UTC().Format("2006-01-02T150405Z") }

// MarshalText gives the hexadecimal form.
func (p PointID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, p[:]), nil }

// UnmarshalText reads the hexadecimal form.
func (p *PointID) UnmarshalText(s []byte) error {
	b, err := hex.DecodeString(string(s))
	if err != nil || len(b) != len(p) {
		return fmt.Errorf("%q is not a point id", s)
	}
	copy(p[:], b)
	return nil
}

const (
	pointPrefix     = "points/"
	pointHeaderLen  = 72
	pointVersion    = 1
	maxManifestLen  = 64 << 20
	summaryNonceLen = nonceLen
)

var pointMagic = [8]byte{'H', 'F', 'P', 'O', 'I', 'N', 'T', '\n'}

func pointObject(id PointID) string { return pointPrefix + id.String() }

// encodePoint gives the bytes of a manifest object; see doc.go, "manifest".
func encodePoint(p *Point, repo [16]byte, k *keys) ([]byte, error) {
	plain, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	h := make([]byte, pointHeaderLen)
	copy(h, pointMagic[:])
	binary.LittleEndian.PutUint32(h[8:], pointVersion)
	copy(h[16:], repo[:])
	copy(h[32:], p.ID[:])
	return sealObject(h, ctxPoint, plain, k)
}

// decodePoint reads a manifest object. Every error matches ErrDamaged.
func decodePoint(b []byte, id PointID, repo [16]byte, k *keys) (*Point, error) {
	damaged := func(why string) (*Point, error) {
		return nil, &DamageError{What: "manifest " + id.String(), Err: fmt.Errorf("%s", why)}
	}
	if len(b) < pointHeaderLen+tagLen+4 || !bytes.Equal(b[:8], pointMagic[:]) {
		return damaged("header")
	}
	if !wholeObject(b) {
		return damaged("checksum")
	}
	h := b[:pointHeaderLen]
	if v := binary.LittleEndian.Uint32(h[8:]); v > pointVersion {
		return nil, fmt.Errorf("manifest %s: %w", id, ErrNewerFormat)
	}
	if [16]byte(h[16:]) != repo || PointID(h[32:]) != id {
		return damaged("belongs to another point or repository")
	}
	plain, err := openObject(b, pointHeaderLen, ctxPoint, maxManifestLen, k)
	if err != nil {
		return damaged(err.Error())
	}
	var p Point
	if err := json.Unmarshal(plain, &p); err != nil {
		return damaged(err.Error())
	}
	if p.ID != id {
		return damaged("id")
	}
	for i := range p.Disks {
		if d := &p.Disks[i]; d.Size < 0 || (len(d.Root) != 0 && len(d.Root) != 32) {
			return damaged("disk " + d.Name)
		}
	}
	for i := range p.Config {
		if c := &p.Config[i]; c.Size < 0 || (len(c.Root) != 0 && len(c.Root) != 32) {
			return damaged("config " + c.Name)
		}
	}
	return &p, nil
}

// sealSummary encrypts a summary for the index: nonce, then the sealed bytes.
func (r *Repo) sealSummary(s *Summary) ([]byte, error) {
	plain := s.encode()
	if !r.keys.sealed {
		return plain, nil
	}
	nonce := make([]byte, summaryNonceLen)
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	return r.indexBox.aead.Seal(nonce, nonce, plain, s.ID[:]), nil
}

func (r *Repo) openSummary(sp SealedPoint) (Summary, error) {
	plain := sp.Summary
	if r.keys.sealed {
		if len(plain) < summaryNonceLen {
			return Summary{}, fmt.Errorf("index: summary of %s: %w", sp.ID, ErrDamaged)
		}
		var err error
		plain, err = r.indexBox.aead.Open(nil, plain[:summaryNonceLen], plain[summaryNonceLen:], sp.ID[:])
		if err != nil {
			return Summary{}, fmt.Errorf("index: summary of %s: %w", sp.ID, ErrDamaged)
		}
	}
	s, err := decodeSummary(plain)
	s.ID = sp.ID
	return s, err
}

// readPoint reads one manifest from the bucket.
func (r *Repo) readPoint(ctx context.Context, id PointID) (*Point, error) {
	raw, err := r.readManifest(ctx, id)
	if err != nil {
		return nil, err
	}
	p, err := decodePoint(raw, id, r.id, r.keys)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return p, nil
}

// readManifest reads the object of a manifest.
func (r *Repo) readManifest(ctx context.Context, id PointID) ([]byte, error) {
	raw, err := readObject(ctx, r.bucket, pointObject(id), maxManifestLen)
	if errors.Is(err, ErrDamaged) {
		err = &DamageError{What: "manifest " + id.String(), Err: err}
	}
	if err != nil {
		return nil, fmt.Errorf("store: manifest %s: %w", id, err)
	}
	return raw, nil
}
