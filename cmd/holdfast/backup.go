package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/backup/imagefile"
	"github.com/holdfast-backup/holdfast/store"
)

// summary is the last object of `backup --json`.
type summary struct {
	Type   string         `json:"type"` // "summary"
	Points []summaryPoint `json:"points"`
	Failed []summaryFail  `json:"failed"`
	store.Stats
}

type summaryPoint struct {
	ID   store.PointID `json:"id"`
	VM   string        `json:"vm"`
	Name string        `json:"name"`
	Time time.Time     `json:"time"`
	store.Stats
	Consistency string   `json:"consistency"`
	Warnings    []string `json:"warnings"`
}

type summaryFail struct {
	VM    string `json:"vm"`
	Error string `json:"error"`
}

// vmsOf says which files are which VM: with a name all are disks of one, without
// each is one.
func vmsOf(name string, files []string) ([]imagefile.VM, error) {
	if name != "" {
		return []imagefile.VM{{Name: name, Files: files}}, nil
	}
	var vms []imagefile.VM
	seen := map[string]string{} // VM => file
	for _, f := range files {
		vm := imagefile.NameOf(f)
		if other, ok := seen[vm]; ok {
			return nil, withHint(usagef("%s and %s would both be VM %q", other, f, vm), "name the VM that they are disks of with --vm")
		}
		seen[vm] = f
		vms = append(vms, imagefile.VM{Name: vm, Files: []string{f}})
	}
	return vms, nil
}

// lockFor is for how long new points are locked: what the command line says, or
// else the config.
func (c *call) lockFor() (backup.Duration, error) {
	s := c.String("lock-for")
	if s == "" {
		return c.cfg.backup.lockFor, nil
	}
	d, err := backup.ParseDuration(s)
	if err != nil {
		return d, usagef("--lock-for: %v", err)
	}
	return d, nil
}

func checkBackup(c *call) error {
	if c.String("source") != "" {
		for _, flag := range []string{"vm", "attach", "allow-outside-backing"} {
			if c.IsSet(flag) {
				return usagef("--%s is about image files, not about VMs of a source", flag)
			}
		}
	} else if c.IsSet("vms-at-once") {
		return usagef("--vms-at-once is about VMs of a source")
	}
	if _, err := parseExclude(c.String("exclude")); err != nil {
		return usagef("--exclude: %v", err)
	}
	_, err := c.lockFor()
	return err
}

// parseExclude reads the value of --exclude; the empty one is the default.
func parseExclude(s string) (e backup.Exclude, err error) {
	switch s {
	case "":
		return backup.Exclude{Swap: true}, nil
	case "none":
		return e, nil
	}
	for word := range strings.SplitSeq(s, ",") {
		switch strings.TrimSpace(word) {
		case "swap":
			e.Swap = true
		case "free":
			e.Free = true
		default:
			return e, fmt.Errorf("%q is none of swap, free and none", word)
		}
	}
	return e, nil
}

// exclude is what is left out of a VM: what the command line says, or else the config for this VM, or for all.
func (c *call) exclude(vm string) backup.Exclude {
	e, err := parseExclude(cmp.Or(c.String("exclude"), c.cfg.vms[vm].exclude, c.cfg.backup.exclude))
	if err != nil {
		panic(err) // all three have been checked
	}
	return e
}

// work is what `backup` was asked for.
type work struct {
	src    backup.Source
	vms    []string
	sizes  map[string]int64 // of each VM's disks, bytes; nil: not known
	disks  int              // of all VMs
	atOnce int
	close  func() error
}

// fromFiles is a backup of image files.
func (c *call) fromFiles() (*work, error) {
	vms, err := vmsOf(c.String("vm"), c.args)
	if err != nil {
		return nil, err
	}
	for _, vm := range vms {
		if err := backup.CheckName(vm.Name); err != nil {
			return nil, withHint(usagef("%v", err), "name the VM with --vm")
		}
	}
	if attached := c.StringSlice("attach"); len(attached) > 0 {
		if len(vms) > 1 {
			return nil, withHint(usagef("backup: --attach is about one VM, not %d", len(vms)), "name the VM that the files are disks of with --vm")
		}
		vms[0].Attached = attached
	}
	src := imagefile.New(vms...)
	src.AllowOutsideBacking = c.Bool("allow-outside-backing")
	w := &work{src: src, atOnce: 1, close: func() error { return nil }}
	for _, vm := range vms {
		w.vms = append(w.vms, vm.Name)
	}
	return w, nil
}

func runBackup(ctx context.Context, c *call) error {
	from := func(context.Context) (*work, error) { return c.fromFiles() }
	if c.String("source") != "" {
		from = c.fromPlatform
	}
	w, err := from(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	began := time.Now()
	sum := summary{Type: "summary", Points: []summaryPoint{}, Failed: []summaryFail{}}
	err = c.withTarget(ctx, func(to backup.Target) error { return c.backupAll(ctx, to, w, &sum) })
	sum.Stats.Duration = time.Since(began).Seconds()
	if jerr := c.out.object(sum); err == nil {
		err = jerr
	}
	return err
}

// backupAll makes a restore point of each VM. One that fails does not stop the others.
func (c *call) backupAll(ctx context.Context, to backup.Target, w *work, sum *summary) error {
	var (
		mu       sync.Mutex // guards following, and sum
		failures []error
		g        errgroup.Group
	)
	var total *task
	if w.disks > 1 {
		all := int64(0)
		for _, n := range w.sizes {
			all += n
		}
		total = c.progress.inTotal("VMs", len(w.vms), "new", all)
		defer func() { total.end(ctx.Err()) }()
	}
	g.SetLimit(w.atOnce)
	for _, vm := range w.vms {
		g.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			done := int64(0) // bytes of it that were told as done
			p, err := c.backupVM(ctx, to, w.src, vm, &done)
			if total != nil {
				total.part(w.sizes[vm] - done)
			}
			if err != nil && ctx.Err() != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failures = append(failures, err)
				sum.Failed = append(sum.Failed, summaryFail{vm, err.Error()})
				return nil
			}
			c.done(p, sum)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if len(failures) == 0 {
		return nil
	}
	err := errors.Join(failures...)
	if len(sum.Points) > 0 {
		err = fmt.Errorf("%w: %d of %d VMs failed\n%w", errPartlyDone, len(failures), len(w.vms), err)
	}
	return err
}

// done says what became of a VM.
func (c *call) done(p *store.Point, sum *summary) {
	sum.Points = append(sum.Points, summaryPoint{p.ID, p.VM.Name, p.Name, p.Time, p.Stats, p.Consistency, append([]string{}, p.Warnings...)})
	sum.Stats.Add(p.Stats)
	stored := "stored"
	if isAway(c.repo) {
		stored = "sent"
	}
	c.out.line("%s: %s, %s read, %s new, %s %s, in %s", p.Path(), sizeText(p.Stats.Total), sizeText(p.Stats.Read),
		sizeText(p.Stats.New), sizeText(p.Stats.Stored), stored, durationText(time.Duration(p.Stats.Duration*float64(time.Second))))
}

// backupVM makes one restore point. told is how many bytes of its disks are dealt with when it returns.
func (c *call) backupVM(ctx context.Context, to backup.Target, src backup.Source, vm string, told *int64) (p *store.Point, err error) {
	snap, err := src.Freeze(ctx, vm)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := snap.Close(); cerr != nil {
			// That is no part of what became of the point; what is left on the host the next run removes.
			c.progress.warn("%v", cerr)
		}
	}()
	var lock backup.Duration
	if !isAway(c.repo) { // else its server decides
		if lock, err = c.lockFor(); err != nil {
			return nil, err
		}
	}
	var running *task
	defer func() {
		if running != nil {
			*told += running.done.Load()
			running.end(err)
		}
	}()
	p, err = backup.RunTo(ctx, to, snap, backup.Options{
		Tags:         c.StringSlice("tag"),
		Full:         c.Bool("full"),
		Exclude:      c.exclude(vm),
		CompareEvery: c.cfg.sources[c.String("source")].compareEvery,
		Program:      programVersion(),
		LockFor:      lock,
		Now:          c.clock.now,
		Start: func(vm, disk string, total int64) backup.Meter {
			if running != nil {
				*told += running.done.Load()
				running.end(nil)
			}
			running = c.progress.task(vm+"/"+disk, "new", total)
			return backup.Meter{Done: running.add, New: running.count}
		},
	})
	if err != nil {
		return nil, err
	}
	for _, w := range p.Warnings {
		c.progress.warn("%s: %s", p.Path(), w)
	}
	return p, nil
}
