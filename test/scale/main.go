//go:build linux

// Command scale makes a repository with many restore points of many large disks
// and measures what Holdfast's commands take with it: time and peak memory.
//
//	go run ./test/scale --dir /var/tmp --points 100000 --vms 200 --size 10G     # 1 PiB of disks
//
// Chunk maps, manifests and the index are real and made by the same code as a
// backup's. The chunks are not there: their ids are random numbers and their packs files that are
// one hole. So nothing of these disks can be read but where they have holes; for the first
// byte of a mount there is one real point besides.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

const password = "scale"

type options struct {
	parent, holdfast, measure string
	points, vms, changes      int
	size, memory              testimage.SizeFlag
}

func main() {
	o := options{size: 10 << 30, memory: 1 << 30}
	flag.StringVar(&o.parent, "dir", os.TempDir(), "where to work")
	flag.IntVar(&o.points, "points", 100000, "restore points, of all VMs together")
	flag.IntVar(&o.vms, "vms", 200, "VMs of one disk each")
	flag.IntVar(&o.changes, "changes", 4, "chunks that change from point to point")
	flag.Var(&o.size, "size", "size of a disk, all of it data")
	flag.Var(&o.memory, "memory", "memory that every command gets, page cache included, where control groups allow that; 0: no limit")
	flag.StringVar(&o.holdfast, "holdfast", "", "holdfast to measure (default: build it)")
	flag.StringVar(&o.measure, "measure", "", "only measure the repository in this directory")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	run := build
	if o.measure != "" {
		run = measure
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "scale: %v\n", err)
		os.Exit(1)
	}
}

// build makes the repository, then measures it in a process that has no memory of that.
func build(ctx context.Context, o options) (err error) {
	if o.points < o.vms || o.vms < 1 {
		return errors.New("want at least one VM and a point of each")
	}
	dir, err := os.MkdirTemp(o.parent, "holdfast-scale-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	m := maker{o: o, dir: filepath.Join(dir, "repo"), rnd: rand.NewChaCha8([32]byte{1})}
	began := time.Now()
	if err := m.make(ctx); err != nil {
		return err
	}
	fmt.Printf("%d points of %d VMs, %.2f TiB of disks, made in %.0f s\n", o.points, o.vms,
		float64(o.points)*float64(o.size)/(1<<40), time.Since(began).Seconds())
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, "--measure", m.dir, "--holdfast", o.holdfast, "--memory", fmt.Sprint(int64(o.memory)))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// maker makes a repository.
type maker struct {
	o     options
	dir   string
	rnd   *rand.ChaCha8
	index store.Index
	repo  *store.Repo
	pack  []store.PackRecord // being filled
}

// perPack is how many chunks a pack holds when they are about 45 KiB each as stored.
const (
	perPack   = 1400
	chunkBody = 45 << 10
)

func (m *maker) make(ctx context.Context) (err error) {
	if err := os.MkdirAll(filepath.Join(m.dir, "packs"), 0o700); err != nil {
		return err
	}
	b, err := bucket.OpenLocal(m.dir)
	if err != nil {
		return err
	}
	if err := store.Init(ctx, b, store.InitOptions{Passphrase: []byte(password)}, time.Now()); err != nil {
		return err
	}
	open := store.LocalIndex(filepath.Join(m.dir, "index"), false)
	m.repo, err = store.Open(ctx, b, func(ctx context.Context, id [16]byte, check store.IndexCheck) (store.Index, error) {
		x, err := open(ctx, id, check)
		m.index = x
		return x, err
	}, store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte(password), nil }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.repo.Close()) }()
	chunks := int64(m.o.size) / int64(m.repo.ChunkSize())
	at := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	roots := make([]store.Root, m.o.vms)
	said := time.Now()
	for n := range m.o.points {
		vm := n % m.o.vms
		var changed []int64 // chunks; nil for all
		if n >= m.o.vms {
			changed = m.neighbours(chunks)
		}
		if roots[vm], err = m.point(ctx, fmt.Sprintf("vm%03d", vm), at.Add(time.Duration(n/m.o.vms)*time.Hour), roots[vm], chunks, changed); err != nil {
			return err
		}
		if time.Since(said) > 20*time.Second {
			said = time.Now()
			fmt.Fprintf(os.Stderr, "%s  %d points made\n", said.Format("15:04:05"), n+1)
		}
	}
	return m.sealPack(ctx)
}

// neighbours picks chunks that change together: of one leaf of the map.
func (m *maker) neighbours(chunks int64) []int64 {
	list := make([]int64, m.o.changes)
	from := int64(m.rnd.Uint64() % uint64(chunks))
	for i := range list {
		list[i] = min(chunks-1, from+int64(i)*3)
	}
	return list
}

func (m *maker) point(ctx context.Context, vm string, at time.Time, parent store.Root, chunks int64, changed []int64) (store.Root, error) {
	d, err := m.repo.NewDraft(ctx)
	if err != nil {
		return parent, err
	}
	defer d.Close()
	b, err := d.Map(ctx, parent, int64(m.o.size))
	if err != nil {
		return parent, err
	}
	defer b.Close(ctx)
	set := func(i int64) error {
		id, err := m.chunk(ctx)
		if err != nil {
			return err
		}
		return b.Set(ctx, i, id)
	}
	if changed == nil {
		for i := range chunks {
			if err := set(i); err != nil {
				return parent, err
			}
		}
	}
	last := int64(-1)
	for _, i := range changed {
		if i == last {
			continue
		}
		if err := set(i); err != nil {
			return parent, err
		}
		last = i
	}
	root, err := b.Finish(ctx, int64(m.o.size))
	if err != nil {
		return parent, err
	}
	p := &store.Point{VM: store.VM{Name: vm, Source: "scale"}, Time: at, Consistency: "crash", Stats: store.Stats{Total: root.Size},
		Disks: []store.Disk{{Name: "disk0", Key: "disk0", Size: root.Size, Root: root.Page[:]}}}
	return root, d.Commit(ctx, p)
}

// chunk gives a new chunk a place in a pack.
func (m *maker) chunk(ctx context.Context) (id store.ID, err error) {
	for i := 0; i < len(id); i += 8 {
		binary.LittleEndian.PutUint64(id[i:], m.rnd.Uint64())
	}
	off := uint32(80 + len(m.pack)*(56+chunkBody))
	m.pack = append(m.pack, store.PackRecord{ID: id, Off: off, Len: chunkBody, Plain: uint32(m.repo.ChunkSize())})
	if len(m.pack) < perPack {
		return id, nil
	}
	return id, m.sealPack(ctx)
}

// sealPack registers the pack: a file of the right size and no content.
func (m *maker) sealPack(ctx context.Context) error {
	if len(m.pack) == 0 {
		return nil
	}
	var id store.PackID
	for i := 0; i < len(id); i += 8 {
		binary.LittleEndian.PutUint64(id[i:], m.rnd.Uint64())
	}
	size := int64(80 + len(m.pack)*(56+chunkBody+44) + 64)
	name := filepath.Join(m.dir, "packs", id.String())
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(name, size); err != nil {
		return err
	}
	err := m.index.AddPack(ctx, store.PackInfo{ID: id, Size: size}, m.pack)
	m.pack = m.pack[:0]
	return err
}
