package reader_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/crypto/argon2"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/test/reader"
)

// subject is a whole repository that tests damage copies of.
type subject struct {
	objects objectMap
	machine *machine // as of the second point
	points  []state
	paths   []string  // of the points
	index   *mapIndex // made before any damage
	// users says which disks need which records.
	users []use
}

type use struct {
	reader.Range
	point string // path
	disk  string
}

// newSubject makes two points of one VM that share chunks and pages; disk0 has
// some chunks and a padded end, disk1 a map of two levels with little in it. With raw
// there is a chunk that does not compress.
func newSubject(t testing.TB, plain, raw bool) *subject {
	t.Helper()
	b := memoryOf(t, nil)
	at := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	opt := store.InitOptions{ChunkSize: 64 << 10, NoEncryption: plain, Passphrase: []byte(secret)}
	if err := store.Init(t.Context(), b, opt, at); err != nil {
		t.Fatal(err)
	}
	if !plain {
		cheapen(t, b)
	}
	s := &subject{index: newMapIndex()}
	repo, err := store.Open(t.Context(), b, s.index.opener(true), openOptions(t))
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(11, 13))
	text := func(p []byte, n int) {
		for i := range p[:n] {
			p[i] = byte(rnd.Uint32())
		}
		copy(p[n:], bytes.Repeat(p[:n], len(p)/n))
	}
	m := &machine{name: "vm", at: at, disks: [][]byte{make([]byte, 3<<16+777), make([]byte, 17<<20)}}
	m.config = []backup.ConfigFile{{Name: "vm.xml", Data: []byte("<vm/>")}}
	text(m.disks[0][:1<<16], 200)
	text(m.disks[0][2<<16:], 100)
	text(m.disks[1][16<<20+1<<16:16<<20+2<<16], 64)
	if raw {
		text(m.disks[0][1<<16:2<<16], 1<<16)
	}
	s.points = append(s.points, m.back(t, repo))
	text(m.disks[0][100:], 150)
	text(m.disks[1][:1000], 50)
	m.config[0].Data = []byte("<vm new='1'/>")
	s.points = append(s.points, m.back(t, repo))
	for _, p := range s.points {
		point, err := repo.Point(t.Context(), p.id)
		if err != nil {
			t.Fatal(err)
		}
		s.paths = append(s.paths, point.Path())
	}
	if err := repo.Close(); err != nil {
		t.Fatal(err)
	}
	s.machine, s.objects = m, objects(t, b)
	s.findUsers(t)
	return s
}

func (s *subject) findUsers(t testing.TB) {
	t.Helper()
	r, err := reader.Open(s.objects.fs(), reader.Options{Passphrase: secret})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Points {
		for i, d := range append(p.Disks, p.Config...) {
			ranges, err := r.Records(d)
			if err != nil {
				t.Fatal(err)
			}
			name := d.Name
			if i >= len(p.Disks) {
				name = "config/" + name
			}
			for _, at := range ranges {
				s.users = append(s.users, use{at, p.VM.Name + "/" + p.Name, name})
			}
		}
	}
}

// usersOf gives the disks that need the record at off of an object.
func (s *subject) usersOf(object string, off int64) map[string]bool {
	hit := map[string]bool{}
	for _, u := range s.users {
		if u.Object == object && off >= u.Off && off < u.Off+u.Len {
			hit[u.point+" "+u.disk] = true
		}
	}
	return hit
}

// cheapen wraps the master key again with the least parameters of Argon2id that
// are allowed: opening must cost microseconds here.
func cheapen(t testing.TB, b bucket.Bucket) {
	t.Helper()
	const head, label = "holdfast repository\n", "\nblake3 "
	raw := string(objects(t, b)["config"])
	body, _, _ := strings.Cut(strings.TrimPrefix(raw, head), label)
	var c map[string]any
	dec := json.NewDecoder(strings.NewReader(body))
	dec.UseNumber()
	if err := dec.Decode(&c); err != nil {
		t.Fatal(err)
	}
	slot := c["keys"].([]any)[0].(map[string]any)
	unhex := func(field string) []byte {
		b, err := hex.DecodeString(slot[field].(string))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	seal := func() cipher.AEAD {
		number := func(field string) uint32 {
			n, err := slot[field].(json.Number).Int64()
			if err != nil {
				t.Fatal(err)
			}
			return uint32(n)
		}
		key := argon2.IDKey([]byte(secret), unhex("salt"), number("time"), number("memory_kib"), uint8(number("threads")), 32)
		block, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			t.Fatal(err)
		}
		return aead
	}
	ad := fmt.Appendf(nil, "holdfast key 1 %s %s %s", c["id"], c["chunk_size"], c["cipher"])
	wrapped := unhex("wrapped")
	master, err := seal().Open(nil, wrapped[:12], wrapped[12:], ad)
	if err != nil {
		t.Fatal(err)
	}
	slot["time"], slot["memory_kib"], slot["threads"] = json.Number("1"), json.Number("8"), json.Number("1")
	slot["wrapped"] = hex.EncodeToString(seal().Seal(wrapped[:12:12], wrapped[:12], master, ad))
	out, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	out = append([]byte(head), out...)
	out = fmt.Appendf(out, "%s%x\n", label, blake3.Sum256(out))
	put(t, b, "config", out)
	put(t, b, "config.copy", out)
}

// verdict is what a damaged repository said of itself.
type verdict struct {
	findings []*store.DamageError
	// failed has the disks that could not be read, and the paths of points whose
	// manifest could not.
	failed map[string]error
}

// examine opens a damaged repository, verifies it and reads every disk of every
// point. It returns an error for what must never happen: wrong bytes, or an error that is not damage.
func (s *subject) examine(t testing.TB, objects objectMap, open store.IndexOpener, rnd *rand.Rand) (v verdict, err error) {
	b := memoryOf(t, objects)
	opt := openOptions(t)
	opt.Warn = nil
	repo, err := store.Open(t.Context(), b, open, opt)
	if err != nil {
		return v, fmt.Errorf("open: %w", err)
	}
	defer repo.Close()
	v.failed = map[string]error{}
	for i, want := range s.points {
		p, err := repo.Point(t.Context(), want.id)
		if err != nil {
			if !errors.Is(err, store.ErrDamaged) && !errors.Is(err, store.ErrNotExist) {
				return v, fmt.Errorf("manifest of %s: %w", s.paths[i], err)
			}
			v.failed[s.paths[i]] = err
			continue
		}
		for n, data := range want.disks {
			img, err := repo.OpenDisk(p, fmt.Sprint("disk", n))
			if err == nil {
				err = readAll(img, data, rnd.IntN(2) == 0)
			}
			if err := v.note(fmt.Sprintf("%s disk%d", s.paths[i], n), err); err != nil {
				return v, err
			}
		}
		for n, data := range want.config {
			name := s.machine.config[n].Name
			img, err := repo.OpenConfig(p, name)
			if err == nil {
				err = readAll(img, data, true)
			}
			if err := v.note(s.paths[i]+" config/"+name, err); err != nil {
				return v, err
			}
		}
	}
	_, err = repo.Verify(t.Context(), store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) {
		v.findings = append(v.findings, d)
	}})
	if err != nil {
		return v, fmt.Errorf("verify: %w", err)
	}
	return v, nil
}

func (v *verdict) note(disk string, err error) error {
	if err == nil {
		return nil
	}
	var d *store.DamageError
	if !errors.As(err, &d) || d.Point+" "+d.Disk != disk {
		return fmt.Errorf("%s: %w", disk, err)
	}
	v.failed[disk] = err
	return nil
}

// readAll compares an image with what it must hold, by whole chunks or by parts of them.
// Large holes are only compared at their ends.
func readAll(img *store.Image, want []byte, whole bool) error {
	if img.Size() != int64(len(want)) {
		return fmt.Errorf("%d bytes, want %d", img.Size(), len(want))
	}
	const chunk = 64 << 10
	buf := make([]byte, 4*chunk)
	read := func(from, to int) error {
		n, err := img.ReadAt(buf[:to-from], int64(from))
		if !bytes.Equal(buf[:n], want[from:from+n]) {
			return fmt.Errorf("wrong bytes at %d: %v", from, err)
		}
		if n < to-from && (err == nil || err == io.EOF) {
			return fmt.Errorf("%d bytes at %d, want %d: %v", n, from, to-from, err)
		}
		if n == to-from && err != nil && err != io.EOF {
			return fmt.Errorf("all bytes at %d, and still: %v", from, err)
		}
		if err == io.EOF {
			err = nil
		}
		return err
	}
	var damage error
	for from := 0; from < len(want); {
		to := min(from+4*chunk, len(want))
		if len(want) > 8*chunk && from >= 4*chunk && from < 16<<20-chunk {
			from = 16<<20 - chunk
			to = from + 4*chunk
		}
		if !whole {
			to = min(from+chunk-300, len(want))
		}
		if err := read(from, to); err != nil {
			if !errors.Is(err, store.ErrDamaged) {
				return err
			}
			damage = err
		}
		from = to
	}
	return damage
}
