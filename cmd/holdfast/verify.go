package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/store"
)

// damageFound is one finding in `verify --json` and `repair --json`.
type damageFound struct {
	Type  string `json:"type"` // "damage"
	Point string `json:"point,omitempty"`
	Disk  string `json:"disk,omitempty"`
	Off   *int64 `json:"offset,omitempty"`
	What  string `json:"what"`
	Error string `json:"error"`
}

// showDamage prints one finding.
func (c *call) showDamage(d *store.DamageError) {
	c.out.line("%s", d)
	f := damageFound{Type: "damage", Point: d.Point, Disk: d.Disk, What: d.What, Error: d.Error()}
	if d.Disk != "" {
		f.Off = &d.Off
	}
	_ = c.out.object(f) // an error sticks and is reported at the end
}

const verifyHelp = "Without POINT, all of the repository. Damage ends with exit code 4; it is remembered, and 'points' and 'show'\n" +
	"tell of it until it is healed: by a backup that still has the bytes, or by 'holdfast repair'.\n" +
	"All packs read once are a pass. --read-data begins one; --resume goes on with it where it was stopped, and\n" +
	"--read-data-subset reads the next part of it, so that 5% a night have read all after 20.\n" +
	"--boot runs the points in QEMU, isolated, and waits for a sign of life. What was seen is kept with the point; 'show'\n" +
	"tells of it. A point that does not boot ends with exit code 4."

func verifyFlags() []cli.Flag {
	return append([]cli.Flag{
		&cli.BoolFlag{DisableDefaultText: true, Name: "read-data", Usage: "read and check every byte, not only that it is there"},
		&cli.StringFlag{Name: "read-data-subset", Usage: "read and check the next `PART` of all, such as 5% or 10G"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "resume", Usage: "read what a --read-data that was stopped has not read"},
		&cli.StringFlag{Name: "limit-rate", Usage: "read at most `SIZE` of stored data in a second, such as 50M"},
	}, verifyBootFlags()...)
}

// verifyOptions reads the command line. Every error is one of usage.
func (c *call) verifyOptions() (opt store.VerifyOptions, err error) {
	opt = store.VerifyOptions{ReadData: c.Bool("read-data"), Resume: c.Bool("resume")}
	part := c.String("read-data-subset")
	switch {
	case part != "" && opt.ReadData, part != "" && opt.Resume:
		return opt, usagef("verify: --read-data-subset stands alone, without --read-data and --resume")
	case (part != "" || opt.Resume) && len(c.args) > 0:
		return opt, usagef("verify: parts are read of all the repository, not of points")
	case part != "":
		var ok bool
		if opt.Share, ok = percentage(part); !ok {
			if opt.Bytes, err = byteSize(part); err != nil {
				return opt, usagef("verify: --read-data-subset %q is neither a percentage nor a size", part)
			}
		}
	}
	opt.ReadData = opt.ReadData || opt.Resume || part != ""
	if rate := c.String("limit-rate"); rate != "" {
		if opt.Rate, err = byteSize(rate); err != nil {
			return opt, usagef("verify: --limit-rate: %v", err)
		}
		if !opt.ReadData {
			return opt, usagef("verify: --limit-rate is for --read-data, --read-data-subset and --resume")
		}
	}
	return opt, nil
}

func checkVerify(c *call) error {
	if _, err := c.verifyOptions(); err != nil {
		return err
	}
	return c.checkVerifyBoot()
}

func runVerify(ctx context.Context, c *call) error {
	if c.Bool("boot") {
		return c.verifyBoot(ctx)
	}
	opt, err := c.verifyOptions()
	if err != nil {
		return err
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		for _, ref := range c.args {
			s, err := r.Find(ctx, ref)
			if err != nil {
				return err
			}
			opt.Points = append(opt.Points, s.ID)
		}
		t := c.progress.task("verify", "", -1)
		last := int64(0)
		opt.Progress = func(done, total int64) {
			t.setTotal(total)
			t.add(done - last)
			last = done
		}
		opt.Damage, opt.Now = c.showDamage, c.clock.now
		rep, err := r.Verify(ctx, opt)
		t.end(err)
		if err != nil {
			if p := rep.Pass; p != nil && ctx.Err() != nil {
				return withHint(err, "%s of %s are left to read: go on with 'holdfast verify --resume'", sizeText(p.Total-p.Checked), sizeText(p.Total))
			}
			return err
		}
		if err := c.out.object(struct {
			Type string `json:"type"`
			store.VerifyReport
		}{"verify", rep}); err != nil {
			return err
		}
		c.showPass(rep)
		how := "are there"
		if opt.ReadData {
			how = "were read and are right"
		}
		if opt.Share > 0 || opt.Bytes > 0 || opt.Resume {
			how = fmt.Sprintf("are there, and the %s that were read are right", sizeText(rep.Read))
		}
		if rep.Damaged == 0 {
			c.out.line("%d points, %d packs, %d chunks: all %s", rep.Points, rep.Packs, rep.Chunks, how)
			return nil
		}
		return withHint(fmt.Errorf("%w: %d findings", errDamageFound, rep.Damaged), "points that are not named are whole; the next backup of a VM stores again what it still has")
	})
}

// showPass says how much of the repository has been read since when.
func (c *call) showPass(rep store.VerifyReport) {
	p := rep.Pass
	switch {
	case p == nil:
	case p.Done:
		c.out.line("pass began %s: all of %s read", timeText(p.Began), sizeText(p.Total))
	default:
		last := "no pass before it came to its end"
		if !rep.Ended.IsZero() {
			last = "the one before ended " + timeText(rep.Ended)
		}
		c.out.line("pass began %s: %s of %s read; %s", timeText(p.Began), percentText(p.Checked, p.Total), sizeText(p.Total), last)
	}
}
