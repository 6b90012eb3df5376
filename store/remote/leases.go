package remote

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

const (
	leaseDir    = "leases"
	draftPrefix = "new-"
	leaseMagic  = "HFLEASE1"
	maxLeaseLen = 64<<20 + 64 // a manifest and the rest
)

// fileLeases keeps leases as files below the repository, each locked by its
// process for as long as it lasts (flock(2)): the kernel ends the leases of a process
// that dies. A file without a lock is left over, and whoever meets it removes it.
//
// A file: magic 8 | kind u8 | first pack u32 | length u32 | manifest | CRC-32C u32 of all before.
// It appears under its name, the lease's id, whole and locked.
type fileLeases struct{ dir string }

var _ store.Leases = fileLeases{}

// Leases of the repository in dir.
func Leases(dir string) store.Leases { return fileLeases{filepath.Join(dir, leaseDir)} }

// Take implements store.Leases.
func (l fileLeases) Take(ctx context.Context, lease store.Lease) (func(), error) {
	name := hex.EncodeToString(lease.ID[:])
	path, draft := filepath.Join(l.dir, name), filepath.Join(l.dir, draftPrefix+name)
	for try := 0; ; try++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f, err := l.write(draft, lease)
		if err == nil {
			if err = os.Rename(draft, path); err == nil {
				return func() {
					os.Remove(path)
					f.Close()
				}, nil
			}
			f.Close()
		}
		// Gone before it was locked: somebody cleaned up, or the folder is missing.
		if !errors.Is(err, fs.ErrNotExist) || try >= 100 {
			os.Remove(draft)
			return nil, named(err)
		}
		if err := os.Mkdir(l.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, named(err)
		}
	}
}

// write makes the locked file of a lease under a name that nobody takes for one.
func (l fileLeases) write(draft string, lease store.Lease) (*os.File, error) {
	f, err := os.OpenFile(draft, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		_, err = f.Write(encodeLease(lease))
	} else if errors.Is(err, unix.EWOULDBLOCK) {
		err = fs.ErrNotExist // somebody is just removing it
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Live implements store.Leases.
func (l fileLeases) Live(ctx context.Context) ([]store.Lease, error) {
	entries, err := os.ReadDir(l.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, named(err)
	}
	var live []store.Lease
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var id [16]byte
		if strings.HasPrefix(e.Name(), draftPrefix) {
			l.look(e.Name()) // removes it when its process is gone
			continue
		}
		if b, err := hex.DecodeString(e.Name()); err != nil || copy(id[:], b) != len(id) || len(b) != len(id) {
			continue
		}
		lease, ok, err := l.look(e.Name())
		if err != nil {
			return nil, named(err)
		}
		if ok {
			lease.ID = id
			live = append(live, lease)
		}
	}
	return live, nil
}

// look reads one lease; not ok when it has ended.
func (l fileLeases) look(name string) (lease store.Lease, ok bool, err error) {
	path := filepath.Join(l.dir, name)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return lease, false, nil
	}
	if err != nil {
		return lease, false, err
	}
	defer f.Close()
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
	case err == nil:
		os.Remove(path) // its process is gone; ids are not used again
		return lease, false, nil
	case !errors.Is(err, unix.EWOULDBLOCK):
		return lease, false, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxLeaseLen+1))
	if err != nil {
		return lease, false, err
	}
	if lease, err = decodeLease(b); err != nil {
		return lease, false, fmt.Errorf("%s: %w", path, err)
	}
	return lease, true, nil
}

func encodeLease(l store.Lease) []byte {
	b := append([]byte(leaseMagic), byte(l.Kind))
	b = binary.LittleEndian.AppendUint32(b, l.FirstPack)
	b = wire.AppendBytes(b, l.Manifest)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeLease(b []byte) (store.Lease, error) {
	bad := errors.New("malformed lease")
	n := len(b) - 4
	if n < len(leaseMagic)+9 || !bytes.HasPrefix(b, []byte(leaseMagic)) || crc32.Checksum(b[:n], castagnoli) != binary.LittleEndian.Uint32(b[n:]) {
		return store.Lease{}, bad
	}
	in := newCursor(b[len(leaseMagic):n])
	l := store.Lease{Kind: store.LeaseKind(in.Take(1)[0]), FirstPack: in.U32(), Manifest: bytes.Clone(in.Bytes())}
	return l, in.End()
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// named adds the sentinel that an error of the file system stands for.
func named(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w", bucket.ErrFull, err)
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w", bucket.ErrReadOnly, err)
	}
	return err
}
