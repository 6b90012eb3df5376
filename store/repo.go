package store

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

// InitOptions describe a new repository.
type InitOptions struct {
	ChunkSize    int    // bytes; 0 is DefaultChunkSize
	NoEncryption bool   //
	Passphrase   []byte // not needed without encryption
}

// Init makes a repository in an empty bucket. Its config appears last, in one
// step: an interrupted Init leaves nothing that a second one trips over.
// ErrExists when the bucket holds a repository already.
func Init(ctx context.Context, b bucket.Bucket, opt InitOptions, now time.Time) error {
	if opt.ChunkSize == 0 {
		opt.ChunkSize = DefaultChunkSize
	}
	if !ValidChunkSize(opt.ChunkSize) {
		return fmt.Errorf("store: chunk size %d is not a power of two from %d to %d", opt.ChunkSize, MinChunkSize, MaxChunkSize)
	}
	if !opt.NoEncryption && len(opt.Passphrase) == 0 {
		return errors.New("store: an empty passphrase protects nothing")
	}
	st, err := loadConfig(ctx, b)
	interrupted := false
	if err == nil {
		if interrupted, err = onlyCopy(ctx, b, st); err != nil {
			return err
		}
	}
	switch {
	case interrupted, errors.Is(err, ErrNoRepository):
	case err == nil, errors.Is(err, ErrDamaged), errors.Is(err, ErrNewerFormat):
		return fmt.Errorf("store: a repository %w here", ErrExists)
	default:
		return err
	}
	cfg, _, err := newConfig(opt, now)
	if err != nil {
		return err
	}
	raw, err := cfg.encode()
	if err != nil {
		return err
	}
	for _, name := range []string{configCopyName, configName} {
		if err := writeObject(ctx, b, name, raw); err != nil {
			return fmt.Errorf("store: write %s: %w", name, err)
		}
	}
	return nil
}

// onlyCopy reports whether the copy of the config is all that there is, which is
// what an interrupted Init leaves.
func onlyCopy(ctx context.Context, b bucket.Bucket, st configState) (bool, error) {
	if !slices.Contains(st.damaged, configName) {
		return false, nil
	}
	for info, err := range b.List(ctx, "") {
		if err != nil {
			return false, fmt.Errorf("store: %w", err)
		}
		if info.Name != configCopyName {
			return false, nil
		}
	}
	return true, nil
}

// IndexOpener gives the index of the repository with that id. Whoever becomes
// the owner of an index calls check with it before anyone uses it.
type IndexOpener func(ctx context.Context, repo [16]byte, check IndexCheck) (Index, error)

// IndexCheck brings an index up to date with the packs and manifests. clean says
// that its last owner closed it lacking nothing: then only the points are compared,
// which costs one listing.
type IndexCheck func(ctx context.Context, x Index, clean bool) error

// OpenOptions bound the memory of an open repository.
type OpenOptions struct {
	// Passphrase is asked for when the repository is encrypted.
	Passphrase func() ([]byte, error)
	// ChunkCache is the bytes of decoded chunks kept for readers; 0 is 64 MiB.
	ChunkCache int64
	// PageCache is the bytes of decoded chunk-map pages kept; 0 is 32 MiB.
	PageCache int64
	// Leases are shared with the other processes that use the repository; nil when
	// there are none.
	Leases Leases
	// Indexing is told of the packs, in bytes, whose tables are read because the
	// index lacks them. Never called by two goroutines at once; may be nil.
	Indexing func(done, total int64)
	// Rebuilt is told of the number of packs when the index knew none of them: it was
	// lost or damaged, or cannot be kept, and was made anew. May be nil.
	Rebuilt func(packs int)
	// Warn is told what the user should know; nil drops it.
	Warn func(string)
}

// Repo is an open repository. Safe for concurrent use.
type Repo struct {
	bucket   bucket.Bucket
	cfg      *config
	cfgState configState
	keys     *keys
	ring     keyring
	id       [16]byte
	index    Index
	leases   Leases
	indexBox box
	warn     func(string)
	indexing func(done, total int64)
	rebuilt  func(packs int)

	packer     *packer
	mergePacks int // small packs that gc merges; a constant but for tests
	packs      packCache
	chunks     *chunkCache
	wholes     sync.Pool // *[]byte of a chunk
	leaves     *pageCache
	pageID     func(plain []byte) ID

	prepareMu sync.Mutex // guards following, and cfgState once the Repo is open
	prepared  bool       // index compared with the bucket for writing

	verifyMu sync.Mutex // held while verify/state is changed

	pointsMu sync.Mutex         // guards following
	points   *listing           // nil before the first use
	pointVM  map[PointID]string // point => its VM, for the points of the listing

	closed atomic.Bool
}

// Open opens the repository in b. The index opens while the passphrase is
// being stretched. ErrNoRepository, ErrPassphrase, ErrDamaged and ErrNewerFormat
// are told apart.
func Open(ctx context.Context, b bucket.Bucket, open IndexOpener, opt OpenOptions) (*Repo, error) {
	st, err := loadConfig(ctx, b)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	r := &Repo{bucket: b, cfg: st.cfg, cfgState: st, id: [16]byte(st.cfg.ID), warn: opt.Warn}
	if r.warn == nil {
		r.warn = func(string) {}
	}
	if r.indexing = opt.Indexing; r.indexing == nil {
		r.indexing = func(int64, int64) {}
	}
	var once sync.Once
	r.rebuilt = func(packs int) {
		if opt.Rebuilt != nil {
			once.Do(func() { opt.Rebuilt(packs) })
		}
	}
	for _, name := range st.damaged {
		r.warn(st.what(name))
	}
	var passphrase []byte
	if st.cfg.Cipher != cipherNone {
		if opt.Passphrase == nil {
			return nil, fmt.Errorf("store: %w: none given", ErrPassphrase)
		}
		if passphrase, err = opt.Passphrase(); err != nil {
			return nil, err
		}
	}
	if r.leases = opt.Leases; r.leases == nil {
		r.leases = &MemoryLeases{}
	}
	r.packer, r.mergePacks = newPacker(r), mergePacks
	r.packs.open = r.openPack
	r.wholes.New = func() any { b := make([]byte, r.cfg.ChunkSize); return &b }
	r.chunks = newChunkCache(cmp.Or(opt.ChunkCache, 64<<20))
	r.leaves = newPageCache(cmp.Or(opt.PageCache, 32<<20))

	unlocked := make(chan struct{})
	var unlockErr error
	go func() {
		defer close(unlocked)
		if r.keys, unlockErr = st.cfg.unlock(passphrase); unlockErr == nil {
			r.indexBox = r.keys.box(ctxIndex, nil)
			r.pageID = r.hashPage
		}
	}()
	index, err := open(ctx, r.id, func(ctx context.Context, x Index, clean bool) error {
		if <-unlocked; unlockErr != nil {
			return unlockErr
		}
		return r.reconcile(ctx, x, clean)
	})
	<-unlocked
	if unlockErr != nil {
		if err == nil {
			index.Close()
		}
		return nil, fmt.Errorf("store: %w", unlockErr)
	}
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	r.index = index
	return r, nil
}

// NeedsPassphrase reports whether opening the repository in b takes a passphrase.
func NeedsPassphrase(ctx context.Context, b bucket.Bucket) (bool, error) {
	st, err := loadConfig(ctx, b)
	if err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	return st.cfg.Cipher != cipherNone, nil
}

// Close ends the use of the repository: what was being written is sealed for a
// later run to find, and the index is released. Calling it twice is harmless.
func (r *Repo) Close() error {
	if r.closed.Swap(true) {
		return nil
	}
	err := r.packer.flush()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	r.packs.close()
	return errors.Join(err, r.index.Close())
}

// ChunkSize is the size of a chunk in bytes.
func (r *Repo) ChunkSize() int { return r.cfg.ChunkSize }

// ID is the repository's id, hexadecimal.
func (r *Repo) ID() string { return hex.EncodeToString(r.id[:]) }

// Encrypted reports whether bodies are encrypted.
func (r *Repo) Encrypted() bool { return r.keys.sealed }

// Created is when the repository was made.
func (r *Repo) Created() time.Time { return r.cfg.Created }

// overhead is what encryption adds to a record, bytes.
func (r *Repo) overhead() int {
	if r.keys.sealed {
		return tagLen
	}
	return 0
}

func (r *Repo) hashPage(plain []byte) (id ID) {
	h, err := blake3.NewKeyed(r.keys.pageID[:])
	if err != nil {
		panic(err) // key length is a constant
	}
	h.Write(plain)
	h.Sum(id[:0])
	return id
}

// reserveLen is the room, bytes, that is kept for what gives back space: enough for the
// gc/state of 15,000 condemned packs (1 TiB), a lease and a directory block.
const reserveLen = 1 << 20

// makeRoom begins what gives back space: it needs an index that can be written,
// but no room for it on the medium.
func (r *Repo) makeRoom(ctx context.Context) error {
	if b, ok := r.bucket.(roomKeeper); ok {
		if free, err := b.Free(); err == nil && free < reserveLen/4 {
			_ = b.Unreserve() // what it is for will say what is wrong
		}
	}
	w, ok := r.index.(IndexWriter)
	if !ok {
		return nil
	}
	if err := w.Write(ctx); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

type roomKeeper interface {
	bucket.Spacer
	bucket.Reserver
}

// keepRoom sets room aside while there is some.
func (r *Repo) keepRoom() {
	b, ok := r.bucket.(roomKeeper)
	if !ok {
		return
	}
	if free, err := b.Free(); err == nil && free >= 4*reserveLen {
		_ = b.Reserve(reserveLen) // a precaution: there may be none
	}
}

// prepareWrite compares the index with what the bucket really holds and mends a
// lost copy of the config, once: a run must not rely on chunks whose pack is gone.
func (r *Repo) prepareWrite(ctx context.Context) error {
	r.prepareMu.Lock()
	defer r.prepareMu.Unlock()
	if r.prepared {
		return nil
	}
	if len(r.cfgState.damaged) > 0 {
		if err := r.mendConfig(ctx); err != nil {
			return err
		}
	}
	r.cfgState.damaged = nil
	if err := r.reconcile(ctx, r.index, false); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	r.keepRoom()
	r.prepared = true
	return nil
}

// summaryOf reads the summary of a point from its manifest. A damaged manifest is
// no error: Damaged says what is wrong with it.
func (r *Repo) summaryOf(ctx context.Context, id PointID) (Summary, error) {
	p, err := r.readPoint(ctx, id)
	if errors.Is(err, ErrDamaged) {
		return Summary{ID: id, Damaged: err.Error()}, nil
	}
	if err != nil {
		return Summary{}, err
	}
	return p.summary(), nil
}

func (r *Repo) putSummary(ctx context.Context, s *Summary) error {
	return r.putSummaryIn(ctx, r.index, s)
}

func (r *Repo) putSummaryIn(ctx context.Context, x Index, s *Summary) error {
	sealed, err := r.sealSummary(s)
	if err != nil {
		return err
	}
	if err := x.PutPoint(ctx, SealedPoint{ID: s.ID, Summary: sealed}); err != nil {
		return err
	}
	// Who forgets a point takes the manifest away, then the summary: it must not
	// come back because it was read before.
	o, err := r.bucket.Open(ctx, pointObject(s.ID))
	if errors.Is(err, ErrNotExist) {
		return x.DropPoint(ctx, s.ID)
	}
	if err == nil {
		o.Close()
	}
	return nil
}

// Generation grows whenever a point comes or goes.
func (r *Repo) Generation(ctx context.Context) (uint64, error) { return r.index.Generation(ctx) }

// Points lists all points, by VM, then from old to new. The slice is shared: do
// not change it.
func (r *Repo) Points(ctx context.Context) ([]Summary, error) {
	l, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	return l.all(), nil
}

// PointsOf lists the points of one VM, from old to new; none when there is no
// such VM. The slice is shared: do not change it.
func (r *Repo) PointsOf(ctx context.Context, vm string) ([]Summary, error) {
	l, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	return l.byVM[vm], nil
}

// Named gives the point with exactly that VM and name.
func (r *Repo) Named(ctx context.Context, vm, name string) (Summary, error) {
	l, err := r.list(ctx)
	if err != nil {
		return Summary{}, err
	}
	s, ok := l.named(vm, name)
	if !ok {
		return Summary{}, fmt.Errorf("no point %q: %w", vm+"/"+name, ErrNotExist)
	}
	return s, nil
}

// Origin is where a point of r was first made: what it was copied from, or itself.
func (r *Repo) Origin(p *Point) Origin {
	if p.CopiedFrom != nil {
		return *p.CopiedFrom
	}
	return Origin{Repository: r.ID(), Point: p.ID}
}

// Point reads the manifest of a point.
func (r *Repo) Point(ctx context.Context, id PointID) (*Point, error) { return r.readPoint(ctx, id) }

// Latest gives the newest point of a VM whose manifest is whole; ErrNotExist when there is none.
func (r *Repo) Latest(ctx context.Context, vm string) (Summary, error) {
	list, err := r.PointsOf(ctx, vm)
	if err != nil {
		return Summary{}, err
	}
	for _, s := range slices.Backward(list) {
		if s.Damaged == "" {
			return s, nil
		}
	}
	return Summary{}, fmt.Errorf("no point of VM %q: %w", vm, ErrNotExist)
}

// MinIDPrefix is how many hexadecimal digits of a point's id name it.
const MinIDPrefix = 6

// Find resolves what a user calls a point: VM/POINT, VM/latest, VM/ and the
// beginning of a date (the newest one that matches), an id or a unique prefix of it. ErrNotExist
// and ErrAmbiguous say why it could not.
func (r *Repo) Find(ctx context.Context, ref string) (Summary, error) {
	l, err := r.list(ctx)
	if err != nil {
		return Summary{}, err
	}
	ref = strings.Trim(ref, "/")
	if vm, name, ok := cutLast(ref, "/"); ok {
		if name == "latest" {
			return r.Latest(ctx, vm)
		}
		if s, ok := l.named(vm, name); ok {
			return s, nil
		}
		for _, s := range slices.Backward(l.byVM[vm]) {
			if len(name) >= len("2006") && strings.HasPrefix(s.Name, name) && s.Damaged == "" {
				return s, nil
			}
		}
		return Summary{}, fmt.Errorf("no point %q: %w", ref, ErrNotExist)
	}
	if len(ref) < MinIDPrefix || strings.Trim(ref, "0123456789abcdef") != "" {
		return Summary{}, fmt.Errorf("no point %q: %w", ref, ErrNotExist)
	}
	var found *Summary
	for _, list := range l.byVM {
		for i := range list {
			if !strings.HasPrefix(list[i].ID.String(), ref) {
				continue
			}
			if found != nil {
				return Summary{}, fmt.Errorf("id prefix %q is %w: %s and %s", ref, ErrAmbiguous, found.Path(), list[i].Path())
			}
			found = &list[i]
		}
	}
	if found == nil {
		return Summary{}, fmt.Errorf("no point with an id of %q: %w", ref, ErrNotExist)
	}
	return *found, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+len(sep):], true
}
