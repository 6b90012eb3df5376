package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/store"
)

// forgetDecision is one point in `forget --json`.
type forgetDecision struct {
	Type    string        `json:"type"` // "decision"
	ID      store.PointID `json:"id"`
	VM      string        `json:"vm"`
	Name    string        `json:"name"`
	Time    time.Time     `json:"time"`
	Keep    bool          `json:"keep"`
	Reasons []string      `json:"reasons"` // all that keep it
}

// forgetSummary is the last object of `forget --json`.
type forgetSummary struct {
	Type      string `json:"type"` // "summary"
	DryRun    bool   `json:"dry_run"`
	Keep      int    `json:"keep"`
	Forget    int    `json:"forget"`    // decided
	Forgotten int    `json:"forgotten"` // done
}

// forgetFlags are the rules and what else forget takes.
func forgetFlags() []cli.Flag {
	flags := []cli.Flag{&cli.StringFlag{Name: "keep-last", Usage: "keep the newest `N` points, or all"}}
	for _, every := range []string{"hour", "day", "week", "month", "year"} {
		name := map[string]string{"day": "daily"}[every]
		flags = append(flags, &cli.StringFlag{Name: "keep-" + cmp.Or(name, every+"ly"),
			Usage: fmt.Sprintf("keep the newest point of each of the last `N` %ss that have one, or all", every)})
	}
	return append(flags,
		&cli.StringFlag{Name: "keep-within", Usage: "keep points that are at most `DURATION` older than the newest, such as 30d, 36h, 1y6m"},
		&cli.StringSliceFlag{Name: "keep-tag", Usage: "keep points with the tag `TEXT`; may be repeated"},
		&cli.StringSliceFlag{Name: "tag", Usage: "apply the rules only to points with the tag `TEXT`; may be repeated"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "force", Usage: "forget named points even if a VM has no other good one, if a boot needs them, or if they are damaged"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "dry-run", Usage: "only show what would be forgotten"},
	)
}

const forgetHelp = "With rules, of the VMs named, or of all: a point stays when any rule keeps it. The newest good point\n" +
	"of a VM, locked points, those that a boot was made from, while it lasts, and those with a damaged manifest\n" +
	"always stay; points with damaged disks cost no good one its place.\n" +
	"With points (VM/TIME, or an id of at least 6 digits) and no rule, exactly those are forgotten.\n" +
	"Their space is given back by 'holdfast gc'."

// policy reads the rules of the command line. Every error is one of usage.
func (c *call) policy() (backup.Policy, error) {
	p := backup.Policy{KeepTags: c.StringSlice("keep-tag"), OnlyTags: c.StringSlice("tag"), Zone: time.Local}
	for name, n := range map[string]*int{
		"keep-last": &p.Last, "keep-hourly": &p.Hourly, "keep-daily": &p.Daily,
		"keep-weekly": &p.Weekly, "keep-monthly": &p.Monthly, "keep-yearly": &p.Yearly,
	} {
		switch s := c.String(name); s {
		case "":
		case "all", "-1":
			*n = backup.All
		default:
			v, err := strconv.ParseUint(s, 10, 31)
			if err != nil {
				return p, withHint(usagef("--%s: %q is no number of points", name, s), "a number from 0, or all")
			}
			*n = int(v)
		}
	}
	if s := c.String("keep-within"); s != "" {
		d, err := backup.ParseDuration(s)
		if err != nil {
			return p, usagef("--keep-within: %v", err)
		}
		p.Within = d
	}
	return p, nil
}

// checkForget refuses command lines that could mean something else than they do.
func checkForget(c *call) error {
	p, err := c.policy()
	if err != nil {
		return err
	}
	if !p.Empty() {
		if c.Bool("force") {
			return usagef("forget: --force is for points that are named, not for rules")
		}
		for _, arg := range c.args {
			if strings.Contains(arg, "/") {
				return usagef("forget: %q is a point; rules apply to VMs", arg)
			}
		}
		return nil
	}
	if c.IsSet("tag") {
		return usagef("forget: --tag needs a rule")
	}
	for _, f := range forgetFlags() {
		if name := f.Names()[0]; strings.HasPrefix(name, "keep-") && c.IsSet(name) {
			return usagef("forget: no rule keeps anything")
		}
	}
	if len(c.args) == 0 {
		return withHint(usagef("forget: no rule and no point"), "for example --keep-daily 7 --keep-weekly 5, first with --dry-run")
	}
	for _, arg := range c.args {
		if !strings.Contains(arg, "/") && (len(arg) < store.MinIDPrefix || strings.Trim(arg, "0123456789abcdef") != "") {
			return noRule(arg)
		}
	}
	return nil
}

func noRule(vm string) error {
	return withHint(usagef("forget: %q is no point, and no rule says which points of a VM stay", vm), "for example --keep-last 7")
}

func runForget(ctx context.Context, c *call) error {
	p, err := c.policy()
	if err != nil {
		return err
	}
	now := c.clock.now()
	return c.withRepo(ctx, func(r *store.Repo) error {
		decide := c.forgetByRule
		if p.Empty() {
			decide = c.forgetNamed
		}
		if !c.Bool("dry-run") {
			unlock, err := r.LockForget(ctx)
			if err != nil {
				return err
			}
			defer unlock()
		}
		list, err := decide(ctx, r, p, now)
		if err != nil {
			return err
		}
		list, drop, err := c.keepPinned(ctx, r, list, p.Empty())
		if err != nil {
			return err
		}
		var ids []store.PointID
		for _, d := range list {
			if !d.Keep {
				ids = append(ids, d.Point.ID)
			}
		}
		if err := c.printDecisions(list); err != nil {
			return err
		}
		sum := forgetSummary{Type: "summary", DryRun: c.Bool("dry-run"), Keep: len(list) - len(ids), Forget: len(ids)}
		if !sum.DryRun {
			sum.Forgotten, err = c.forget(ctx, r, ids, !p.Empty(), now)
			for _, p := range drop {
				if err == nil {
					err = r.Unpin(ctx, p.ID)
				}
			}
		}
		switch {
		case sum.DryRun:
			c.out.line("%d points would be forgotten, %d stay; nothing was changed", sum.Forget, sum.Keep)
		case sum.Forgotten == 0 && err == nil:
			c.out.line("nothing to forget, %d points stay", sum.Keep)
		case sum.Forgotten > 0:
			c.out.line("%d points forgotten", sum.Forgotten)
			c.progress.note("'holdfast gc' gives back the space of forgotten points")
		}
		if jerr := c.out.object(sum); err == nil {
			err = jerr
		}
		return err
	})
}

// forgetByRule decides on the points of the VMs named, or of all.
func (c *call) forgetByRule(ctx context.Context, r *store.Repo, p backup.Policy, now time.Time) ([]backup.Decision, error) {
	points, err := r.Points(ctx)
	if err != nil {
		return nil, err
	}
	if len(c.args) > 0 {
		points = nil
		for i, vm := range c.args {
			list, err := r.PointsOf(ctx, vm)
			if err != nil {
				return nil, err
			}
			if len(list) == 0 {
				return nil, withHint(fmt.Errorf("no VM %q: %w", vm, store.ErrNotExist), "'holdfast points' lists all")
			}
			if !slices.Contains(c.args[:i], vm) {
				points = append(points, list...)
			}
		}
	}
	if points, _, err = provenNewest(ctx, r, points, now); err != nil {
		return nil, err
	}
	return backup.Keep(points, p, now), nil
}

// provenNewest gives the newest good point of each VM, having read its manifest:
// what only the index calls good must not be all that is left. In the copy of points
// that it returns those found damaged, now or by a verification, are marked, and those found gone are left out.
func provenNewest(ctx context.Context, r *store.Repo, points []store.Summary, now time.Time) ([]store.Summary, map[string]store.Summary, error) {
	points, err := r.WithDamage(ctx, points)
	if err != nil {
		return nil, nil, err
	}
	proven := map[store.PointID]bool{}
	for {
		newest := backup.NewestGood(points, now)
		bad := map[store.PointID]error{}
		for _, s := range newest {
			if proven[s.ID] {
				continue
			}
			_, err := r.Point(ctx, s.ID)
			switch {
			case err == nil:
				proven[s.ID] = true
			case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrNotExist):
				bad[s.ID] = err
			default:
				return nil, nil, err
			}
		}
		if len(bad) == 0 {
			return points, newest, nil
		}
		points = slices.DeleteFunc(points, func(s store.Summary) bool { return errors.Is(bad[s.ID], store.ErrNotExist) })
		for i := range points {
			if err := bad[points[i].ID]; err != nil {
				points[i].Damaged = err.Error()
			}
		}
	}
}

// forgetNamed decides to forget the points that are named, or refuses.
func (c *call) forgetNamed(ctx context.Context, r *store.Repo, _ backup.Policy, now time.Time) ([]backup.Decision, error) {
	var named, others []store.Summary
	for _, ref := range c.args {
		s, err := exactPoint(ctx, r, ref)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(named, func(o store.Summary) bool { return o.ID == s.ID }) {
			continue
		}
		list, err := r.PointsOf(ctx, s.VM)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(named, func(o store.Summary) bool { return o.VM == s.VM }) {
			others = append(others, list...)
		}
		named = append(named, s)
	}
	_, newest, err := provenNewest(ctx, r, others, now)
	if err != nil {
		return nil, err
	}
	var list []backup.Decision
	for _, s := range named {
		list = append(list, backup.Decision{Point: s})
		if s.LockedUntil.After(now) {
			return nil, fmt.Errorf("%s: %w until %s", s.Path(), store.ErrLockedPoint, timeText(s.LockedUntil))
		}
		switch {
		case c.Bool("force"):
		case s.Damaged != "":
			return nil, withHint(fmt.Errorf("%s: its manifest is %w, so nobody knows whether it is locked", s.Path(), store.ErrDamaged), forceHint)
		case newest[s.VM].ID == s.ID:
			what := "the newest good point"
			if len(newest[s.VM].Hit) > 0 {
				what = "the newest point, of which none is good,"
			}
			return nil, withHint(fmt.Errorf("%s is %s of VM %q", s.Path(), what, s.VM), forceHint)
		}
	}
	return list, nil
}

// keepPinned keeps the points that boots need. A point that is named is an error instead, or, with --force, is forgotten all the same: its pins are in drop.
func (c *call) keepPinned(ctx context.Context, r *store.Repo, list []backup.Decision, named bool) (_ []backup.Decision, drop []store.Pin, err error) {
	pins, err := r.Pins(ctx)
	if err != nil && !(errors.Is(err, store.ErrDamaged) && c.Bool("force")) {
		return nil, nil, withHint(fmt.Errorf("which points are in use is not known: %w", err), "remove that object from the repository once no boot needs an old point")
	}
	if pins, err = c.unpinLost(ctx, r, pins); err != nil {
		return nil, nil, err
	}
	for i := range list {
		d := &list[i]
		for _, p := range pins {
			switch {
			case p.Point != d.Point.ID || d.Keep && named:
			case !named:
				d.Keep, d.Reasons = true, append(d.Reasons, pinText(p))
			case !c.Bool("force"):
				return nil, nil, withHint(fmt.Errorf("%s: %w: %s", d.Point.Path(), store.ErrPinned, pinText(p)), "'holdfast boot stop' ends it; "+forceHint)
			default:
				drop = append(drop, p)
			}
		}
	}
	return list, drop, nil
}

func pinText(p store.Pin) string { return p.What + " on " + p.Host }

// unpinLost leaves out the pins of boots of this computer that are no more.
func (c *call) unpinLost(ctx context.Context, r *store.Repo, pins []store.Pin) (stay []store.Pin, err error) {
	for _, p := range pins {
		if !boot.Lost(p) {
			stay = append(stay, p)
			continue
		}
		c.progress.detail("%s is no more", p.What)
		if c.Bool("dry-run") {
			continue
		}
		if err := r.Unpin(ctx, p.ID); err != nil {
			return nil, err
		}
	}
	return stay, nil
}

const forceHint = "--force forgets it all the same"

// exactPoint resolves the name of one point. The beginning of a date, which
// elsewhere names the newest of several, is not enough to forget by.
func exactPoint(ctx context.Context, r *store.Repo, ref string) (store.Summary, error) {
	if !strings.Contains(ref, "/") {
		// A VM may have a name that looks like an id.
		if list, err := r.PointsOf(ctx, ref); err != nil || len(list) > 0 {
			return store.Summary{}, cmp.Or(err, noRule(ref))
		}
		return r.Find(ctx, ref)
	}
	s, err := r.Find(ctx, ref)
	if ref = strings.Trim(ref, "/"); err == nil && s.Path() != ref && !strings.HasSuffix(ref, "/latest") {
		return s, withHint(fmt.Errorf("%q is no full name of a point", ref), "did you mean %s?", s.Path())
	}
	return s, err
}

// printDecisions shows a table for each VM.
func (c *call) printDecisions(list []backup.Decision) error {
	for begin := 0; begin < len(list); {
		vm := list[begin].Point.VM
		t := newTable("POINT", "ID", "", "WHY")
		end := begin
		for ; end < len(list) && list[end].Point.VM == vm; end++ {
			d := list[end]
			s := d.Point
			what := "forget"
			if d.Keep {
				what = "keep"
			}
			t.row(cmp.Or(s.Name, "?"), s.ID.String()[:12], what, strings.Join(d.Reasons, ", "))
			if err := c.out.object(forgetDecision{"decision", s.ID, s.VM, s.Name, s.Time, d.Keep, append([]string{}, d.Reasons...)}); err != nil {
				return err
			}
		}
		c.out.line("VM %s", cmp.Or(vm, "unknown"))
		c.out.table(t)
		c.out.line("")
		begin = end
	}
	return nil
}

// forget forgets points and says how many. Of those that rules have chosen, what
// turns out damaged or locked when its manifest is read stays, with a warning; it held no
// place in a rule, so the other decisions stand.
func (c *call) forget(ctx context.Context, r *store.Repo, ids []store.PointID, byRule bool, now time.Time) (int, error) {
	forget := r.Forget
	if c.Bool("force") {
		forget = r.ForgetDamaged
	}
	done, err := forget(ctx, ids, now)
	refused := errors.Is(err, store.ErrDamaged) || errors.Is(err, store.ErrLockedPoint)
	switch {
	case err == nil:
		return len(done), nil
	case refused && len(done) == 0 && byRule:
		return c.forgetSound(ctx, r, ids, now)
	case errors.Is(err, store.ErrDamaged) && len(done) == 0:
		return 0, withHint(fmt.Errorf("%w; so nobody knows whether it is locked", err), forceHint)
	}
	return len(done), partly(err, len(done), len(ids))
}

// forgetSound forgets the points whose manifest can be read and has no lock.
func (c *call) forgetSound(ctx context.Context, r *store.Repo, ids []store.PointID, now time.Time) (int, error) {
	var sound []store.PointID
	damaged := 0
	for _, id := range ids {
		p, err := r.Point(ctx, id)
		switch {
		case errors.Is(err, store.ErrDamaged):
			c.progress.warn("%v: it stays", err)
			damaged++
		case err != nil && !errors.Is(err, store.ErrNotExist):
			return 0, err
		case err == nil && p.LockedUntil.After(now):
			c.progress.warn("%s is locked until %s: it stays", p.Path(), timeText(p.LockedUntil))
		default:
			sound = append(sound, id)
		}
	}
	done, err := r.Forget(ctx, sound, now)
	if err == nil && damaged > 0 {
		err = withHint(fmt.Errorf("%w: %d damaged points stay", errDamageFound, damaged), "a damaged point is forgotten by its id and --force")
	}
	return len(done), partly(err, len(done), len(ids))
}

// partly says of a failure how far it came.
func partly(err error, done, all int) error {
	if err == nil || done == 0 {
		return err
	}
	return fmt.Errorf("%w: %d of %d points forgotten: %w", errPartlyDone, done, all, err)
}
