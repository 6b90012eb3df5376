package reader_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
	"github.com/holdfast-backup/holdfast/store/remote"
	"github.com/holdfast-backup/holdfast/test/reader"
)

const secret = "correct horse"

// machine is a VM in memory without change tracking; it is its own Snapshot.
type machine struct {
	name   string
	disks  [][]byte
	config []backup.ConfigFile
	at     time.Time
}

func (m *machine) VM() store.VM        { return store.VM{Name: m.name, Source: "test"} }
func (m *machine) Time() time.Time     { return m.at }
func (m *machine) Consistency() string { return "crash" }
func (m *machine) Close() error        { return nil }
func (m *machine) Config(context.Context) ([]backup.ConfigFile, error) {
	return m.config, nil
}
func (m *machine) Disks() (ds []backup.Disk) {
	for i, d := range m.disks {
		ds = append(ds, &memoryDisk{bytes.NewReader(d), fmt.Sprint("disk ", i)})
	}
	return ds
}

type memoryDisk struct {
	*bytes.Reader
	key string
}

func (d *memoryDisk) Key() string             { return d.key }
func (d *memoryDisk) ChangeID() string        { return "" }
func (d *memoryDisk) Verify() (string, error) { return "", nil }
func (d *memoryDisk) Extents(context.Context, string) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Len: d.Size()}})
}

// state is what a point must read back as.
type state struct {
	id            store.PointID
	disks, config [][]byte
}

func copies(list [][]byte) (out [][]byte) {
	for _, b := range list {
		out = append(out, bytes.Clone(b))
	}
	return out
}

func (m *machine) back(t testing.TB, repo *store.Repo) state {
	t.Helper()
	m.at = m.at.Add(time.Hour)
	p, err := backup.Run(t.Context(), repo, m, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return m.state(p)
}

func (m *machine) state(p *store.Point) state {
	s := state{id: p.ID, disks: copies(m.disks)}
	for _, f := range m.config {
		s.config = append(s.config, bytes.Clone(f.Data))
	}
	return s
}

func openOptions(t testing.TB) store.OpenOptions {
	return store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte(secret), nil },
		ChunkCache: 8 << 20, PageCache: 1 << 20,
		Warn: func(s string) { t.Log(s) },
	}
}

// wantPoints compares every point of a repository with what it must be, through
// the independent reader, by tables and by scanning.
func wantPoints(t testing.TB, fsys fs.FS, want []state) {
	t.Helper()
	for _, scan := range []bool{false, true} {
		repo, err := reader.Open(fsys, reader.Options{Passphrase: secret, Scan: scan})
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range repo.Damage {
			t.Errorf("scan %v: %v", scan, err)
		}
		if len(repo.Points) != len(want) {
			t.Fatalf("scan %v: %d points, want %d", scan, len(repo.Points), len(want))
		}
		for _, s := range want {
			wantPoint(t, repo, s)
		}
	}
}

func wantPoint(t testing.TB, repo *reader.Repo, s state) {
	t.Helper()
	for _, p := range repo.Points {
		if p.ID != s.id.String() {
			continue
		}
		wantDisks(t, repo, p.Disks, s.disks)
		wantDisks(t, repo, p.Config, s.config)
		return
	}
	t.Errorf("there is no point %s", s.id)
}

func wantDisks(t testing.TB, repo *reader.Repo, disks []reader.Disk, want [][]byte) {
	t.Helper()
	if len(disks) != len(want) {
		t.Fatalf("%d disks, want %d", len(disks), len(want))
	}
	for i, d := range disks {
		got, err := repo.Bytes(d)
		if err != nil {
			t.Errorf("%s: %v", d.Name, err)
		} else if !bytes.Equal(got, want[i]) {
			t.Errorf("%s of %d bytes is not what was backed up", d.Name, d.Size)
		}
	}
}

// change writes data of all kinds at odd places.
func change(rnd *rand.Rand, data []byte, writes int) {
	for range writes {
		if len(data) == 0 {
			return
		}
		off := rnd.IntN(len(data))
		part := data[off:min(len(data), off+1+rnd.IntN(300_000))]
		switch rnd.IntN(4) {
		case 0:
			clear(part)
		case 1:
			copy(part, bytes.Repeat([]byte("holdfast"), len(part)/8+1))
		case 2:
			copy(part, data)
		default:
			for i := range part {
				part[i] = byte(rnd.Uint32())
			}
		}
	}
}

// TestReadsWhatWasBackedUp compares changing and resized disks of odd sizes, and
// configuration files, byte for byte, in a directory and with the index that the command uses.
func TestReadsWhatWasBackedUp(t *testing.T) {
	for _, chunk := range []int{64 << 10, 128 << 10, 4 << 20} {
		for _, plain := range []bool{false, true} {
			t.Run(fmt.Sprintf("chunk %d plain %v", chunk, plain), func(t *testing.T) {
				if testing.Short() && chunk != 64<<10 {
					t.Skip("-short")
				}
				t.Parallel()
				dir := t.TempDir()
				repo := makeRepo(t, dir, store.InitOptions{ChunkSize: chunk, NoEncryption: plain})
				rnd := rand.New(rand.NewPCG(uint64(chunk), 5))
				m := &machine{name: "web 1", at: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), disks: [][]byte{
					make([]byte, 9<<20+513), make([]byte, 1), {}, make([]byte, 3*chunk), make([]byte, chunk-1), make([]byte, chunk+1),
					bytes.Repeat([]byte{7}, 18<<20), // more than one page of chunks of 64 KiB
				}}
				m.config = []backup.ConfigFile{{Name: "vm.json", Data: []byte("{}")}, {Name: "a/empty"}, {Name: "a/big", Data: make([]byte, 200_001)}}
				var all []state
				for round := range 6 {
					for i := range m.disks {
						if i < len(m.disks)-1 {
							change(rnd, m.disks[i], 4)
						}
					}
					change(rnd, m.config[2].Data, 1)
					switch round {
					case 2:
						m.disks[0] = append(m.disks[0], make([]byte, 10<<20)...)
					case 3:
						m.disks[0] = m.disks[0][:5<<20+1]
					case 4:
						clear(m.disks[3])
					}
					all = append(all, m.back(t, repo))
				}
				if err := repo.Close(); err != nil {
					t.Fatal(err)
				}
				wantPoints(t, os.DirFS(dir), all)
			})
		}
	}
}

func makeRepo(t testing.TB, dir string, opt store.InitOptions) *store.Repo {
	t.Helper()
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		t.Fatal(err)
	}
	opt.Passphrase = []byte(secret)
	if err := store.Init(t.Context(), b, opt, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo, err := store.Open(t.Context(), b, remote.Index(dir), openOptions(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { repo.Close() })
	return repo
}

// TestReadDiskWritesAFile covers the sparse way out.
func TestReadDiskWritesAFile(t *testing.T) {
	dir := t.TempDir()
	repo := makeRepo(t, dir, store.InitOptions{NoEncryption: true})
	m := &machine{name: "vm", disks: [][]byte{make([]byte, 1<<20+3)}}
	copy(m.disks[0][500_000:], "somewhere")
	m.back(t, repo)
	r, err := reader.Open(os.DirFS(dir), reader.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "out.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := r.Points[0].Disks[0]
	if err := f.Truncate(d.Size); err != nil {
		t.Fatal(err)
	}
	if err := r.ReadDisk(d, f); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(f.Name())
	if err != nil || !bytes.Equal(got, m.disks[0]) {
		t.Fatalf("%d bytes, %v: not what was backed up", len(got), err)
	}
}

// TestRefusesWrongPassphrase makes sure that nothing opens by accident.
func TestRefusesWrongPassphrase(t *testing.T) {
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("other")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Open(objects(t, b).fs(), reader.Options{Passphrase: secret}); err == nil {
		t.Fatal("a wrong passphrase opens the repository")
	}
}

// objectMap is the content of a bucket: name => bytes.
type objectMap map[string][]byte

func objects(t testing.TB, b bucket.Bucket) objectMap {
	t.Helper()
	m := objectMap{}
	for info, err := range b.List(context.Background(), "") {
		if err != nil {
			t.Fatal(err)
		}
		o, err := b.Open(context.Background(), info.Name)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, o.Size())
		if n, err := o.ReadAt(p, 0); n < len(p) {
			t.Fatal(err)
		}
		o.Close()
		m[info.Name] = p
	}
	return m
}

// fs is the content as the reader wants it.
func (m objectMap) fs() fs.FS {
	out := fstest.MapFS{}
	for name, b := range m {
		out[name] = &fstest.MapFile{Data: b}
	}
	return out
}
