package store

import (
	"errors"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// TestPins: a pinned point is not forgotten, whoever forgets; one that is gone cannot be pinned; a pin that cannot be read counts for all points.
func TestPins(t *testing.T) {
	ctx := t.Context()
	b := bucket.NewMemory()
	secret := []byte("secret")
	if err := Init(ctx, b, InitOptions{Passphrase: secret}, time.Now()); err != nil {
		t.Fatal(err)
	}
	open := func() *Repo {
		t.Helper()
		r, err := Open(ctx, b, MemoryIndex(), OpenOptions{Passphrase: func() ([]byte, error) { return secret, nil }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r
	}
	r := open()
	p1, p2 := pinPoint(t, r, "web"), pinPoint(t, r, "db")
	pin := Pin{ID: "one", Point: p1, What: "boot web", Host: "here", Home: "h", Place: "/boots/1"}
	if err := r.Pin(ctx, pin); err != nil {
		t.Fatal(err)
	}
	pin.ID = "two"
	if err := r.Pin(ctx, pin); err != nil {
		t.Fatal(err)
	}
	other := open() // of another process
	if done, err := other.Forget(ctx, []PointID{p2, p1}, time.Now()); !errors.Is(err, ErrPinned) || len(done) != 0 {
		t.Fatalf("forgot %v, %v", done, err)
	}
	for _, id := range []string{"two", "two", "never"} {
		if err := r.Unpin(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := other.Pins(ctx); err != nil || len(list) != 1 || list[0].ID != "one" || list[0].Point != p1 || list[0].Place != "/boots/1" {
		t.Fatalf("%+v, %v", list, err)
	}
	if there, err := other.Pinned(ctx, "one"); err != nil || !there {
		t.Errorf("%v, %v", there, err)
	}
	if there, err := other.Pinned(ctx, "two"); err != nil || there {
		t.Errorf("%v, %v", there, err)
	}
	if _, err := other.Forget(ctx, []PointID{p1}, time.Now()); !errors.Is(err, ErrPinned) {
		t.Errorf("one pin of two is left: %v", err)
	}
	if done, err := other.Forget(ctx, []PointID{p2}, time.Now()); err != nil || len(done) != 1 {
		t.Fatalf("%v, %v", done, err)
	}
	pin.Point = p2
	if err := r.Pin(ctx, pin); !errors.Is(err, ErrNotExist) {
		t.Errorf("a point that is gone: %v", err)
	}
	if err := writeObject(ctx, b, r.noteObject(pinKind, "one"), []byte("not a note")); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Forget(ctx, []PointID{p1}, time.Now()); !errors.Is(err, ErrDamaged) {
		t.Errorf("a pin that cannot be read: %v", err)
	}
	if done, err := other.ForgetDamaged(ctx, []PointID{p1}, time.Now()); err != nil || len(done) != 1 {
		t.Errorf("by force: %v, %v", done, err)
	}
}

// pinPoint makes a point without disks.
func pinPoint(t *testing.T, r *Repo, vm string) PointID {
	t.Helper()
	d, err := r.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := &Point{VM: VM{Name: vm, Source: "imagefile"}, Time: time.Now().UTC()}
	if err := d.Commit(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return p.ID
}
