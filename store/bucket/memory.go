package bucket

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"strings"
	"sync"
)

// Memory is a Bucket for tests. It models a power cut: see Crash.
type Memory struct {
	mu sync.Mutex
	// guards following
	objects map[string][]byte // name => content, never changed once here
	locks   map[string]bool   // name => held
}

var _ Bucket = (*Memory)(nil)

// NewMemory returns an empty bucket.
func NewMemory() *Memory { return &Memory{objects: map[string][]byte{}} }

// Crash returns what a new process finds after a power cut at this moment: a
// bucket with the committed objects and nothing else. The original stays as it
// is, and neither sees what the other does later.
func (m *Memory) Crash() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &Memory{objects: maps.Clone(m.objects)}
}

// Create implements Bucket.
func (m *Memory) Create(ctx context.Context, name string) (Writer, error) {
	if err := checkCall(ctx, name); err != nil {
		return nil, err
	}
	return &memoryWriter{bucket: m, name: name}, nil
}

// Open implements Bucket.
func (m *Memory) Open(ctx context.Context, name string) (Object, error) {
	if err := checkCall(ctx, name); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.objects[name]
	if !ok {
		return nil, fmt.Errorf("bucket: open %s: %w", name, ErrNotExist)
	}
	return &memoryObject{Reader: bytes.NewReader(b)}, nil
}

// List implements Bucket. It shows the objects of the moment it starts.
func (m *Memory) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		for _, info := range m.infos(prefix) {
			if err := ctx.Err(); err != nil {
				yield(Info{}, err)
				return
			}
			if !yield(info, nil) {
				return
			}
		}
		if err := ctx.Err(); err != nil {
			yield(Info{}, err)
		}
	}
}

func (m *Memory) infos(prefix string) []Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	var infos []Info
	for name, b := range m.objects {
		if strings.HasPrefix(name, prefix) {
			infos = append(infos, Info{Name: name, Size: int64(len(b))})
		}
	}
	return infos
}

// Remove implements Bucket.
func (m *Memory) Remove(ctx context.Context, name string) error {
	if err := checkCall(ctx, name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.objects[name]; !ok {
		return fmt.Errorf("bucket: remove %s: %w", name, ErrNotExist)
	}
	delete(m.objects, name)
	return nil
}

type memoryWriter struct {
	bucket *Memory
	name   string

	mu sync.Mutex
	// guards following
	b    []byte
	done bool // committed or aborted
}

func (w *memoryWriter) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("bucket: write %s: %w: negative offset", w.name, fs.ErrInvalid)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return 0, fmt.Errorf("bucket: write %s: %w", w.name, fs.ErrClosed)
	}
	if grow := off + int64(len(p)) - int64(len(w.b)); grow > 0 && len(p) > 0 {
		w.b = append(w.b, make([]byte, grow)...)
	}
	if len(p) == 0 {
		return 0, nil
	}
	return copy(w.b[off:], p), nil
}

func (w *memoryWriter) Commit() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return fmt.Errorf("bucket: commit %s: %w", w.name, fs.ErrClosed)
	}
	w.done = true
	w.bucket.mu.Lock()
	defer w.bucket.mu.Unlock()
	w.bucket.objects[w.name] = w.b
	return nil
}

func (w *memoryWriter) Abort() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	return nil
}

// memoryObject is an open object; ReadAt comes from bytes.Reader.
type memoryObject struct {
	*bytes.Reader
}

func (o *memoryObject) Close() error { return nil }
