package store

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

const (
	notePrefix    = "notes/"
	noteHeaderLen = 56
	noteVersion   = 1
	maxNote       = 16 << 20 // bytes of what is in one
	ctxNote       = "holdfast repository v1 note"
	ctxNoteName   = "holdfast repository v1 note name"
)

var noteMagic = [8]byte{'H', 'F', 'N', 'O', 'T', 'E', 0, 0}

// noteObject is the name of a note. It tells nobody what the note is of.
func (r *Repo) noteObject(kind, of string) string {
	key := r.keys.derive(ctxNoteName, nil)
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic(err) // the key's length is a constant
	}
	h.WriteString(kind + "\x00" + of)
	var sum [16]byte
	h.Digest().Read(sum[:])
	return notePrefix + kind + "-" + hex.EncodeToString(sum[:])
}

// SetNote keeps data about something beside the points, such as what was seen of a point when it was booted. It
// replaces what the repository has under the same kind and name. No reader of a point
// needs one, gc and copies know nothing of them. kind is short and of letters.
func (r *Repo) SetNote(ctx context.Context, kind, of string, data []byte) error {
	if len(data) > maxNote || len(of) > 1<<15 {
		return fmt.Errorf("store: a note of %d bytes is too large", len(data))
	}
	h := make([]byte, noteHeaderLen)
	copy(h, noteMagic[:])
	binary.LittleEndian.PutUint32(h[8:], noteVersion)
	copy(h[16:], r.id[:])
	plain := binary.LittleEndian.AppendUint16(nil, uint16(len(of)))
	plain = append(append(plain, of...), data...)
	raw, err := sealObject(h, ctxNote, plain, r.keys)
	if err != nil {
		return err
	}
	if err := writeObject(ctx, r.bucket, r.noteObject(kind, of), raw); err != nil {
		return fmt.Errorf("store: note: %w", err)
	}
	return nil
}

// Note gives what SetNote kept. ErrNotExist, ErrDamaged, ErrNewerFormat.
func (r *Repo) Note(ctx context.Context, kind, of string) ([]byte, error) {
	name := r.noteObject(kind, of)
	got, data, err := r.openNote(ctx, name)
	if err == nil && got != of {
		return nil, &DamageError{What: name, Err: errors.New("is of something else")}
	}
	return data, err
}

// openNote gives what is in an object, and of what that is.
func (r *Repo) openNote(ctx context.Context, name string) (of string, data []byte, err error) {
	b, err := readObject(ctx, r.bucket, name, maxNote+1<<20)
	if err != nil {
		return "", nil, fmt.Errorf("store: note: %w", err)
	}
	damaged := func(why string) (string, []byte, error) {
		return "", nil, &DamageError{What: name, Err: errors.New(why)}
	}
	if len(b) < noteHeaderLen+tagLen+sealedCheck || [8]byte(b) != noteMagic {
		return damaged("header")
	}
	if !wholeObject(b) {
		return damaged("checksum")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v > noteVersion {
		return "", nil, fmt.Errorf("%s: %w", name, ErrNewerFormat)
	}
	if [16]byte(b[16:]) != r.id {
		return damaged("belongs to another repository")
	}
	plain, err := openObject(b, noteHeaderLen, ctxNote, maxNote+1<<17, r.keys)
	if err != nil {
		return damaged(err.Error())
	}
	if len(plain) < 2 || len(plain) < 2+int(binary.LittleEndian.Uint16(plain)) {
		return damaged("length")
	}
	n := 2 + int(binary.LittleEndian.Uint16(plain))
	return string(plain[2:n]), plain[n:], nil
}

// dropNote removes a note, if there is one.
func (r *Repo) dropNote(ctx context.Context, kind, of string) error {
	if err := r.bucket.Remove(ctx, r.noteObject(kind, of)); err != nil && !errors.Is(err, ErrNotExist) {
		return fmt.Errorf("store: note: %w", err)
	}
	return nil
}

// SweepNotes removes notes of a kind, but for those of the given names.
func (r *Repo) SweepNotes(ctx context.Context, kind string, keep []string) error {
	stays := map[string]bool{}
	for _, of := range keep {
		stays[r.noteObject(kind, of)] = true
	}
	for name, err := range bucket.Names(ctx, r.bucket, notePrefix+kind+"-") {
		if err != nil {
			return fmt.Errorf("store: notes: %w", err)
		}
		if stays[name] {
			continue
		}
		if err := r.bucket.Remove(ctx, name); err != nil && !errors.Is(err, ErrNotExist) {
			return fmt.Errorf("store: notes: %w", err)
		}
	}
	return nil
}
