package bucket

import (
	"context"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var _ Locker = (*Local)(nil)

// Lock implements Locker by flock(2) on a file of that name, which stays. The kernel
// ends it with the process.
func (l *Local) Lock(ctx context.Context, name string) (unlock func(), err error) {
	if err := checkCall(ctx, name); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(l.file(name), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, writeError("lock", name, err)
	}
	err = poll(ctx, func() (bool, error) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		f.Close()
		return nil, writeError("lock", name, err)
	}
	return sync.OnceFunc(func() { f.Close() }), nil
}
