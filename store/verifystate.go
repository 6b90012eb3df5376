package store

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/store/bucket"
)

const (
	verifyObject     = "verify/state"
	verifyLockName   = "verify.lock" // held while it is changed
	verifyHeaderLen  = 56
	verifyVersion    = 1
	maxVerifyState   = 64 << 20  // bytes of the object
	maxVerifyPlain   = 256 << 20 // bytes of what is in it
	ctxVerify        = "holdfast repository v1 verify"
	maxDamage        = 1 << 16 // records remembered
	maxPlaces        = 1 << 18 // places on disks of points remembered
	maxDamageMessage = 300     // bytes
)

var verifyMagic = [8]byte{'H', 'F', 'V', 'E', 'R', 'I', 'F', 'Y'}

// verifyState is what verifications leave for each other, for listings and for an index
// that is made anew: how far the reading of all packs has come, and what was found damaged. All of it
// can be found again. See doc.go, "verify/state".
type verifyState struct {
	Pass   *verifyPass    // through all packs, on its way; nil when there is none
	Ended  time.Time      // when the last pass came to its end; zero: none did
	Damage []damageRecord // by id, then by pack
	// Unlisted is how many damaged records are not in Damage because there are too many.
	Unlisted int64
	Touched  []touch // by point, then by disk
}

// verifyPass is one reading of all packs, in the order of their ids, which are random.
type verifyPass struct {
	Began time.Time `json:"began"`
	// After is the last pack that was read: so were all before it that were there.
	After PackID `json:"after,omitzero"`
	Packs int    `json:"packs"`      // read so far
	Read  int64  `json:"bytes_read"` // of them
}

// damageRecord is a chunk or page that failed its check, or is nowhere.
type damageRecord struct {
	ID    ID        `json:"id"`
	Kind  uint8     `json:"kind"`            // KindChunk or KindPage
	Pack  PackID    `json:"pack,omitzero"`   // zero: it is nowhere
	Off   uint32    `json:"offset,omitzero"` // in the pack; zero: wherever it is
	Error string    `json:"error"`
	Found time.Time `json:"found"`
}

func (d *damageRecord) order(o *damageRecord) int {
	return cmp.Or(bytes.Compare(d.ID[:], o.ID[:]), bytes.Compare(d.Pack[:], o.Pack[:]))
}

// key is what no two records have in common: id and pack.
func (d *damageRecord) key() (k [64]byte) {
	copy(k[copy(k[:], d.ID[:]):], d.Pack[:])
	return k
}

// touch is the damage of one disk, or configuration file, of one point.
type touch struct {
	Point  PointID
	Disk   string
	Found  time.Time
	More   bool // than Places has
	Places []touchedPlace
}

// touchedPlace is where on a disk a damaged chunk belongs, or the range of a damaged page begins.
type touchedPlace struct {
	Off int64 // bytes
	ID  ID
}

func (t *touch) order(o *touch) int {
	return cmp.Or(bytes.Compare(t.Point[:], o.Point[:]), cmp.Compare(t.Disk, o.Disk))
}

// verifyJSON is the stored form: places name records by their number in damage.
type verifyJSON struct {
	Pass     *verifyPass    `json:"pass,omitempty"`
	Ended    time.Time      `json:"ended,omitzero"`
	Damage   []damageRecord `json:"damage,omitempty"`
	Unlisted int64          `json:"unlisted,omitempty"`
	Touched  []touchJSON    `json:"touched,omitempty"`
}

type touchJSON struct {
	Point  PointID    `json:"point"`
	Disk   string     `json:"disk"`
	Found  time.Time  `json:"found"`
	More   bool       `json:"more,omitempty"`
	Places [][2]int64 `json:"places"` // offset on the disk, number of the record
}

// marshal gives the JSON. Equal states have equal bytes.
func (s *verifyState) marshal() ([]byte, error) {
	slices.SortFunc(s.Damage, func(a, b damageRecord) int { return a.order(&b) })
	slices.SortFunc(s.Touched, func(a, b touch) int { return a.order(&b) })
	out := verifyJSON{Pass: s.Pass, Ended: s.Ended, Damage: s.Damage, Unlisted: s.Unlisted}
	at := make(map[ID]int64, len(s.Damage))
	for i := range slices.Backward(s.Damage) {
		at[s.Damage[i].ID] = int64(i) // the first of an id
	}
	for i := range s.Touched {
		t := &s.Touched[i]
		j := touchJSON{Point: t.Point, Disk: t.Disk, Found: t.Found, More: t.More, Places: [][2]int64{}}
		for _, p := range t.Places {
			if n, ok := at[p.ID]; ok {
				j.Places = append(j.Places, [2]int64{p.Off, n})
			}
		}
		out.Touched = append(out.Touched, j)
	}
	return json.Marshal(out)
}

func (s *verifyState) encode(repo [16]byte, k *keys) ([]byte, error) {
	plain, err := s.marshal()
	if err != nil {
		return nil, err
	}
	h := make([]byte, verifyHeaderLen)
	copy(h, verifyMagic[:])
	binary.LittleEndian.PutUint32(h[8:], verifyVersion)
	copy(h[16:], repo[:])
	return sealObject(h, ctxVerify, plain, k)
}

// decodeVerifyState's errors match ErrDamaged or ErrNewerFormat.
func decodeVerifyState(b []byte, repo [16]byte, k *keys) (*verifyState, error) {
	damaged := func(why string) (*verifyState, error) {
		return nil, &DamageError{What: verifyObject, Err: errors.New(why)}
	}
	if len(b) < verifyHeaderLen+tagLen+sealedCheck || !bytes.HasPrefix(b, verifyMagic[:]) {
		return damaged("header")
	}
	if !wholeObject(b) {
		return damaged("checksum")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v > verifyVersion {
		return nil, fmt.Errorf("%s: %w", verifyObject, ErrNewerFormat)
	}
	if [16]byte(b[16:]) != repo {
		return damaged("belongs to another repository")
	}
	plain, err := openObject(b, verifyHeaderLen, ctxVerify, maxVerifyPlain, k)
	if err != nil {
		return damaged(err.Error())
	}
	var in verifyJSON
	if err := json.Unmarshal(plain, &in); err != nil {
		return damaged(err.Error())
	}
	s := &verifyState{Pass: in.Pass, Ended: in.Ended, Damage: in.Damage, Unlisted: in.Unlisted}
	for i := range s.Damage {
		if d := &s.Damage[i]; d.ID.IsZero() || d.Kind > KindPage {
			return damaged("record")
		}
	}
	for _, j := range in.Touched {
		t := touch{Point: j.Point, Disk: j.Disk, Found: j.Found, More: j.More}
		for _, p := range j.Places {
			if p[0] < 0 || p[1] < 0 || p[1] >= int64(len(s.Damage)) {
				return damaged("place")
			}
			t.Places = append(t.Places, touchedPlace{p[0], s.Damage[p[1]].ID})
		}
		s.Touched = append(s.Touched, t)
	}
	return s, nil
}

// loadVerifyState reads the state. One that is lost or damaged costs only what is
// remembered: it is as good as empty, with a warning. usable is false for one of a newer
// program, which must not be replaced.
func (r *Repo) loadVerifyState(ctx context.Context) (s *verifyState, usable bool, err error) {
	raw, err := readObject(ctx, r.bucket, verifyObject, maxVerifyState)
	if errors.Is(err, bucket.ErrNotExist) {
		return &verifyState{}, true, nil
	}
	if err == nil {
		s, err = decodeVerifyState(raw, r.id, r.keys)
	}
	switch {
	case errors.Is(err, ErrDamaged), errors.Is(err, syscall.EIO):
		r.warn(fmt.Sprintf("%v; what verifications have found is forgotten, so verify again", err))
		return &verifyState{}, true, nil
	case errors.Is(err, ErrNewerFormat):
		r.warn(fmt.Sprintf("%v; damage that is known is not seen", err))
		return &verifyState{}, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("store: %w", err)
	}
	return s, true, nil
}

// changeVerifyState replaces the state, unless change leaves it as it is. All who do so, in other
// processes too, wait for each other, so that none loses what another one has found.
func (r *Repo) changeVerifyState(ctx context.Context, change func(*verifyState) error) error {
	r.verifyMu.Lock()
	defer r.verifyMu.Unlock()
	if l, ok := r.bucket.(bucket.Locker); ok {
		unlock, err := l.Lock(ctx, verifyLockName)
		if err != nil {
			return fmt.Errorf("store: %s: %w", verifyObject, err)
		}
		defer unlock()
	}
	s, usable, err := r.loadVerifyState(ctx)
	if err != nil {
		return err
	}
	if !usable {
		return fmt.Errorf("store: %s: %w", verifyObject, ErrNewerFormat)
	}
	before, err := s.marshal()
	if err != nil {
		return err
	}
	if err := change(s); err != nil {
		return err
	}
	if err := r.tidy(ctx, s); err != nil {
		return err
	}
	after, err := s.marshal()
	if err != nil {
		return err
	}
	if bytes.Equal(before, after) {
		return nil
	}
	raw, err := s.encode(r.id, r.keys)
	if err != nil {
		return err
	}
	if len(raw) > maxVerifyState {
		return fmt.Errorf("store: %s of %d bytes is too large", verifyObject, len(raw))
	}
	if err := writeObject(ctx, r.bucket, verifyObject, raw); err != nil {
		return fmt.Errorf("store: write %s: %w", verifyObject, err)
	}
	return nil
}

// tidy takes out of s what is over: places that are healed, points that are forgotten,
// records of packs that are gone. A record whose pack is there stays though its chunk is whole
// elsewhere: an index that is made anew must not choose the damaged one.
func (r *Repo) tidy(ctx context.Context, s *verifyState) error {
	if len(s.Damage) == 0 && len(s.Touched) == 0 {
		return nil
	}
	open, packs, err := r.unhealed(ctx, s)
	if err != nil {
		return err
	}
	list, err := r.Points(ctx)
	if err != nil {
		return err
	}
	points := make(map[PointID]bool, len(list))
	for i := range list {
		points[list[i].ID] = true
	}
	s.limit()
	used := map[ID]bool{}
	s.Touched = slices.DeleteFunc(s.Touched, func(t touch) bool { return !points[t.Point] })
	for i := range s.Touched {
		t := &s.Touched[i]
		t.Places = slices.DeleteFunc(t.Places, func(p touchedPlace) bool { return !open[p.ID] })
		for _, p := range t.Places {
			used[p.ID] = true
		}
	}
	s.Touched = slices.DeleteFunc(s.Touched, func(t touch) bool { return len(t.Places) == 0 && !t.More })
	seen := map[ID]bool{} // without a pack
	s.Damage = slices.DeleteFunc(s.Damage, func(d damageRecord) bool { return d.Pack != (PackID{}) && packs[d.Pack] == 0 && !used[d.ID] })
	for i := range s.Damage {
		if d := &s.Damage[i]; packs[d.Pack] == 0 {
			d.Pack, d.Off = PackID{}, 0
		}
	}
	s.Damage = slices.DeleteFunc(s.Damage, func(d damageRecord) bool {
		if d.Pack != (PackID{}) {
			return false
		}
		over := seen[d.ID] || !used[d.ID]
		seen[d.ID] = true
		return over
	})
	if len(s.Damage) == 0 {
		s.Unlisted = 0
	}
	return nil
}

// limit bounds what is remembered. What was found first stays.
func (s *verifyState) limit() {
	if n := len(s.Damage); n > maxDamage {
		slices.SortStableFunc(s.Damage, func(a, b damageRecord) int { return a.Found.Compare(b.Found) })
		s.Unlisted += int64(n - maxDamage)
		s.Damage = s.Damage[:maxDamage]
	}
	known := make(map[ID]bool, len(s.Damage))
	for i := range s.Damage {
		known[s.Damage[i].ID] = true
	}
	left := maxPlaces
	for i := range s.Touched {
		t := &s.Touched[i]
		n := len(t.Places)
		if s.Unlisted > 0 {
			t.Places = slices.DeleteFunc(t.Places, func(p touchedPlace) bool { return !known[p.ID] })
		}
		t.Places = t.Places[:min(len(t.Places), left)]
		t.More = t.More || len(t.Places) < n
		left -= len(t.Places)
	}
}

// unhealed reports which ids of the damage in s are not whole elsewhere by now, and gives
// the numbers of the packs that are registered.
func (r *Repo) unhealed(ctx context.Context, s *verifyState) (open map[ID]bool, packs map[PackID]uint32, err error) {
	packs = map[PackID]uint32{}
	for p, err := range r.index.Packs(ctx) {
		if err != nil {
			return nil, nil, fmt.Errorf("store: %w", err)
		}
		packs[p.ID] = p.Number
	}
	open, err = stillOpen(ctx, r.index, s, packs)
	return open, packs, err
}

// stillOpen is unhealed by any index: a chunk is healed when the index has a place for it
// that is not one of those found damaged.
func stillOpen(ctx context.Context, x Index, s *verifyState, packs map[PackID]uint32) (map[ID]bool, error) {
	ids, locs := make([]ID, len(s.Damage)), make([]Loc, len(s.Damage))
	for i := range s.Damage {
		ids[i] = s.Damage[i].ID
	}
	for i := 0; i < len(ids); i += lookupBatch {
		n := min(len(ids), i+lookupBatch)
		if err := x.Lookup(ctx, ids[i:n], locs[i:n]); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	open := map[ID]bool{}
	for i := range s.Damage {
		if !locs[i].Sound() || s.Damage[i].hits(locs[i], packs) {
			open[ids[i]] = true
		}
	}
	return open, nil
}

// lookupBatch bounds what is asked of an index at once: 128 KiB of ids.
const lookupBatch = 4096

// hits reports whether loc is the place that was found damaged.
func (d *damageRecord) hits(loc Loc, packs map[PackID]uint32) bool {
	n, ok := packs[d.Pack]
	return ok && n == loc.Pack && (d.Off == 0 || d.Off == loc.Off)
}
