package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/remote"
)

// place is a repository and how its password is had.
type place struct {
	dir      string
	password func(context.Context) ([]byte, error)
	index    store.IndexOpener // nil: shared with other processes
}

// here is the repository of the call.
func (c *call) here() place { return place{dir: c.repo, password: c.password} }

// open opens a repository. The caller closes it.
func (c *call) open(ctx context.Context, p place) (*store.Repo, error) {
	b, err := openBucket(p.dir)
	if err != nil {
		return nil, err
	}
	rebuilt := func(packs int) {
		c.progress.note("the index was lost or damaged, or cannot be kept here: it was made anew out of %d packs", packs)
	}
	if p.index == nil {
		p.index = remote.Index(p.dir)
	} else {
		rebuilt = nil // asked for
	}
	var t *task // shown when there is much to be read
	last := int64(0)
	r, err := store.Open(ctx, b, p.index, store.OpenOptions{
		Passphrase: func() ([]byte, error) { return p.password(ctx) },
		Leases:     remote.Leases(p.dir),
		Rebuilt:    rebuilt,
		Warn:       func(text string) { c.progress.warn("%s", text) },
		Indexing: func(done, total int64) {
			if t == nil && total < indexingShown {
				return
			}
			if t == nil {
				t = c.progress.task("index", "", total)
			}
			t.add(done - last)
			if last = done; done == total {
				t.end(nil)
				t, last = nil, 0
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p.dir, err)
	}
	if n, err := b.CleanTemp(); n > 0 {
		c.progress.detail("removed %d unfinished objects of a run that was killed", n)
	} else if err != nil {
		c.progress.detail("unfinished objects stay: %v", err)
	}
	return r, nil
}

// indexingShown is from how many bytes of packs on their being read into the index
// is shown: what takes more than a second or so.
const indexingShown = 16 << 30

// openBucket opens the directory of a repository; one that is missing or no
// directory is no repository.
func openBucket(dir string) (*bucket.Local, error) {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), err == nil && !st.IsDir():
		return nil, fmt.Errorf("%s: %w", dir, store.ErrNoRepository)
	case err != nil:
		return nil, err
	}
	return bucket.OpenLocal(dir)
}

// withRepo opens the repository of the call, runs fn and closes it.
func (c *call) withRepo(ctx context.Context, fn func(*store.Repo) error) error {
	return c.withRepoIn(ctx, c.here(), fn)
}

// withRepoIn does so with any repository.
func (c *call) withRepoIn(ctx context.Context, p place, fn func(*store.Repo) error) (err error) {
	r, err := c.open(ctx, p)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := r.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("close %s: %w", p.dir, cerr)
		}
	}()
	return fn(r)
}

// leftovers are the names that an interrupted init may leave in its directory;
// whether a config.copy is all that there is of a repository, store.Init looks.
var leftovers = map[string]bool{"tmp": true, "config.copy": true}

func runInit(ctx context.Context, c *call) error {
	dir := c.args[0]
	if isAway(dir) {
		return onlyAdds("init", dir)
	}
	size, err := chunkSize(c.String("chunk-size"))
	if err != nil {
		return err
	}
	if err := fitForRepository(dir); err != nil {
		return err
	}
	opt := store.InitOptions{ChunkSize: size, NoEncryption: c.Bool("no-encryption")}
	if !opt.NoEncryption {
		if opt.Passphrase, err = c.newPassword(ctx); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b, err := bucket.OpenLocal(dir)
	if err != nil {
		return err
	}
	if _, err := b.CleanTemp(); err != nil {
		return err
	}
	if err := store.Init(ctx, b, opt, time.Now()); err != nil {
		return fmt.Errorf("init %s: %w", dir, err)
	}
	c.out.line("repository %s made: chunks of %s, %s", dir, sizeText(int64(size)), encryptionText(!opt.NoEncryption))
	if !opt.NoEncryption {
		c.progress.note("without its password nobody can read this repository: keep it in a second place, or print a 'holdfast key recovery'")
	}
	return c.out.object(struct {
		Type      string `json:"type"`
		Path      string `json:"path"`
		ChunkSize int    `json:"chunk_size"`
		Encrypted bool   `json:"encrypted"`
	}{"init", dir, size, !opt.NoEncryption})
}

func encryptionText(on bool) string {
	if on {
		return "encrypted"
	}
	return "NOT encrypted"
}

// fitForRepository refuses directories that hold something else. What an init
// that was killed left is nothing.
func fitForRepository(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return fmt.Errorf("%s %w and is no directory", dir, store.ErrExists)
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch {
		case e.Name() == "config":
			return withHint(fmt.Errorf("a repository %w in %s", store.ErrExists, dir), "use it with -r %s", dir)
		case !leftovers[e.Name()]:
			return withHint(fmt.Errorf("%s is not empty: %q %w", dir, e.Name(), store.ErrExists), "name a directory that is empty or not there yet")
		}
	}
	return nil
}
