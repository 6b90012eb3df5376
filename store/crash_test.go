package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	"github.com/holdfast-backup/holdfast/test/reader"
)

// crashVM is a VM of one disk in memory and its own snapshot.
type crashVM struct {
	at   time.Time
	data []byte
}

func (m *crashVM) VM() store.VM        { return store.VM{Name: "vm", Source: "test"} }
func (m *crashVM) Time() time.Time     { return m.at }
func (m *crashVM) Consistency() string { return "crash" }
func (m *crashVM) Close() error        { return nil }
func (m *crashVM) Config(context.Context) ([]backup.ConfigFile, error) {
	return []backup.ConfigFile{{Name: "at", Data: []byte(m.at.String())}}, nil
}
func (m *crashVM) Disks() []backup.Disk { return []backup.Disk{&crashDisk{bytes.NewReader(m.data)}} }

type crashDisk struct{ *bytes.Reader }

func (d *crashDisk) Key() string             { return "sda" }
func (d *crashDisk) ChangeID() string        { return "" }
func (d *crashDisk) Verify() (string, error) { return "", nil }
func (d *crashDisk) Extents(context.Context, string) iter.Seq2[extent.Extent, error] {
	return extent.All([]extent.Extent{{Len: d.Size()}})
}

// next is the VM an hour later: chunks of 64 KiB of which some changed.
func (m *crashVM) next() *crashVM {
	n := &crashVM{at: m.at.Add(time.Hour), data: bytes.Clone(m.data)}
	rnd := rand.New(rand.NewPCG(1, uint64(n.at.Unix())))
	for i := 0; i < len(n.data)>>16; i += 2 {
		for j := range 500 {
			n.data[i<<16+j] = byte(rnd.Uint32())
		}
	}
	return n
}

const crashPack = 1500 // bytes: two or three records

func crashOpen(ctx context.Context, b bucket.Bucket, index store.IndexOpener) (*store.Repo, error) {
	repo, err := store.Open(ctx, b, index, store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte("secret"), nil }, ChunkCache: 1 << 20, PageCache: 1 << 20,
	})
	if err == nil {
		repo.SetPackSize(crashPack)
	}
	return repo, err
}

// crashPoint is a point that must read back, or may be there.
type crashPoint struct {
	vm   *crashVM
	must bool
}

type crashKind struct {
	name string
	kind bucket.Kind
}

// Gone at call N+1 is the process that dies right after call N.
var crashKinds = []crashKind{{"error", bucket.Fail}, {"short", bucket.Short}, {"gone", bucket.Gone}, {"lost ack", bucket.LostAck}}

// crashStep is from which call to which a run is stopped: at each, in short runs at one of five.
func crashStep() int64 {
	if testing.Short() {
		return 5
	}
	return 1
}

// TestCrash stops a first and a second backup at every call to the bucket, in
// every way, and looks at what is left: with no index, with the index from before the
// run, and with the one that the run left behind. Nothing is sampled but in short runs: see crashStep.
func TestCrash(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	for _, plain := range []bool{true, false} {
		t.Run(fmt.Sprint("plain ", plain), func(t *testing.T) {
			t.Parallel()
			m := bucket.NewMemory()
			opt := store.InitOptions{ChunkSize: 64 << 10, NoEncryption: plain, Passphrase: []byte("secret")}
			if err := store.Init(t.Context(), m, opt, time.Unix(1e9, 0)); err != nil {
				t.Fatal(err)
			}
			index := t.TempDir()
			vm := &crashVM{at: time.Unix(1e9, 0), data: make([]byte, 6<<16+100)}
			var committed []crashPoint
			for round := range 2 {
				vm = vm.next()
				stops := crashEverywhere(t, m, index, committed, vm)
				t.Logf("backup %d: %d stop points", round+1, stops)
				repo, err := crashOpen(t.Context(), m, store.LocalIndex(index, false))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := backup.Run(t.Context(), repo, vm, backup.Options{}); err != nil {
					t.Fatal(err)
				}
				if err := repo.Close(); err != nil {
					t.Fatal(err)
				}
				committed = append(committed, crashPoint{vm, true})
			}
		})
	}
}

// TestCrashInit stops Init at every call: a second one must do its work, or the
// repository must be whole.
func TestCrashInit(t *testing.T) {
	t.Cleanup(store.CheapKeys())
	opt := store.InitOptions{ChunkSize: 64 << 10, Passphrase: []byte("secret")}
	stops := 0
	for _, k := range crashKinds {
		for n := int64(1); ; n++ {
			left := bucket.NewMemory()
			f := bucket.NewFaulty(left, bucket.At(n, bucket.Fault{Kind: k.kind}))
			err := store.Init(t.Context(), f, opt, time.Now())
			left = left.Crash()
			_, noConfig := left.Open(t.Context(), "config")
			again := store.Init(t.Context(), left, opt, time.Now())
			switch {
			case noConfig != nil && again != nil:
				t.Errorf("%s at call %d: %v; the second time: %v", k.name, n, err, again)
			case noConfig == nil && !errors.Is(again, store.ErrExists):
				t.Errorf("%s at call %d: %v; the second Init wrote over it: %v", k.name, n, err, again)
			case err == nil && noConfig != nil:
				t.Errorf("%s at call %d: nothing was made", k.name, n)
			}
			if noConfig == nil {
				if _, err := left.Open(t.Context(), "config.copy"); err != nil {
					t.Errorf("%s at call %d: a config without its copy: %v", k.name, n, err)
				}
			}
			if err := crashCheck(t.Context(), left, store.MemoryIndex(), nil); err != nil {
				t.Errorf("%s at call %d: %v", k.name, n, err)
			}
			stops++
			if f.Calls() < n {
				break
			}
		}
	}
	t.Logf("%d stop points", stops)
}

// crashEverywhere runs the backup of vm over copies of m and of the index.
func crashEverywhere(t *testing.T, m *bucket.Memory, index string, committed []crashPoint, vm *crashVM) (stops int) {
	for _, k := range crashKinds {
		for n := int64(1); ; n += crashStep() {
			where := fmt.Sprintf("%s at call %d of the backup at %v", k.name, n, vm.at)
			left := m.Crash()
			f := bucket.NewFaulty(left, bucket.At(n, bucket.Fault{Kind: k.kind}))
			used, after := memoryDir(t), memoryDir(t)
			copyIndex(t, index, used)
			repo, err := crashOpen(t.Context(), f, store.LocalIndex(used, false))
			if err == nil {
				_, err = backup.Run(t.Context(), repo, vm, backup.Options{})
				copyIndex(t, used, after) // as a killed process leaves it
				left = left.Crash()
				repo.Close()
			} else {
				copyIndex(t, used, after)
			}
			points := committed
			if err == nil || k.kind == bucket.Gone {
				points = append(points[:len(points):len(points)], crashPoint{vm, err == nil})
			}
			before := memoryDir(t)
			copyIndex(t, index, before)
			for name, open := range map[string]store.IndexOpener{
				"no index": store.MemoryIndex(), "old index": store.LocalIndex(before, false), "index left": store.LocalIndex(after, false),
			} {
				if err := crashCheck(t.Context(), left.Crash(), open, points); err != nil {
					t.Errorf("%s (run: %v), %s: %v", where, err, name, err)
				}
			}
			for _, dir := range []string{used, after, before} {
				os.RemoveAll(dir)
			}
			stops++
			if f.Calls() < n {
				break // the run came to its end
			}
		}
	}
	return stops
}

// crashCheck looks at what is left with the independent reader and with a Repo,
// then backs up again.
func crashCheck(ctx context.Context, b *bucket.Memory, open store.IndexOpener, points []crashPoint) error {
	if err := crashRead(ctx, b, points); err != nil {
		return fmt.Errorf("independent reader: %w", err)
	}
	repo, err := crashOpen(ctx, b, open)
	if err != nil {
		return err
	}
	defer repo.Close()
	list, err := repo.Points(ctx)
	if err != nil {
		return err
	}
	found := map[int64]*store.Point{}
	for _, s := range list {
		p, err := repo.Point(ctx, s.ID)
		if err != nil {
			return err
		}
		found[p.Time.Unix()] = p
	}
	for _, c := range points {
		p := found[c.vm.at.Unix()]
		if p == nil {
			if c.must {
				return fmt.Errorf("the point at %v is not listed", c.vm.at)
			}
			continue
		}
		img, err := repo.OpenDisk(p, "disk0")
		if err != nil {
			return err
		}
		got := make([]byte, len(c.vm.data)+1)
		if n, err := img.ReadAt(got, 0); err != io.EOF || !bytes.Equal(got[:n], c.vm.data) {
			return fmt.Errorf("the point at %v reads wrong: %d bytes, %v", c.vm.at, n, err)
		}
		delete(found, c.vm.at.Unix())
	}
	for at := range found {
		return fmt.Errorf("there is a point at %v", time.Unix(at, 0))
	}
	var findings error
	_, err = repo.Verify(ctx, store.VerifyOptions{ReadData: true, Damage: func(d *store.DamageError) { findings = errors.Join(findings, d) }})
	if err := errors.Join(err, findings); err != nil {
		return err
	}
	vm := &crashVM{at: time.Unix(2e9, 0), data: make([]byte, 6<<16+100)}
	if len(points) > 0 {
		vm.data = points[len(points)-1].vm.data // so that chunks of the stopped run are met again
	}
	vm = vm.next()
	if _, err := backup.Run(ctx, repo, vm, backup.Options{}); err != nil {
		return fmt.Errorf("the next backup: %w", err)
	}
	if err := crashRead(ctx, b.Crash(), append(points[:len(points):len(points)], crashPoint{vm, true})); err != nil {
		return fmt.Errorf("independent reader after the next backup: %w", err)
	}
	return nil
}

// crashRead demands that a bucket holds exactly these points, and nothing half.
func crashRead(ctx context.Context, b *bucket.Memory, points []crashPoint) error {
	r, err := readerOf(ctx, b)
	if err != nil {
		return err
	}
	if err := errors.Join(r.Damage...); err != nil {
		return err
	}
	found := map[string]*reader.Point{}
	for _, p := range r.Points {
		found[p.Name] = p
	}
	for _, c := range points {
		name := store.PointName(c.vm.at)
		p := found[name]
		delete(found, name)
		if p == nil && !c.must {
			continue
		}
		if p == nil {
			return fmt.Errorf("no point %s", name)
		}
		if got, err := r.Bytes(p.Disks[0]); err != nil || !bytes.Equal(got, c.vm.data) {
			return fmt.Errorf("point %s: wrong bytes, or %w", name, err)
		}
		if got, err := r.Bytes(p.Config[0]); err != nil || string(got) != c.vm.at.String() {
			return fmt.Errorf("point %s: configuration %q, %w", name, got, err)
		}
	}
	for name := range found {
		return fmt.Errorf("there is a point %s", name)
	}
	return nil
}

// readerOf opens what a bucket holds with the independent reader.
func readerOf(ctx context.Context, b *bucket.Memory) (*reader.Repo, error) {
	fsys := fstest.MapFS{}
	for info, err := range b.List(ctx, "") {
		if err != nil {
			return nil, err
		}
		o, err := b.Open(ctx, info.Name)
		if err != nil {
			return nil, err
		}
		p := make([]byte, o.Size())
		if _, err := o.ReadAt(p, 0); err != nil && err != io.EOF {
			return nil, err
		}
		fsys[info.Name] = &fstest.MapFile{Data: p}
	}
	return reader.Open(fsys, reader.Options{Passphrase: "secret"})
}

// copyIndex copies the files of an index, leaving holes in them.
func copyIndex(t *testing.T, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := copySparse(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

func copySparse(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(len(data))); err != nil {
		return err
	}
	const block = 64 << 10
	for off := 0; off < len(data); off += block {
		part := data[off:min(off+block, len(data))]
		if bytes.Count(part, []byte{0}) == len(part) {
			continue
		}
		if _, err := f.WriteAt(part, int64(off)); err != nil {
			return err
		}
	}
	return nil
}
