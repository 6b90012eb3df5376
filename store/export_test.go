package store

import (
	"context"
	"os"
)

// SetPackSize makes r seal packs after n bytes, so that tests with small disks
// fill many of them. Call it before anything is written.
func (r *Repo) SetPackSize(n uint32) { r.packer.target = n }

// SetMergePacks makes gc of r merge n small packs.
func (r *Repo) SetMergePacks(n int) { r.mergePacks = n }

// CheapKeys makes Init choose the least parameters of Argon2id, for tests that
// open a repository a thousand times, and gives back what undoes it.
func CheapKeys() (undo func()) {
	old := defaultKDF
	defaultKDF = kdfParams{Time: 1, MemoryKiB: 8, Threads: 1}
	return func() { defaultKDF = old }
}

// StoppableIndex is LocalIndex with every commit to Badger carried out by onCommit.
func StoppableIndex(dir string, onCommit func(commit func() error) error) IndexOpener {
	return func(ctx context.Context, repo [16]byte, check IndexCheck) (Index, error) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		x, err := openBadger(dir, repo, false)
		if err != nil {
			return nil, err
		}
		x.onCommit = onCommit
		return checked(ctx, x, check)
	}
}
