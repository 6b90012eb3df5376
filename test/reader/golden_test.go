package reader_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/test/reader"
)

type goldenPoint struct {
	Name   string                  `json:"name"`
	VM     string                  `json:"vm"`
	Disks  map[string]goldenDigest `json:"disks"`
	Config map[string]goldenDigest `json:"config"`
}

type goldenDigest struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// TestGolden reads repositories made by each version of the format. They are
// never made anew: see makegolden. Those of v1-program were made by the program itself, with
// its default chunks, which have several zstd frames each; that of v1-keys besides has had its
// keys changed, and has a recovery key.
func TestGolden(t *testing.T) {
	for version, repos := range map[string]int{"v1": 2, "v1-program": 2, "v1-keys": 1} {
		dir := filepath.Join("testdata", version)
		b, err := os.ReadFile(filepath.Join(dir, "expected.json"))
		if err != nil {
			t.Fatal(err)
		}
		var want map[string]map[string]goldenPoint
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatal(err)
		}
		if len(want) != repos {
			t.Fatalf("%s: %d repositories", version, len(want))
		}
		for name, points := range want {
			t.Run(version+" "+name, func(t *testing.T) {
				fsys := os.DirFS(filepath.Join(dir, name))
				passwords := []string{"golden"}
				if version == "v1-keys" {
					passwords = append(passwords, goldenRecovery, strings.ToLower(strings.ReplaceAll(goldenRecovery, "-", " ")))
					goldenRefused(t, fsys, "was") // its first one, removed since
				}
				for _, password := range passwords {
					goldenByReader(t, fsys, points, password)
					goldenByStore(t, fsys, points, password)
				}
			})
		}
	}
}

// goldenRecovery is the recovery key of v1-keys.
const goldenRecovery = "T74S-K9MM-WRKE-HNS3-TE5N-043W-YE75-739Q-ECG8-P2FD-KNKV-SYD7-6CZD-NPPA"

func goldenRefused(t *testing.T, fsys fs.FS, password string) {
	if _, err := reader.Open(fsys, reader.Options{Passphrase: password}); err == nil {
		t.Errorf("the independent reader: %q opens it", password)
	}
	if err := openAs(t, fsObjects(t, fsys), password); !errors.Is(err, store.ErrPassphrase) {
		t.Errorf("%q: %v", password, err)
	}
}

func goldenByReader(t *testing.T, fsys fs.FS, want map[string]goldenPoint, password string) {
	for _, scan := range []bool{false, true} {
		r, err := reader.Open(fsys, reader.Options{Passphrase: password, Scan: scan})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Damage) != 0 || len(r.Points) != len(want) {
			t.Fatalf("%d points, want %d; damage: %v", len(r.Points), len(want), r.Damage)
		}
		for _, p := range r.Points {
			w := want[p.ID]
			if p.Name != w.Name || p.VM.Name != w.VM || len(p.Disks) != len(w.Disks) || len(p.Config) != len(w.Config) {
				t.Errorf("point %s: %s", p.ID, p.JSON)
			}
			check := func(list []reader.Disk, want map[string]goldenDigest) {
				for _, d := range list {
					b, err := r.Bytes(d)
					if err != nil || digestOf(b) != want[d.Name] {
						t.Errorf("point %s %s: %d bytes, %v", p.ID, d.Name, len(b), err)
					}
				}
			}
			check(p.Disks, w.Disks)
			check(p.Config, w.Config)
		}
	}
}

func goldenByStore(t *testing.T, fsys fs.FS, want map[string]goldenPoint, password string) {
	opt := openOptions(t)
	opt.Passphrase = func() ([]byte, error) { return []byte(password), nil }
	repo, err := store.Open(t.Context(), memoryOf(t, fsObjects(t, fsys)), store.MemoryIndex(), opt)
	if err != nil {
		t.Fatal(err)
	}
	defer repo.Close()
	list, err := repo.Points(t.Context())
	if err != nil || len(list) != len(want) {
		t.Fatalf("%d points, want %d: %v", len(list), len(want), err)
	}
	check := func(img *store.Image, err error, want goldenDigest) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
		if err != nil || digestOf(b) != want {
			t.Errorf("%d bytes, want %d: %v", len(b), want.Size, err)
		}
	}
	for _, s := range list {
		p, err := repo.Point(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		w := want[p.ID.String()]
		if p.Path() != w.VM+"/"+w.Name || len(p.Disks) != len(w.Disks) || len(p.Config) != len(w.Config) {
			t.Errorf("point %s is %s", p.ID, p.Path())
		}
		for _, d := range p.Disks {
			img, err := repo.OpenDisk(p, d.Name)
			check(img, err, w.Disks[d.Name])
		}
		for _, c := range p.Config {
			img, err := repo.OpenConfig(p, c.Name)
			check(img, err, w.Config[c.Name])
		}
	}
	report, err := repo.Verify(t.Context(), store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { t.Error(d) }})
	if err != nil || report.Points != len(want) {
		t.Errorf("%+v, %v", report, err)
	}
}

func digestOf(b []byte) goldenDigest {
	sum := sha256.Sum256(b)
	return goldenDigest{int64(len(b)), hex.EncodeToString(sum[:])}
}

func fsObjects(t testing.TB, fsys fs.FS) objectMap {
	t.Helper()
	m := objectMap{}
	err := fs.WalkDir(fsys, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		m[name], err = fs.ReadFile(fsys, name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// memoryOf is a bucket with copies of these objects.
func memoryOf(t testing.TB, m objectMap) *bucket.Memory {
	t.Helper()
	b := bucket.NewMemory()
	for name, data := range m {
		put(t, b, name, data)
	}
	return b
}

func put(t testing.TB, b bucket.Bucket, name string, data []byte) {
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
