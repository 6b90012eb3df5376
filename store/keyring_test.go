package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

var keysTime = time.Date(2026, 11, 21, 6, 30, 0, 0, time.UTC)

// newKeysRepo makes an empty repository with the passphrase "first".
func newKeysRepo(t *testing.T) *bucket.Memory {
	t.Helper()
	t.Cleanup(store.CheapKeys())
	m := bucket.NewMemory()
	if err := store.Init(t.Context(), m, store.InitOptions{Passphrase: []byte("first")}, keysTime); err != nil {
		t.Fatal(err)
	}
	return m
}

// noIndex is enough for what has to do with keys alone.
type noIndex struct{ store.Index }

func (noIndex) Close() error { return nil }

func openWith(t *testing.T, b bucket.Bucket, passphrase string) (*store.Repo, error) {
	t.Helper()
	index := func(context.Context, [16]byte, store.IndexCheck) (store.Index, error) { return noIndex{}, nil }
	return store.Open(t.Context(), b, index, store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte(passphrase), nil }, ChunkCache: 1 << 20, PageCache: 1 << 20,
	})
}

func mustOpen(t *testing.T, b bucket.Bucket, passphrase string) *store.Repo {
	t.Helper()
	repo, err := openWith(t, b, passphrase)
	if err != nil {
		t.Fatalf("%q: %v", passphrase, err)
	}
	return repo
}

// wantKeys wants that exactly these open the repository, of those that any test uses, each
// also from either copy of the config alone.
func wantKeys(t *testing.T, m *bucket.Memory, want ...string) {
	t.Helper()
	for _, lost := range []string{"", "config", "config.copy"} {
		b := m.Crash()
		if lost != "" {
			if err := b.Remove(t.Context(), lost); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range []string{"first", "second", "third"} {
			_, err := openWith(t, b, p)
			if opens := slices.Contains(want, p); opens != (err == nil) || !opens && !errors.Is(err, store.ErrPassphrase) {
				t.Errorf("without %q, %q: %v", lost, p, err)
			}
		}
	}
}

func object(t *testing.T, b bucket.Bucket, name string) []byte {
	t.Helper()
	o, err := b.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	p := make([]byte, o.Size())
	if n, err := o.ReadAt(p, 0); n < len(p) {
		t.Fatal(err)
	}
	return p
}

func putObject(t *testing.T, b bucket.Bucket, name string, data []byte) {
	t.Helper()
	w, err := b.Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// rewrite changes the text of an object of the config and makes its sum right.
func rewrite(t *testing.T, b bucket.Bucket, name string, pairs ...string) {
	t.Helper()
	body, _, _ := strings.Cut(string(object(t, b, name)), "\nblake3 ")
	changed := strings.NewReplacer(pairs...).Replace(body)
	if changed == body {
		t.Fatalf("nothing to change in %s", body)
	}
	putObject(t, b, name, fmt.Appendf(nil, "%s\nblake3 %x\n", changed, blake3.Sum256([]byte(changed))))
}

func TestKeys(t *testing.T) {
	m := newKeysRepo(t)
	first := mustOpen(t, m, "first")
	added, err := first.AddKey(t.Context(), []byte("second"), "of the office", keysTime.Add(time.Hour))
	if err != nil || added.Label != "of the office" || added.InUse || added.Recovery || added.ID == "" {
		t.Fatalf("%+v, %v", added, err)
	}
	wantKeys(t, m, "first", "second")
	second := mustOpen(t, m, "second")
	list, err := second.Keys(t.Context())
	if err != nil || len(list) != 2 || !list[0].Created.Equal(keysTime) || list[0].InUse || !list[1].InUse || list[1].Label != "of the office" {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, c := range []struct {
		repo *store.Repo
		id   string
		want error
	}{
		{first, list[0].ID, store.ErrKeyInUse},
		{second, list[1].ID, store.ErrKeyInUse},
		{second, "01234567", store.ErrNotExist},
		{second, "", store.ErrNotExist},
	} {
		if err := c.repo.RemoveKey(t.Context(), c.id); !errors.Is(err, c.want) {
			t.Errorf("remove %q: %v", c.id, err)
		}
	}
	for _, p := range []string{"first", "second"} {
		if _, err := first.AddKey(t.Context(), []byte(p), "", keysTime); !errors.Is(err, store.ErrExists) {
			t.Errorf("%q again: %v", p, err)
		}
		if _, err := second.ChangeKey(t.Context(), []byte(p), "", keysTime); !errors.Is(err, store.ErrExists) {
			t.Errorf("change to %q: %v", p, err)
		}
	}
	if _, err := first.AddKey(t.Context(), nil, "", keysTime); err == nil {
		t.Error("an empty passphrase is taken")
	}
	for _, label := range []string{"two\nlines", "\xff", strings.Repeat("x", 201), "\x1b[31m"} {
		if _, err := first.AddKey(t.Context(), []byte("third"), label, keysTime); err == nil {
			t.Errorf("label %q is taken", label)
		}
	}
	wantKeys(t, m, "first", "second")
	if err := second.RemoveKey(t.Context(), list[0].ID); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, m, "second")
	// Who stands on a removed key changes nothing any more.
	if _, err := first.AddKey(t.Context(), []byte("third"), "", keysTime); !errors.Is(err, store.ErrPassphrase) {
		t.Errorf("add by a removed key: %v", err)
	}
	if err := first.RemoveKey(t.Context(), list[1].ID); !errors.Is(err, store.ErrPassphrase) {
		t.Errorf("remove by a removed key: %v", err)
	}
	if err := second.RemoveKey(t.Context(), list[1].ID); !errors.Is(err, store.ErrLastKey) {
		t.Errorf("remove the last: %v", err)
	}
	changed, err := second.ChangeKey(t.Context(), []byte("third"), "", keysTime.Add(2*time.Hour))
	if err != nil || !changed.InUse || changed.Label != "of the office" || changed.ID == list[1].ID {
		t.Fatalf("%+v, %v", changed, err)
	}
	wantKeys(t, m, "third")
	if _, err := second.ChangeKey(t.Context(), []byte("first"), "new", keysTime); err != nil {
		t.Errorf("change twice: %v", err)
	}
	wantKeys(t, m, "first")
}

func TestKeysWithoutEncryption(t *testing.T) {
	m := bucket.NewMemory()
	if err := store.Init(t.Context(), m, store.InitOptions{NoEncryption: true}, keysTime); err != nil {
		t.Fatal(err)
	}
	repo := mustOpen(t, m, "")
	_, list := repo.Keys(t.Context())
	_, add := repo.AddKey(t.Context(), []byte("x"), "", keysTime)
	_, change := repo.ChangeKey(t.Context(), []byte("x"), "", keysTime)
	_, _, recovery := repo.AddRecoveryKey(t.Context(), keysTime)
	for i, err := range []error{list, add, change, recovery, repo.RemoveKey(t.Context(), "x")} {
		if !errors.Is(err, store.ErrNotEncrypted) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestManyKeys(t *testing.T) {
	m := newKeysRepo(t)
	repo := mustOpen(t, m, "first")
	for i := 1; i < store.MaxKeys; i++ {
		if _, err := repo.AddKey(t.Context(), fmt.Append(nil, "key ", i), "", keysTime); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := repo.AddKey(t.Context(), []byte("one more"), "", keysTime); err == nil {
		t.Error("there is no limit")
	}
	mustOpen(t, m, fmt.Sprint("key ", store.MaxKeys-1))
}

// TestKeysAtOnce: changes by many processes at once lose none.
func TestKeysAtOnce(t *testing.T) {
	m := newKeysRepo(t)
	const n = 12
	var wg sync.WaitGroup
	for i := range n {
		repo := mustOpen(t, m, "first")
		wg.Go(func() {
			if _, err := repo.AddKey(t.Context(), fmt.Append(nil, "key ", i), "", keysTime); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range n {
		mustOpen(t, m, fmt.Sprint("key ", i))
	}
	// Of two that change the same key one finds it gone.
	a, b := mustOpen(t, m, "key 0"), mustOpen(t, m, "key 0")
	errs := make([]error, 2)
	for i, r := range []*store.Repo{a, b} {
		wg.Go(func() { _, errs[i] = r.ChangeKey(t.Context(), fmt.Append(nil, "changed ", i), "", keysTime) })
	}
	wg.Wait()
	won := slices.Index(errs, nil)
	if won < 0 || !errors.Is(errs[1-won], store.ErrPassphrase) {
		t.Fatal(errs)
	}
	mustOpen(t, m, fmt.Sprint("changed ", won))
	if _, err := openWith(t, m, fmt.Sprint("changed ", 1-won)); !errors.Is(err, store.ErrPassphrase) {
		t.Errorf("the one that lost: %v", err)
	}
}

// TestKeysOfTwoRevisions: the higher one holds, wherever it is, and the other is mended by the next writer.
func TestKeysOfTwoRevisions(t *testing.T) {
	for _, name := range []string{"config", "config.copy"} {
		m := newKeysRepo(t)
		repo := mustOpen(t, m, "first")
		old := object(t, m, "config")
		if _, err := repo.ChangeKey(t.Context(), []byte("second"), "", keysTime); err != nil {
			t.Fatal(err)
		}
		putObject(t, m, name, old)
		if _, err := openWith(t, m, "first"); !errors.Is(err, store.ErrPassphrase) {
			t.Errorf("old %s: the removed passphrase: %v", name, err)
		}
		var warned []string
		repo, err := store.Open(t.Context(), m, store.MemoryIndex(), store.OpenOptions{
			Passphrase: func() ([]byte, error) { return []byte("second"), nil }, Warn: func(s string) { warned = append(warned, s) },
		})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(warned, []string{name + " is older than its other copy, which is used"}) {
			t.Errorf("warnings %q", warned)
		}
		// A change meanwhile must not be undone by mending from what was seen on opening.
		if _, err := mustOpen(t, m, "second").AddKey(t.Context(), []byte("third"), "", keysTime); err != nil {
			t.Fatal(err)
		}
		putObject(t, m, name, old)
		if _, err := repo.NewDraft(t.Context()); err != nil {
			t.Fatal(err)
		}
		repo.Close()
		if !bytes.Equal(object(t, m, "config"), object(t, m, "config.copy")) {
			t.Errorf("old %s was not mended", name)
		}
		wantKeys(t, m, "second", "third")
	}
}

// TestForeignConfigCopy: a copy of another repository never holds, whatever its revision.
func TestForeignConfigCopy(t *testing.T) {
	m, other := newKeysRepo(t), newKeysRepo(t)
	if _, err := mustOpen(t, other, "first").ChangeKey(t.Context(), []byte("second"), "", keysTime); err != nil {
		t.Fatal(err)
	}
	putObject(t, m, "config.copy", object(t, other, "config"))
	if _, err := mustOpen(t, m, "first").AddKey(t.Context(), []byte("third"), "", keysTime); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, m, "first", "third")
}

// TestUnknownFields: what a later program has put into the config survives a change
// of keys, but for what belongs to a key that goes.
func TestUnknownFields(t *testing.T) {
	m := newKeysRepo(t)
	for _, name := range []string{"config", "config.copy"} {
		rewrite(t, m, name, `"chunk_size": 131072`, `"chunk_size": 131072, "later": {"a": [1, 2.50, "<&>"]}, "zero": null`,
			`"kdf": "argon2id"`, `"kdf": "argon2id", "hint": "my <cat>"`)
	}
	repo := mustOpen(t, m, "first")
	if _, err := repo.AddKey(t.Context(), []byte("second"), "", keysTime); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"config", "config.copy"} {
		text := string(object(t, m, name))
		for _, want := range []string{`"later": {`, `2.50`, `"zero": null`, `"hint": `, `"revision": 1`} {
			if strings.Count(text, want) != 1 {
				t.Errorf("%d times %s in %s", strings.Count(text, want), want, text)
			}
		}
	}
	wantKeys(t, m, "first", "second")
}

func TestRecoveryKey(t *testing.T) {
	m := newKeysRepo(t)
	repo := mustOpen(t, m, "first")
	key, info, err := repo.AddRecoveryKey(t.Context(), keysTime)
	if err != nil || !info.Recovery || len(key) != 14*4+13 {
		t.Fatalf("%q, %+v, %v", key, info, err)
	}
	if bytes.Contains(object(t, m, "config"), []byte(key)) {
		t.Error("it is stored")
	}
	bare := strings.ReplaceAll(key, "-", "")
	zero := strings.NewReplacer("0", "o", "1", "l").Replace(bare)
	for _, typed := range []string{
		key, strings.ToLower(key), bare, strings.ReplaceAll(key, "-", " "), "  " + strings.ReplaceAll(key, "-", " - ") + "\n",
		zero, strings.ReplaceAll(zero, "l", "I"), strings.ReplaceAll(key, "-", "–"),
	} {
		by := mustOpen(t, m, typed)
		list, err := by.Keys(t.Context())
		if err != nil || len(list) != 2 || !list[1].InUse || !list[1].Recovery {
			t.Errorf("%q: %+v, %v", typed, list, err)
		}
	}
	typos := 0
	for i := range bare {
		for _, c := range []byte("07KZU") {
			if typed := []byte(bare); typed[i] != c {
				typed[i] = c
				typos++
				if _, err := openWith(t, m, string(typed)); !errors.Is(err, store.ErrPassphrase) || !strings.Contains(err.Error(), "mistyped") {
					t.Errorf("%s: %v", typed, err)
				}
			}
		}
		if i > 0 && bare[i] != bare[i-1] {
			typed := []byte(bare)
			typed[i], typed[i-1] = typed[i-1], typed[i]
			typos++
			if _, err := openWith(t, m, string(typed)); err == nil || !strings.Contains(err.Error(), "mistyped") {
				t.Errorf("%s: %v", typed, err)
			}
		}
	}
	t.Logf("%d typing errors", typos)
	other := newKeysRepo(t)
	foreign, _, err := mustOpen(t, other, "first").AddRecoveryKey(t.Context(), keysTime)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openWith(t, m, foreign); !errors.Is(err, store.ErrPassphrase) || !strings.Contains(err.Error(), "none of this repository") {
		t.Errorf("of another repository: %v", err)
	}
	for _, p := range []string{"wrong", strings.Repeat("x", 1000), strings.Repeat("é", 30)} {
		if _, err := openWith(t, m, p); !errors.Is(err, store.ErrPassphrase) || strings.Contains(err.Error(), "mistyped") {
			t.Errorf("%q: %v", p, err)
		}
	}
	// It replaces a lost passphrase, and stays.
	by := mustOpen(t, m, bare)
	if _, err := by.ChangeKey(t.Context(), []byte("second"), "", keysTime); !errors.Is(err, store.ErrKeyInUse) {
		t.Errorf("change by a recovery key: %v", err)
	}
	if _, err := by.AddKey(t.Context(), []byte("second"), "", keysTime); err != nil {
		t.Fatal(err)
	}
	list, _ := by.Keys(t.Context())
	if err := by.RemoveKey(t.Context(), list[0].ID); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, m, "second")
	if err := mustOpen(t, m, "second").RemoveKey(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := openWith(t, m, key); !errors.Is(err, store.ErrPassphrase) {
		t.Errorf("removed: %v", err)
	}
}

// TestCrashKeys stops every change of keys at every call to the bucket, in every way.
// What must open opens afterwards, and a key that is removed does not once that
// was reported, whichever copy of the config is lost on top.
func TestCrashKeys(t *testing.T) {
	type change struct {
		name  string
		do    func(r *store.Repo, firstID string) error
		opens []string // whatever happened
		done  []string // after success, exactly these
		undo  []string // after a stop, these or those of done
	}
	ctx := t.Context()
	changes := []change{
		{"add", func(r *store.Repo, _ string) error {
			_, err := r.AddKey(ctx, []byte("third"), "", keysTime)
			return err
		},
			[]string{"first", "second"}, []string{"first", "second", "third"}, []string{"first", "second"}},
		{"remove", func(r *store.Repo, id string) error { return r.RemoveKey(ctx, id) },
			[]string{"second"}, []string{"second"}, []string{"first", "second"}},
		{"change", func(r *store.Repo, _ string) error {
			_, err := r.ChangeKey(ctx, []byte("third"), "", keysTime)
			return err
		},
			[]string{"first"}, []string{"first", "third"}, []string{"first", "second"}},
		{"recovery", func(r *store.Repo, _ string) error { _, _, err := r.AddRecoveryKey(ctx, keysTime); return err },
			[]string{"first", "second"}, []string{"first", "second"}, []string{"first", "second"}},
	}
	clean := newKeysRepo(t)
	repo := mustOpen(t, clean, "first")
	old := object(t, clean, "config")
	if _, err := repo.AddKey(ctx, []byte("second"), "", keysTime); err != nil {
		t.Fatal(err)
	}
	list, err := repo.Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	starts := map[string]*bucket.Memory{"clean": clean, "old config": clean.Crash(), "old copy": clean.Crash(), "no config": clean.Crash(), "no copy": clean.Crash()}
	putObject(t, starts["old config"], "config", old)
	putObject(t, starts["old copy"], "config.copy", old)
	if err := errors.Join(starts["no config"].Remove(ctx, "config"), starts["no copy"].Remove(ctx, "config.copy")); err != nil {
		t.Fatal(err)
	}
	stops := 0
	for start, m := range starts {
		for _, c := range changes {
			for _, k := range crashKinds {
				for n := int64(1); ; n++ {
					left := m.Crash()
					f := bucket.NewFaulty(left, bucket.At(n, bucket.Fault{Kind: k.kind}))
					repo, err := openWith(t, f, "second")
					if err == nil {
						err = c.do(repo, list[0].ID)
					}
					where := fmt.Sprintf("%s, from %s, %s at call %d (%v)", c.name, start, k.name, n, err)
					left = left.Crash()
					if err != nil && !errors.Is(err, store.ErrUnsure) {
						crashKeysCheck(t, where, left, true, c.undo, nil) // it said that nothing has changed
					}
					crashKeysCheck(t, where, left, err == nil, c.done, c.undo)
					if err == nil {
						for _, lost := range []string{"config", "config.copy"} {
							b := left.Crash()
							if err := b.Remove(ctx, lost); err != nil {
								t.Fatal(err)
							}
							crashKeysCheck(t, where+", without "+lost, b, true, c.done, nil)
						}
					}
					// The next change by one that must open mends all.
					if _, err := mustOpen(t, left, c.opens[0]).AddKey(ctx, []byte("next"), "", keysTime); err != nil {
						t.Errorf("%s: the next change: %v", where, err)
					}
					if !bytes.Equal(object(t, left, "config"), object(t, left, "config.copy")) {
						t.Errorf("%s: the copies differ after the next change", where)
					}
					stops++
					if f.Calls() < n {
						break
					}
				}
			}
		}
	}
	t.Logf("%d stop points", stops)
}

func crashKeysCheck(t *testing.T, where string, b *bucket.Memory, success bool, done, undo []string) {
	t.Helper()
	var opens []string
	for _, p := range []string{"first", "second", "third"} {
		_, err := openWith(t, b, p)
		if err == nil {
			opens = append(opens, p)
		} else if !errors.Is(err, store.ErrPassphrase) {
			t.Errorf("%s: %q: %v", where, p, err)
		}
	}
	if !slices.Equal(opens, done) && (success || !slices.Equal(opens, undo)) {
		t.Errorf("%s: %q open it", where, opens)
	}
}
