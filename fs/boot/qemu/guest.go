package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/fs/boot"
)

// guest is a VM in QEMU.
type guest struct {
	monitor *monitor
	agent   string        // socket
	ended   chan struct{} // closed when the process is gone
}

var _ boot.Guest = (*guest)(nil)

func (g *guest) Done() <-chan struct{} { return g.ended }

func (g *guest) Close() error { return g.monitor.conn.Close() }

// Pause halts the processors; QEMU then waits for all requests to the disks and flushes them.
func (g *guest) Pause(ctx context.Context) error  { return g.monitor.do(ctx, "stop", nil, nil) }
func (g *guest) Resume(ctx context.Context) error { return g.monitor.do(ctx, "cont", nil, nil) }

// Stop presses the power button and waits, then ends the process. QEMU flushes the disks when it quits.
func (g *guest) Stop(ctx context.Context, patience time.Duration) error {
	if patience > 0 {
		err := g.monitor.do(ctx, "system_powerdown", nil, nil)
		if errors.Is(err, boot.ErrGone) {
			return g.wait(ctx, time.Minute)
		}
		if err == nil && g.wait(ctx, patience) == nil {
			return nil
		}
	}
	if err := g.monitor.do(ctx, "quit", nil, nil); err != nil && !errors.Is(err, boot.ErrGone) {
		return err
	}
	return g.wait(ctx, time.Minute)
}

func (g *guest) wait(ctx context.Context, limit time.Duration) error {
	select {
	case <-g.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(limit):
		return errors.New("qemu: the VM does not end")
	}
}

// Screenshot has QEMU write a file, which only this user can read.
func (g *guest) Screenshot(ctx context.Context, w io.Writer) error {
	dir, err := os.MkdirTemp("", "holdfast-screen-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "screen.png")
	if err := g.monitor.do(ctx, "screendump", object{"filename": name, "format": "png"}, nil); err != nil {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// Migrate mirrors a disk to a file and then takes that in its place.
func (g *guest) Migrate(ctx context.Context, disk, file string, progress func(done, total int64)) error {
	events, forget := g.monitor.watch()
	defer forget()
	target, job := disk+"-file", "move-"+disk
	size, err := g.diskSize(ctx, disk)
	if err != nil {
		return err
	}
	if err := makeFile(file, size); err != nil {
		return err
	}
	if err := g.monitor.do(ctx, "blockdev-add", object{"driver": "raw", "node-name": target, "discard": "unmap",
		"file": object{"driver": "file", "filename": file, "discard": "unmap"}}, nil); err != nil {
		return err
	}
	err = g.monitor.do(ctx, "blockdev-mirror", object{"job-id": job, "device": disk, "target": target, "sync": "full",
		"copy-mode": "write-blocking", "auto-dismiss": true}, nil)
	if err == nil {
		err = g.follow(ctx, events, job, progress)
	}
	clean := context.WithoutCancel(ctx)
	switch {
	case err == nil: // the VM lets go of where the disk was
		g.monitor.do(clean, "blockdev-del", object{"node-name": disk}, nil)
	case !errors.Is(err, boot.ErrGone): // the VM stays where it was
		g.monitor.do(clean, "job-cancel", object{"id": job}, nil)
		g.monitor.do(clean, "blockdev-del", object{"node-name": target}, nil)
		err = errors.Join(err, os.Remove(file))
	}
	return err
}

// makeFile makes a sparse file for a disk.
func makeFile(file string, size int64) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func (g *guest) diskSize(ctx context.Context, disk string) (int64, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := g.monitor.do(ctx, "query-named-block-nodes", object{"flat": true}, &nodes); err != nil {
		return 0, err
	}
	for _, n := range nodes {
		if n.Name == disk {
			return n.Image.Size, nil
		}
	}
	return 0, fmt.Errorf("qemu: no disk %q", disk)
}

// follow waits until a mirror has caught up, and completes it.
func (g *guest) follow(ctx context.Context, events chan qmpEvent, job string, progress func(done, total int64)) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case e := <-events:
			var d struct {
				Device string `json:"device"`
				Error  string `json:"error"`
			}
			if json.Unmarshal(e.Data, &d) != nil || d.Device != job {
				continue
			}
			switch e.Event {
			case "BLOCK_JOB_READY":
				if err := g.monitor.do(ctx, "job-complete", object{"id": job}, nil); err != nil {
					return err
				}
			case "BLOCK_JOB_COMPLETED":
				if d.Error != "" {
					return fmt.Errorf("qemu: mirror: %s", d.Error)
				}
				return nil
			case "BLOCK_JOB_CANCELLED":
				return errors.New("qemu: mirror: cancelled")
			}
		case <-tick.C:
			if err := g.tell(ctx, job, progress); err != nil {
				return err
			}
		case <-g.ended:
			return boot.ErrGone
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *guest) tell(ctx context.Context, job string, progress func(done, total int64)) error {
	var jobs []struct {
		Device string `json:"device"`
		Done   int64  `json:"offset"`
		Total  int64  `json:"len"`
	}
	if err := g.monitor.do(ctx, "query-block-jobs", nil, &jobs); err != nil {
		return err
	}
	for _, j := range jobs {
		if j.Device == job && progress != nil {
			progress(j.Done, j.Total)
		}
	}
	return nil
}
