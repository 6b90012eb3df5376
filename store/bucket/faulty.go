package bucket

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
)

// Errors that only Faulty returns.
var (
	// ErrInjected is the error of a Fault that names none.
	ErrInjected = errors.New("injected fault")
	// ErrGone: the process that used the bucket is lost.
	ErrGone = errors.New("process gone")
)

// Op is a kind of call that Faulty counts.
type Op string

// The calls that are counted. Abort, Close and Size are not.
const (
	OpCreate  Op = "create"
	OpWriteAt Op = "write"
	OpCommit  Op = "commit"
	OpOpen    Op = "open"
	OpReadAt  Op = "read"
	OpList    Op = "list"
	OpRemove  Op = "remove"
)

// Call is one call, before it reaches the inner bucket.
type Call struct {
	N    int64 // 1 for the first call of all
	Op   Op
	Name string // of the object; the prefix for OpList
}

// Kind is what a Fault does.
type Kind int

// What can go wrong. Where a kind does not fit the call, it acts as Fail.
const (
	// None: the call goes through.
	None Kind = iota
	// Fail: the call does nothing and returns an error.
	Fail
	// Short: OpWriteAt and OpReadAt do the first half, OpList yields its first
	// object; then the error.
	Short
	// Gone: this call and all later ones do nothing and return ErrGone, and
	// open drafts stay behind as in a crash. Gone at call N leaves the bucket
	// as a process does that dies right after call N-1.
	Gone
	// LostAck: OpCommit and OpRemove take effect, and return an error.
	LostAck
	// FlipBit: OpReadAt returns one wrong bit and no error.
	FlipBit
)

// Fault is what happens at one call. The zero Fault is None.
type Fault struct {
	Kind Kind
	Err  error // what to return; nil for ErrInjected
	Bit  int64 // FlipBit: which bit of those read, modulo their number
}

// Plan decides each call's fault. It is called in the order of Call.N, never
// concurrently, and must not call the bucket.
type Plan func(Call) Fault

// At is the plan with one fault, at call n.
func At(n int64, f Fault) Plan {
	return func(c Call) Fault {
		if c.N == n {
			return f
		}
		return Fault{}
	}
}

// Faulty passes calls to another Bucket, counts them, and makes those fail that
// its plan picks. To stop a run at every call:
//
//	for n := int64(1); ; n++ {
//		m := bucket.NewMemory()
//		f := bucket.NewFaulty(m, bucket.At(n, bucket.Fault{Kind: bucket.Gone}))
//		run(f)
//		check(m.Crash())
//		if f.Calls() < n {
//			break // the run came to its end
//		}
//	}
type Faulty struct {
	inner Bucket
	plan  Plan

	mu sync.Mutex
	// guards following
	calls  int64
	gone   bool
	drafts map[*faultyWriter]bool // those neither committed nor aborted
}

var _ Bucket = (*Faulty)(nil)

// NewFaulty wraps inner. A nil plan has no faults.
func NewFaulty(inner Bucket, plan Plan) *Faulty {
	if plan == nil {
		plan = func(Call) Fault { return Fault{} }
	}
	return &Faulty{inner: inner, plan: plan, drafts: map[*faultyWriter]bool{}}
}

// Calls is the number of counted calls so far, those after Gone included.
func (b *Faulty) Calls() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls
}

// next counts a call. A non-nil error means: return it, do nothing.
func (b *Faulty) next(op Op, name string) (Fault, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls++
	if b.gone {
		return Fault{}, b.err(op, name, ErrGone)
	}
	f := b.plan(Call{N: b.calls, Op: op, Name: name})
	if f.Err == nil {
		f.Err = ErrInjected
	}
	switch {
	case f.Kind == Gone:
		b.die()
		return f, b.err(op, name, ErrGone)
	case !fits(f.Kind, op):
		return f, b.err(op, name, f.Err)
	}
	f.Err = b.err(op, name, f.Err)
	return f, nil
}

// fits reports whether the call itself must act on a fault of that kind.
func fits(k Kind, op Op) bool {
	switch k {
	case None:
		return true
	case Short:
		return op == OpWriteAt || op == OpReadAt || op == OpList
	case LostAck:
		return op == OpCommit || op == OpRemove
	case FlipBit:
		return op == OpReadAt
	}
	return false
}

// die drops every draft as the end of the process would. b.mu is held.
func (b *Faulty) die() {
	b.gone = true
	for w := range b.drafts {
		if d, ok := w.inner.(interface{ drop() }); ok {
			d.drop()
		}
	}
	clear(b.drafts)
}

func (b *Faulty) err(op Op, name string, err error) error {
	return fmt.Errorf("bucket: %s %s: %w", op, name, err)
}

// Create implements Bucket.
func (b *Faulty) Create(ctx context.Context, name string) (Writer, error) {
	if _, err := b.next(OpCreate, name); err != nil {
		return nil, err
	}
	inner, err := b.inner.Create(ctx, name)
	if err != nil {
		return nil, err
	}
	w := &faultyWriter{bucket: b, name: name, inner: inner}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drafts[w] = true
	if b.gone { // a concurrent call met its end meanwhile
		b.die()
	}
	return w, nil
}

// Open implements Bucket.
func (b *Faulty) Open(ctx context.Context, name string) (Object, error) {
	if _, err := b.next(OpOpen, name); err != nil {
		return nil, err
	}
	inner, err := b.inner.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	return &faultyObject{Object: inner, bucket: b, name: name}, nil
}

// List implements Bucket. The call counts when the iteration starts.
func (b *Faulty) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		f, err := b.next(OpList, prefix)
		if err != nil {
			yield(Info{}, err)
			return
		}
		for info, err := range b.inner.List(ctx, prefix) {
			if !yield(info, err) {
				return
			}
			if f.Kind == Short {
				break
			}
		}
		if f.Kind == Short {
			yield(Info{}, f.Err)
		}
	}
}

// Remove implements Bucket.
func (b *Faulty) Remove(ctx context.Context, name string) error {
	f, err := b.next(OpRemove, name)
	if err != nil {
		return err
	}
	if err := b.inner.Remove(ctx, name); err != nil {
		return err
	}
	if f.Kind == LostAck {
		return f.Err
	}
	return nil
}

type faultyWriter struct {
	bucket *Faulty
	name   string
	inner  Writer
}

func (w *faultyWriter) WriteAt(p []byte, off int64) (int, error) {
	f, err := w.bucket.next(OpWriteAt, w.name)
	if err != nil {
		return 0, err
	}
	if f.Kind != Short {
		return w.inner.WriteAt(p, off)
	}
	n, err := w.inner.WriteAt(p[:len(p)/2], off)
	if err != nil {
		return n, err
	}
	return n, f.Err
}

// Commit commits. After a Fail the draft is dropped, as after any failed commit.
func (w *faultyWriter) Commit() error {
	f, err := w.bucket.next(OpCommit, w.name)
	if errors.Is(err, ErrGone) {
		return err
	}
	w.forget()
	if err != nil {
		return errors.Join(err, w.inner.Abort())
	}
	if err := w.inner.Commit(); err != nil {
		return err
	}
	if f.Kind == LostAck {
		return f.Err
	}
	return nil
}

// Abort aborts. A process that is gone cleans nothing up.
func (w *faultyWriter) Abort() error {
	w.bucket.mu.Lock()
	gone := w.bucket.gone
	w.bucket.mu.Unlock()
	if gone {
		return w.bucket.err("abort", w.name, ErrGone)
	}
	w.forget()
	return w.inner.Abort()
}

func (w *faultyWriter) forget() {
	w.bucket.mu.Lock()
	defer w.bucket.mu.Unlock()
	delete(w.bucket.drafts, w)
}

type faultyObject struct {
	Object
	bucket *Faulty
	name   string
}

func (o *faultyObject) ReadAt(p []byte, off int64) (int, error) {
	f, err := o.bucket.next(OpReadAt, o.name)
	if err != nil {
		return 0, err
	}
	if f.Kind == Short {
		n, err := o.Object.ReadAt(p[:len(p)/2], off)
		if err != nil {
			return n, err
		}
		return n, f.Err
	}
	n, err := o.Object.ReadAt(p, off)
	if f.Kind == FlipBit && n > 0 {
		bit := f.Bit % (int64(n) * 8)
		p[bit/8] ^= 1 << (bit % 8)
	}
	return n, err
}
