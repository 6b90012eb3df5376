package store

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestNotes: kept, replaced, told apart, and never taken for another one or for what was damaged.
func TestNotes(t *testing.T) {
	ctx := t.Context()
	b := bucket.NewMemory()
	secret := []byte("secret")
	if err := Init(ctx, b, InitOptions{Passphrase: secret}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, b, MemoryIndex(), OpenOptions{Passphrase: func() ([]byte, error) { return secret, nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := r.Note(ctx, "boot", "vm"); !errors.Is(err, ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	long := bytes.Repeat([]byte("0123456789"), 100000)
	for _, data := range [][]byte{{}, []byte("first"), long} {
		if err := r.SetNote(ctx, "boot", "vm", data); err != nil {
			t.Fatal(err)
		}
		if got, err := r.Note(ctx, "boot", "vm"); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes: %d bytes, %v", len(data), len(got), err)
		}
	}
	if err := r.SetNote(ctx, "boot", "other", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := r.SetNote(ctx, "proof", "vm", []byte("y")); err != nil {
		t.Fatal(err)
	}
	if err := r.SetNote(ctx, "boot", "vm", make([]byte, maxNote+1)); err == nil {
		t.Error("a note of any size is kept")
	}
	// In the place of another one it is refused.
	raw, err := readObject(ctx, b, r.noteObject("boot", "other"), maxNote)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeObject(ctx, b, r.noteObject("boot", "vm"), raw); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Note(ctx, "boot", "vm"); !errors.Is(err, ErrDamaged) {
		t.Errorf("in another's place: %v", err)
	}
	for i := range raw { // every byte
		bad := bytes.Clone(raw)
		bad[i] ^= 1
		if err := writeObject(ctx, b, r.noteObject("boot", "other"), bad); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Note(ctx, "boot", "other"); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
	}
	if err := r.SweepNotes(ctx, "boot", []string{"vm"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Note(ctx, "boot", "other"); !errors.Is(err, ErrNotExist) {
		t.Errorf("swept: %v", err)
	}
	if got, err := r.Note(ctx, "proof", "vm"); err != nil || string(got) != "y" {
		t.Errorf("of another kind: %q, %v", got, err)
	}
}
