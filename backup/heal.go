package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// HealOptions of a repair out of another repository.
type HealOptions struct {
	// Damage is told of what stays damaged. Never called by two goroutines at once.
	Damage func(*store.DamageError)
	// Progress is told how many of the chunks and pages known to be damaged were looked for. May be nil.
	Progress func(done, total int)
	Now      func() time.Time // the clock; nil is time.Now
}

// HealReport says what became of what was damaged.
type HealReport struct {
	Chunks    int `json:"chunks_healed"`
	Pages     int `json:"pages_healed"`
	Manifests int `json:"manifests_healed"`
	Left      int `json:"damaged"` // places on disks of points, and manifests, that stay damaged
}

// maxTargets is how many points of repo are dealt with at a time: each holds up to maxTries others.
const maxTargets = 32

// maxTries is how many points of the other repository are asked for one chunk of one point.
const maxTries = 16

// Heal stores again what verifications have found damaged in repo, out of from, another repository
// of any chunk size and keys. From may hold anything: what it gives is compared with the id of what
// is wanted. It is asked by id when it is the same repository elsewhere, and by place otherwise: the
// copy of the point first, then points of the same VM with a disk of that size, the nearest in time before others.
//
// A damaged manifest is put back only out of the same repository elsewhere: a copy of a point is
// another point, with other pages.
func Heal(ctx context.Context, repo, from *store.Repo, opt HealOptions) (rep HealReport, err error) {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Progress == nil {
		opt.Progress = func(int, int) {}
	}
	h := &healing{repo: repo, from: from, opt: opt, rep: &rep, points: map[store.PointID]*target{}}
	defer h.release()
	if err := h.manifests(ctx); err != nil {
		return rep, err
	}
	tried := map[store.ID]bool{}
	for {
		wanted, err := repo.Wanted(ctx)
		if err != nil {
			return rep, err
		}
		// What could not be healed a moment ago may be now, if a page above it was.
		before := rep
		fresh := slices.ContainsFunc(wanted, func(w store.Wanted) bool { return !tried[w.ID] })
		if !fresh {
			return rep, h.left(ctx)
		}
		if err := h.round(ctx, wanted, tried); err != nil {
			return rep, err
		}
		if rep == before {
			return rep, h.left(ctx)
		}
		// Below a page that is healed there may be more.
		if err := h.look(ctx, wanted); err != nil {
			return rep, err
		}
	}
}

// healing is one on its way.
type healing struct {
	repo, from *store.Repo
	opt        HealOptions
	rep        *HealReport
	points     map[store.PointID]*target // of repo
	held       []func()
}

// target is a point with damage, and the points that may have what it lacks.
type target struct {
	point *store.Point
	from  []*store.Point
}

func (h *healing) release() {
	for _, f := range h.held {
		f()
	}
}

// manifests puts back those that are damaged, where that can be done exactly.
func (h *healing) manifests(ctx context.Context) error {
	if h.from.ID() != h.repo.ID() {
		return nil
	}
	list, err := h.repo.Points(ctx)
	if err != nil {
		return err
	}
	var healed []store.PointID
	for _, s := range list {
		// The index may have it whole.
		if _, err := h.repo.Point(ctx, s.ID); !errors.Is(err, store.ErrDamaged) {
			if err != nil && !errors.Is(err, store.ErrNotExist) {
				return err
			}
			continue
		}
		ok, err := h.repo.RestoreManifest(ctx, h.from, s.ID)
		if err != nil {
			return err
		}
		if ok {
			healed = append(healed, s.ID)
		}
	}
	h.rep.Manifests = len(healed)
	if len(healed) == 0 {
		return nil
	}
	return h.verify(ctx, healed)
}

// verify has what these points lack remembered.
func (h *healing) verify(ctx context.Context, points []store.PointID) error {
	_, err := h.repo.Verify(ctx, store.VerifyOptions{Points: points, Damage: func(*store.DamageError) {}, Now: h.opt.Now})
	return err
}

// look verifies the points that were touched.
func (h *healing) look(ctx context.Context, wanted []store.Wanted) error {
	seen := map[store.PointID]bool{}
	var points []store.PointID
	for _, w := range wanted {
		for _, p := range w.Places {
			if !seen[p.Point] {
				seen[p.Point] = true
				points = append(points, p.Point)
			}
		}
	}
	return h.verify(ctx, points)
}

// round looks for everything that is wanted, and makes durable what it found.
func (h *healing) round(ctx context.Context, wanted []store.Wanted, tried map[store.ID]bool) error {
	healer, err := h.repo.Healer(ctx)
	if err != nil {
		return err
	}
	for i, w := range wanted {
		h.opt.Progress(i, len(wanted))
		tried[w.ID] = true
		if err := h.heal(ctx, healer, w); err != nil {
			return errors.Join(err, healer.Close())
		}
	}
	h.rep.Chunks += healer.Chunks
	h.rep.Pages += healer.Pages
	h.opt.Progress(len(wanted), len(wanted))
	return healer.Close()
}

// heal looks for one chunk or page.
func (h *healing) heal(ctx context.Context, healer *store.Healer, w store.Wanted) error {
	if w.Page {
		if ok, err := healer.Indexed(ctx, w.ID); ok || err != nil {
			return err
		}
	}
	if h.from.ID() == h.repo.ID() {
		b, err := h.from.Content(ctx, w.ID, w.Page)
		switch {
		case err == nil && w.Page:
			_, err = healer.Page(ctx, w.ID, b)
			return err
		case err == nil:
			_, err = healer.Chunk(ctx, w.ID, b)
			return err
		case !isType[*sourceError](ofSource(err)):
			return err
		}
	}
	tries := 0
	for _, p := range w.Places {
		t, err := h.target(ctx, p.Point)
		if err != nil {
			return err
		}
		for _, q := range t.from {
			if tries++; tries > 4*maxTries {
				return nil
			}
			ok, err := h.place(ctx, healer, w, p, t.point, q)
			if ok || err != nil && !isType[*sourceError](ofSource(err)) {
				return err
			}
		}
	}
	return nil
}

// place tries one point of the other repository for one place.
func (h *healing) place(ctx context.Context, healer *store.Healer, w store.Wanted, at store.WantedPlace, p, q *store.Point) (bool, error) {
	img, err := open(h.repo, p, at.Disk, at.Disk)
	if err != nil || img == nil {
		return false, err
	}
	name := at.Disk
	for i := range p.Disks { // the same disk may have another name
		if p.Disks[i].Name == at.Disk {
			if k := slices.IndexFunc(q.Disks, func(d store.Disk) bool { return d.Key == p.Disks[i].Key }); k >= 0 {
				name = q.Disks[k].Name
			}
		}
	}
	src, err := open(h.from, q, name, at.Disk)
	if err != nil || src == nil || src.Size() != img.Size() {
		return false, err
	}
	if w.Page {
		return healer.Rebuild(ctx, img, w.ID, at.Off, src)
	}
	buf := make([]byte, img.ChunkSize())
	n := min(int64(len(buf)), img.Size()-at.Off)
	if n <= 0 {
		return false, nil
	}
	if _, err := src.Checked().ReadContext(ctx, buf[:n], at.Off); err != nil {
		return false, err
	}
	return healer.Chunk(ctx, w.ID, buf)
}

// open opens a disk of a point, or, when what is wanted is one, a configuration file; nil when it has none.
func open(r *store.Repo, p *store.Point, disk, wanted string) (*store.Image, error) {
	var img *store.Image
	var err error
	if file, ok := strings.CutPrefix(wanted, "config/"); ok {
		img, err = r.OpenConfig(p, file)
	} else {
		img, err = r.OpenDisk(p, disk)
	}
	if errors.Is(err, store.ErrNotExist) {
		return nil, nil
	}
	return img, err
}

// target finds the points of the other repository that may have what a point lacks, and keeps
// them readable. It has no point when the manifest cannot be read, or the point is forgotten.
func (h *healing) target(ctx context.Context, id store.PointID) (*target, error) {
	if t := h.points[id]; t != nil {
		return t, nil
	}
	if len(h.points) >= maxTargets {
		h.release()
		h.held, h.points = nil, map[store.PointID]*target{}
	}
	t := &target{}
	h.points[id] = t
	p, err := h.repo.Point(ctx, id)
	if errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	t.point = p
	// As if p were copied there: the point of the same origin, whichever of the two is the copy.
	c := copier{from: h.repo, to: h.from}
	same, err := c.find(ctx, p)
	if err != nil {
		return nil, err
	}
	list, err := h.from.PointsOf(ctx, p.VM.Name)
	if err != nil {
		return nil, err
	}
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b store.Summary) int {
		if same != nil && (a.ID == same.ID) != (b.ID == same.ID) {
			if a.ID == same.ID {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Time.Sub(p.Time).Abs(), b.Time.Sub(p.Time).Abs())
	})
	for _, s := range list[:min(len(list), maxTries)] {
		q, release, err := h.from.Hold(ctx, s.ID)
		if errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		h.held = append(h.held, release)
		t.from = append(t.from, q)
	}
	return t, nil
}

// left tells of what stays damaged.
func (h *healing) left(ctx context.Context) error {
	list, err := h.repo.Points(ctx)
	if err != nil {
		return err
	}
	names := map[store.PointID]string{}
	for i := range list {
		s := &list[i]
		names[s.ID] = s.Path()
		if _, err := h.repo.Point(ctx, s.ID); errors.Is(err, store.ErrDamaged) {
			h.rep.Left++
			h.opt.Damage(&store.DamageError{Point: s.Path(), What: "manifest " + s.ID.String(), Err: errors.New("not healed")})
		} else if err != nil && !errors.Is(err, store.ErrNotExist) {
			return err
		}
	}
	wanted, err := h.repo.Wanted(ctx)
	if err != nil {
		return err
	}
	for _, w := range wanted {
		what := "chunk"
		if w.Page {
			what = "page"
		}
		for _, p := range w.Places {
			h.rep.Left++
			h.opt.Damage(&store.DamageError{Point: cmp.Or(names[p.Point], p.Point.String()), Disk: p.Disk, Off: p.Off,
				What: fmt.Sprintf("%s %s", what, w.ID.String()[:16]), Err: errors.New("not healed")})
		}
	}
	return nil
}
