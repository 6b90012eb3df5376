package main

import (
	"context"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote"
)

// repairActions are what `holdfast repair` can be told to do.
func repairActions() []string { return []string{"index", "packs"} }

const repairHelp = "index  where chunks lie and which points there are, out of packs and manifests alone\n" +
	"packs  store again what damaged packs still hold, and remove them: torn ones, those with a damaged header or\n" +
	"       table, and those in which 'holdfast verify --read-data' has found damage. Of parts that cannot be read\n" +
	"       now, but perhaps later, the pack stays, unless --drop-unreadable is given.\n" +
	"--from REPO  store again what is damaged, out of another repository: a copy, or one with backups of the same\n" +
	"       VMs, of any chunk size. Its password comes from --from-password-file, HOLDFAST_FROM_PASSWORD_FILE,\n" +
	"       HOLDFAST_FROM_PASSWORD or a prompt. What is damaged 'holdfast verify --read-data' has to find first.\n" +
	"Damage of points that is left ends with exit code 4."

func repairFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{DisableDefaultText: true, Name: "dry-run", Usage: "packs: only say what would be done"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "drop-unreadable", Usage: "packs: remove also what may be read later"},
		&cli.StringFlag{Name: "from", TakesFile: true, Usage: "`REPO` that has what is damaged here"},
		&cli.StringFlag{Name: "from-password-file", EnvVars: []string{"HOLDFAST_FROM_PASSWORD_FILE"}, TakesFile: true,
			Usage: "`FILE` with its password"},
	}
}

// checkRepair refuses what nobody can repair.
func checkRepair(c *call) error {
	flags := c.Bool("dry-run") || c.Bool("drop-unreadable")
	switch from := c.String("from"); {
	case from != "" && len(c.args) > 0:
		return usagef("repair: --from stands alone, without %q", c.args[0])
	case from != "" && flags:
		return usagef("repair: --dry-run and --drop-unreadable are for packs")
	case from != "":
		return nil
	case len(c.args) == 0:
		return usagef("repair: what? index, packs, or --from REPO")
	case c.args[0] != "index" && c.args[0] != "packs":
		return usagef("repair: unknown part %q; it can be: index, packs", c.args[0])
	case c.args[0] == "index" && flags:
		return usagef("repair: --dry-run and --drop-unreadable are for packs")
	}
	return nil
}

func runRepair(ctx context.Context, c *call) error {
	switch {
	case c.String("from") != "":
		return c.repairFrom(ctx)
	case c.args[0] == "packs":
		return c.repairPacks(ctx)
	}
	return c.repairIndex(ctx)
}

// repairIndex makes the index anew. Opening the repository with it does all of the work.
func (c *call) repairIndex(ctx context.Context) error {
	began := time.Now()
	p := c.here()
	p.index = remote.NewIndex(c.repo)
	return c.withRepoIn(ctx, p, func(r *store.Repo) error {
		s, err := r.Stats(ctx)
		if err != nil {
			return err
		}
		seconds := time.Since(began).Seconds()
		c.out.line("index made anew: %d points, %d packs, %s, %.1f GiB/s", s.Points, s.Packs, sizeText(s.Stored), float64(s.Stored)/(1<<30)/seconds)
		return c.out.object(struct {
			Type     string  `json:"type"` // "repair"
			Part     string  `json:"part"`
			Duration float64 `json:"duration_s"`
			store.RepoStats
		}{"repair", "index", seconds, s})
	})
}

// repairPacks saves what damaged packs hold.
func (c *call) repairPacks(ctx context.Context) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		t := c.progress.task("repair packs", "", -1)
		last := int64(0)
		rep, err := r.RepairPacks(ctx, store.RepairPacksOptions{
			DryRun: c.Bool("dry-run"), DropUnreadable: c.Bool("drop-unreadable"), Damage: c.showDamage, Now: c.clock.now,
			Progress: func(done, total int64) {
				t.setTotal(total)
				t.add(done - last)
				last = done
			},
		})
		t.end(err)
		if err != nil {
			return err
		}
		if err := c.out.object(struct {
			Type string `json:"type"` // "repair"
			Part string `json:"part"`
			store.RepairPacksReport
		}{"repair", "packs", rep}); err != nil {
			return err
		}
		if rep.DryRun {
			c.out.line("%d damaged packs: %d records, %s, would be stored again, %d packs would stay; nothing was changed", rep.Damaged, rep.Records, sizeText(rep.Saved), rep.Kept)
		} else {
			c.out.line("%d damaged packs: %d records, %s, stored again, %d packs removed", rep.Damaged, rep.Records, sizeText(rep.Saved), rep.Removed)
		}
		if rep.Pages > 0 {
			c.out.line("%d pages of chunk maps were restored from the index", rep.Pages)
		}
		if rep.Kept > 0 && !rep.DryRun {
			c.progress.note("%d packs stay: they may hold more, which cannot be read now; try again, or use --drop-unreadable", rep.Kept)
		}
		if rep.Lost > 0 {
			return withHint(fmt.Errorf("%w: %d places of restore points are lost", errDamageFound, rep.Lost), lostHint)
		}
		return nil
	})
}

const lostHint = "the next backup of a VM stores again what it still has; 'holdfast repair --from REPO' takes it from a copy"

// repairFrom heals out of another repository.
func (c *call) repairFrom(ctx context.Context) error {
	from := c.String("from")
	if same(c.repo, from) {
		return usagef("repair: %s and %s are the same repository", c.repo, from)
	}
	if _, err := openBucket(from); err != nil { // before a password is asked for
		return err
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		return c.withRepoIn(ctx, place{dir: from, password: c.fromPassword}, func(other *store.Repo) error { return c.heal(ctx, r, other) })
	})
}

func (c *call) heal(ctx context.Context, r, other *store.Repo) error {
	t := c.progress.task("repair", "", -1)
	last := 0
	rep, err := backup.Heal(ctx, r, other, backup.HealOptions{Damage: c.showDamage, Now: c.clock.now, Progress: func(done, total int) {
		size := int64(r.ChunkSize())
		if done < last { // another round
			last = 0
		}
		t.setTotal(int64(total) * size)
		t.add(int64(done-last) * size)
		last = done
	}})
	t.end(err)
	if err != nil {
		return err
	}
	if err := c.out.object(struct {
		Type string `json:"type"` // "repair"
		Part string `json:"part"` // "from"
		backup.HealReport
	}{"repair", "from", rep}); err != nil {
		return err
	}
	c.out.line("%d chunks, %d pages of chunk maps and %d manifests healed", rep.Chunks, rep.Pages, rep.Manifests)
	if rep == (backup.HealReport{}) {
		c.progress.note("nothing is known to be damaged; 'holdfast verify --read-data' looks for it")
	}
	if rep.Left > 0 {
		return withHint(fmt.Errorf("%w: %d places stay damaged", errDamageFound, rep.Left), "another repository may have them; the next backup of a VM stores again what it still has")
	}
	return nil
}
