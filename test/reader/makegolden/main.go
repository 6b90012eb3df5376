// Command makegolden makes the tiny repositories that later versions of Holdfast
// must still read, in a folder that does not exist yet:
//
//	go run ./test/reader/makegolden test/reader/testdata/v1
//
// It is run once for each version of the format and never again: a folder made by an
// older version is what it is because that version made it.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
)

const passphrase = "golden"

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: makegolden NEW-FOLDER")
		os.Exit(2)
	}
	if err := makeAll(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "makegolden:", err)
		os.Exit(1)
	}
}

// expected is what a point must read back as: name => size and SHA-256.
type expected struct {
	Name   string            `json:"name"`
	VM     string            `json:"vm"`
	Disks  map[string]digest `json:"disks"`
	Config map[string]digest `json:"config"`
}

type digest struct {
	Size   int    `json:"size"`
	SHA256 string `json:"sha256"`
}

func makeAll(ctx context.Context, dir string) error {
	// Mkdir, not MkdirAll: what is there stays as it is.
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	want := map[string]map[string]expected{} // repository => point id => what it is
	for _, name := range []string{"encrypted", "plain"} {
		points, err := makeOne(ctx, filepath.Join(dir, name), name == "plain")
		if err != nil {
			return err
		}
		want[name] = points
	}
	b, err := json.MarshalIndent(want, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "expected.json"), append(b, '\n'), 0o644)
}

func makeOne(ctx context.Context, dir string, plain bool) (map[string]expected, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		return nil, err
	}
	at := time.Date(2026, 11, 21, 6, 30, 0, 0, time.UTC)
	err = store.Init(ctx, b, store.InitOptions{ChunkSize: 64 << 10, NoEncryption: plain, Passphrase: []byte(passphrase)}, at)
	if err != nil {
		return nil, err
	}
	repo, err := store.Open(ctx, b, store.MemoryIndex(), store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte(passphrase), nil },
	})
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	m := newMachine(at)
	points := map[string]expected{}
	for range 2 {
		p, err := backup.Run(ctx, repo, m, backup.Options{Tags: []string{"golden"}, Program: "makegolden"})
		if err != nil {
			return nil, err
		}
		points[p.ID.String()] = m.expected(p)
		m.change()
	}
	return points, repo.Close()
}

// machine is a small VM in memory, and its own snapshot.
type machine struct {
	at    time.Time
	disks [][]byte
	file  []byte
}

// newMachine has one chunk that does not compress, some that do, a last one
// that is padded, a map of two levels, an empty disk and one that is a hole.
func newMachine(at time.Time) *machine {
	rnd := rand.New(rand.NewPCG(1, 1))
	noise := make([]byte, 64<<10)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	first := append(noise, bytes.Repeat([]byte("Holdfast "), 20_000)...)
	second := make([]byte, 20<<20+513)
	copy(second[17<<20:], "beyond the first page")
	copy(second[20<<20:], bytes.Repeat([]byte{0xff}, 513))
	return &machine{at: at, disks: [][]byte{first, second, {}, make([]byte, 100_000)}, file: []byte("<domain/>\n")}
}

func (m *machine) change() {
	m.at = m.at.Add(24 * time.Hour)
	copy(m.disks[0][70_000:], "the second day")
	copy(m.disks[1][5:], "the second day")
	clear(m.disks[1][17<<20 : 18<<20])
	m.file = append(m.file, "<!-- changed -->\n"...)
}

func (m *machine) expected(p *store.Point) expected {
	e := expected{Name: p.Name, VM: p.VM.Name, Disks: map[string]digest{}, Config: map[string]digest{"domain.xml": sum(m.file)}}
	for i, d := range m.disks {
		e.Disks[p.Disks[i].Name] = sum(d)
	}
	return e
}

func sum(b []byte) digest {
	s := sha256.Sum256(b)
	return digest{len(b), hex.EncodeToString(s[:])}
}

func (m *machine) VM() store.VM        { return store.VM{Name: "golden", Source: "makegolden"} }
func (m *machine) Time() time.Time     { return m.at }
func (m *machine) Consistency() string { return "offline" }
func (m *machine) Close() error        { return nil }
func (m *machine) Config(context.Context) ([]backup.ConfigFile, error) {
	return []backup.ConfigFile{{Name: "domain.xml", Data: m.file}}, nil
}
func (m *machine) Disks() (ds []backup.Disk) {
	for i, d := range m.disks {
		ds = append(ds, &disk{bytes.NewReader(d), fmt.Sprint("sd", i)})
	}
	return ds
}

type disk struct {
	*bytes.Reader
	key string
}

func (d *disk) Key() string             { return d.key }
func (d *disk) ChangeID() string        { return "" }
func (d *disk) Verify() (string, error) { return "", nil }
func (d *disk) Extents(context.Context, string) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Len: d.Size()}})
}
