package reader_test

import (
	"maps"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/test/reader"
)

// TestKeys: the independent reader opens a repository by the keys that it has after each change, and
// from whichever copy of the config a crash has left newer.
func TestKeys(t *testing.T) {
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte(secret)}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo, err := store.Open(t.Context(), b, newMapIndex().opener(true), openOptions(t))
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	before := objects(t, b)
	wantOpens := func(m objectMap, password string, want bool) {
		t.Helper()
		_, err := reader.Open(m.fs(), reader.Options{Passphrase: password})
		if (err == nil) != want {
			t.Errorf("%q: the independent reader says %v", password, err)
		}
		if err := openAs(t, m, password); (err == nil) != want {
			t.Errorf("%q: %v", password, err)
		}
	}
	printed, _, err := repo.AddRecoveryKey(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.ChangeKey(t.Context(), []byte("new"), "", time.Now()); err != nil {
		t.Fatal(err)
	}
	after := objects(t, b)
	for _, name := range []string{"", "config", "config.copy"} {
		m := maps.Clone(after)
		if name != "" {
			m[name] = before[name]
		}
		wantOpens(m, "new", true)
		wantOpens(m, printed, true)
		wantOpens(m, secret, false)
	}
	wantOpens(before, secret, true)
	wantOpens(before, printed, false)
}
