package lease_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/extent"
	"github.com/holdfast-backup/holdfast/vsphere/lease"
)

// disk is a lease's disk as a backup sees it.
type disk struct{ *lease.Disk }

var _ backup.Disk = disk{}

func (disk) Key() string             { return "disk-1" }
func (disk) ChangeID() string        { return "" }
func (disk) Verify() (string, error) { return "", nil }
func (d disk) Extents(ctx context.Context, _ string) iter.Seq2[extent.Extent, error] {
	return d.Disk.Extents(ctx)
}

// snapshot is a frozen VM with one such disk.
type snapshot struct {
	disk
	at time.Time
}

func (s *snapshot) VM() backup.VM       { return backup.VM{Name: "web01", Source: "test"} }
func (s *snapshot) Time() time.Time     { return s.at }
func (s *snapshot) Consistency() string { return "crash" }
func (s *snapshot) Disks() []backup.Disk {
	return []backup.Disk{s.disk}
}
func (s *snapshot) Config(context.Context) ([]backup.ConfigFile, error) { return nil, nil }

func newRepo(t *testing.T, chunk int) *store.Repo {
	t.Helper()
	b := bucket.NewMemory()
	opt := store.InitOptions{ChunkSize: chunk, Passphrase: []byte("secret")}
	if err := store.Init(t.Context(), b, opt, time.Now()); err != nil {
		t.Fatal(err)
	}
	r, err := store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{
		Passphrase: func() ([]byte, error) { return []byte("secret"), nil },
		Warn:       func(s string) { t.Log(s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// stream makes a raw file and what qemu-img makes of it.
func stream(t *testing.T, name string, raw []byte) (path string) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: not running qemu-img")
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skipf("the oracle is missing (Debian package qemu-utils): %v", err)
	}
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path+".raw", raw, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", path+".raw", path+".vmdk").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path + ".vmdk"
}

// flaky ends connections to a file of n bytes at random places, three of them.
func flaky(path string, n int64, resumes bool) func(context.Context, int64) (io.ReadCloser, error) {
	var opened atomic.Int64
	return func(_ context.Context, skip int64) (io.ReadCloser, error) {
		if skip > 0 && !resumes {
			return nil, lease.ErrNoResume
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		if _, err := f.Seek(skip, io.SeekStart); err != nil {
			return nil, err
		}
		if opened.Add(1) > 3 {
			return f, nil
		}
		return struct {
			io.Reader
			io.Closer
		}{io.LimitReader(f, rand.Int64N(n)), f}, nil
	}
}

// A backup of what qemu-img wrote, through the real pipeline, with a window far smaller than the disk and connections that
// are lost; the second point of it is made of the same chunks.
func TestBackup(t *testing.T) {
	for _, chunk := range []int{64 << 10, 1 << 20, 4 << 20} {
		for _, full := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d KiB, full %v", chunk>>10, full), func(t *testing.T) {
				raw := make([]byte, 90<<20+512)
				noise := rand.NewChaCha8([32]byte{1})
				if noise.Read(raw); !full {
					for i := 0; i < len(raw); i += 1 << 20 {
						if i>>20%5 != 1 {
							clear(raw[i:min(len(raw), i+1<<20-7)])
						}
					}
				}
				path := stream(t, "disk", raw)
				st, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				repo := newRepo(t, chunk)
				for i := range 2 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					d := lease.New(lease.Options{Name: "web01 disk0", Size: int64(len(raw)), Open: flaky(path, st.Size(), i == 0), Window: 1, Backoff: time.Millisecond})
					defer d.Close()
					p, err := backup.Run(ctx, repo, &snapshot{disk{d}, time.Now().Add(time.Duration(i) * time.Second)}, backup.Options{})
					if err != nil {
						t.Fatal(err)
					}
					img, err := repo.OpenDisk(p, "disk0")
					if err != nil {
						t.Fatal(err)
					}
					got := make([]byte, len(raw))
					if _, err := img.ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, raw) {
						t.Fatalf("another disk: %v", err)
					}
					if i == 1 && p.Stats.New != 0 {
						t.Errorf("%d new bytes the second time", p.Stats.New)
					}
					if !full && p.Stats.Read > int64(len(raw))/2+int64(20*chunk) && chunk < 1<<20 {
						t.Errorf("%d bytes of %d read", p.Stats.Read, len(raw))
					}
				}
			})
		}
	}
}

// A stream that was cut off makes no point.
func TestBackupOfHalfADisk(t *testing.T) {
	raw := make([]byte, 20<<20)
	rand.NewChaCha8([32]byte{2}).Read(raw)
	path := stream(t, "disk", raw)
	if err := os.Truncate(path, 15<<20); err != nil {
		t.Fatal(err)
	}
	repo := newRepo(t, 64<<10)
	d := lease.New(lease.Options{Size: int64(len(raw)), Open: flaky(path, 15<<20, true), Backoff: time.Millisecond})
	defer d.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := backup.Run(ctx, repo, &snapshot{disk{d}, time.Now()}, backup.Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
	if points, err := repo.Points(ctx); err != nil || len(points) != 0 {
		t.Errorf("%d points, %v", len(points), err)
	}
}
