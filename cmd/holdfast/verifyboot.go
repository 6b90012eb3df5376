package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/fs/boot/qemu"
	"github.com/holdfast-backup/holdfast/store"
)

// vmConfig is what the config file says of a VM, for its backups and boots; empty where it says nothing.
type vmConfig struct {
	exclude                                  string
	sign, bus, firmware, memory, cpus, limit string
}

// machineFlags are the flags that say how a VM is made.
func machineFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "memory", Usage: "`SIZE` of its memory, such as 4G; as the VM had, or 2G"},
		&cli.StringFlag{Name: "cpus", Usage: "`NUMBER` of its processors; as the VM had, or 2"},
		newChoiceFlag("firmware", "`KIND` of firmware", "auto", "bios", "uefi"),
		newChoiceFlag("bus", "`BUS` of its disks, auto as the VM had, or sata", "auto", "sata", "ide", "nvme", "virtio", "virtio-scsi", "pvscsi", "lsisas"),
	}
}

func verifyBootFlags() []cli.Flag {
	return append([]cli.Flag{
		&cli.BoolFlag{DisableDefaultText: true, Name: "boot", Usage: "boot the points, without a network, and wait for a sign of life"},
		&cli.StringFlag{Name: "sign", Usage: "the `SIGN` to wait for: auto (agent, or a login on the serial line), agent, serial:REGEXP, screen[:30s] (it has changed and is still)"},
		&cli.DurationFlag{Name: "boot-limit", Value: 10 * time.Minute, Usage: "`TIME` until a point that gives no sign has failed"},
		&cli.StringFlag{Name: "boots", EnvVars: []string{"HOLDFAST_BOOTS"}, TakesFile: true, Usage: "`DIR` where boots are kept, with what the VMs write"},
	}, machineFlags()...)
}

// checkVerifyBoot refuses flags that make no sense together.
func (c *call) checkVerifyBoot() error {
	if !c.Bool("boot") {
		for _, name := range []string{"sign", "boot-limit", "memory", "cpus", "firmware", "bus"} {
			if c.IsSet(name) {
				return usagef("verify: --%s goes with --boot", name)
			}
		}
		return nil
	}
	if len(c.args) == 0 {
		return withHint(usagef("verify: --boot: which points?"), "name them, such as VM/latest")
	}
	for _, name := range []string{"read-data", "read-data-subset", "resume", "limit-rate"} {
		if c.IsSet(name) {
			return usagef("verify: --boot and --%s exclude each other", name)
		}
	}
	if _, err := boot.ParseSign(c.String("sign")); err != nil {
		return usagef("verify: --sign: %v", err)
	}
	_, err := c.bootMemory("")
	return err
}

// bootProof is the object of `verify --boot --json`, and what show says.
type bootProof struct {
	Type  string        `json:"type,omitempty"` // "boot proof"
	Point store.PointID `json:"point"`
	Path  string        `json:"path,omitempty"`
	Time  time.Time     `json:"time"`
	OK    bool          `json:"ok"`
	Sign  string        `json:"sign,omitempty"`
	Why   string        `json:"why,omitempty"`
	Took  float64       `json:"took_s"`
}

func proofText(p *boot.Proof) string {
	if p.OK {
		return fmt.Sprintf("boots, seen %s: %s after %.0f s", timeText(p.Time), p.Sign, p.Took)
	}
	return fmt.Sprintf("DOES NOT BOOT, seen %s: %s", timeText(p.Time), p.Why)
}

// verifyBoot boots points one after the other.
func (c *call) verifyBoot(ctx context.Context) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		var points []store.Summary
		for _, ref := range c.args {
			s, err := r.Find(ctx, ref)
			if err != nil {
				return err
			}
			points = append(points, s)
		}
		failed := 0
		for i := range points {
			p, err := c.proveBoot(ctx, r, &points[i])
			if err != nil {
				return fmt.Errorf("boot %s: %w", points[i].Path(), err)
			}
			if !p.OK {
				failed++
			}
			c.out.line("%s: %s", points[i].Path(), proofText(p))
			if err := c.out.object(bootProof{"boot proof", p.Point, points[i].Path(), p.Time, p.OK, p.Sign, p.Why, p.Took}); err != nil {
				return err
			}
			if err := boot.SaveProof(ctx, r, p); err != nil {
				c.progress.warn("the proof is not kept: %v", err)
			}
		}
		if err := boot.SweepProofs(ctx, r); err != nil {
			c.progress.detail("old proofs stay: %v", err)
		}
		if failed > 0 {
			return withHint(fmt.Errorf("%w: %d of %d points do not boot", errDamageFound, failed, len(points)),
				"'holdfast show POINT --proof DIR' writes what was on the screen and the serial line; is --bus one that the VM has a driver for?")
		}
		return nil
	})
}

func (c *call) proveBoot(ctx context.Context, r *store.Repo, sum *store.Summary) (*boot.Proof, error) {
	root, err := c.bootsDir()
	if err != nil {
		return nil, err
	}
	text := c.String("sign")
	if text == "" {
		text = c.cfg.vms[sum.VM].sign
	}
	sign, err := boot.ParseSign(text)
	if err != nil {
		return nil, err
	}
	limit := c.Duration("boot-limit")
	if set := c.cfg.vms[sum.VM].limit; set != "" && !c.IsSet("boot-limit") {
		if limit, err = time.ParseDuration(set); err != nil {
			return nil, err
		}
	}
	host := &qemu.Host{}
	opt, err := c.machineOf(ctx, r, sum.ID, host)
	if err != nil {
		return nil, err
	}
	opt.Name, opt.Host, opt.Temporary = "", "qemu", true
	s, err := boot.Create(ctx, root, r, sum.ID, opt)
	if err != nil {
		return nil, err
	}
	t := c.progress.task("boot "+sum.Path(), "", -1)
	p, err := s.Prove(ctx, host, sign, limit)
	t.end(err)
	return p, errors.Join(err, s.Close(), s.Remove())
}

// saveProof writes what was seen of a point to files.
func (c *call) saveProof(p *boot.Proof, dir string) error {
	if p == nil {
		return fmt.Errorf("the point was never booted by 'holdfast verify --boot'")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, b := range map[string][]byte{"screen.png": p.Screen, "serial.log": p.Serial} {
		if len(b) == 0 {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}
