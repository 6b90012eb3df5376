package backup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Journal is a directory that says what runs have made on hosts and must remove again: an entry is written before the thing is made, and goes
// when the thing is gone. What a run leaves that was killed is found there by the next one.
type Journal struct{ dir string }

// Leftover is one thing on a host that is not meant to stay.
type Leftover struct {
	Source string    `json:"source"` // name of the source in the config
	Host   string    `json:"host"`   // that it is on
	VM     string    `json:"vm"`     // as the source identifies it
	Name   string    `json:"name"`   // that tells it from what others made
	Began  time.Time `json:"began"`
}

// JournalEntry is an entry that this process holds.
type JournalEntry struct {
	file *os.File // locked
	Leftover
}

// OpenJournal opens a journal, whose directory is made when it is not there.
func OpenJournal(dir string) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Journal{dir}, nil
}

// entryEnding is how names of entries end; files that are not whole yet end otherwise.
const entryEnding = ".json"

// Begin writes an entry. It is durable when Begin returns; only then the thing may be made.
func (j *Journal) Begin(l Leftover) (*JournalEntry, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	text, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	name := filepath.Join(j.dir, hex.EncodeToString(id[:]))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	e := &JournalEntry{f, l}
	// Locked before it has its name: nobody ever sees it without.
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		if _, err = f.Write(append(text, '\n')); err == nil {
			err = errors.Join(f.Sync(), os.Rename(name, name+entryEnding), syncDir(j.dir))
		}
	}
	if err != nil {
		f.Close()
		os.Remove(name)
		return nil, fmt.Errorf("journal: %w", err)
	}
	return e, nil
}

// Clear removes the entry: the thing is gone, or was never made.
func (e *JournalEntry) Clear() error {
	if e.file == nil {
		return nil
	}
	name := strings.TrimSuffix(e.file.Name(), entryEnding) + entryEnding // it was opened without
	err := os.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	e.release()
	return err
}

// Leave ends this process's hold of the entry, which stays: the thing may still be there.
func (e *JournalEntry) Leave() { e.release() }

func (e *JournalEntry) release() {
	if e.file != nil {
		e.file.Close()
		e.file = nil
	}
}

// Left gives the entries that match wants and no process holds any more, and holds them. The caller ends each by Clear or Leave. Others are never
// held, not for a moment: whoever they are of would take them for those of a run under way.
func (j *Journal) Left(ctx context.Context, match func(Leftover) bool) ([]*JournalEntry, error) {
	list, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var left []*JournalEntry
	for _, d := range list {
		if !strings.HasSuffix(d.Name(), entryEnding) {
			continue
		}
		e, err := j.take(filepath.Join(j.dir, d.Name()), match)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			for _, e := range left {
				e.Leave()
			}
			return nil, fmt.Errorf("journal: %w", err)
		}
		if e != nil {
			left = append(left, e)
		}
	}
	return left, nil
}

// take opens an entry that matches and nobody holds; nil when somebody does, or when it is gone.
func (j *Journal) take(name string, match func(Leftover) bool) (*JournalEntry, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	e := &JournalEntry{file: f}
	if err := json.NewDecoder(f).Decode(&e.Leftover); err != nil { // it was written before it had its name
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if !match(e.Leftover) {
		f.Close()
		return nil, nil
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, err
	}
	// Whoever held it may have cleared it since it was opened.
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		f.Close()
		return nil, nil
	}
	return e, nil
}
