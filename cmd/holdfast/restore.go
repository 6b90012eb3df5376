package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/store"
)

// restored is one disk in the result of a restore.
type restored struct {
	Disk    string `json:"disk"`
	File    string `json:"file"`
	Size    int64  `json:"bytes_total"`
	Written *int64 `json:"bytes_written,omitempty"` // with --onto
}

// restoreResult is the object of `restore --json`.
type restoreResult struct {
	Type     string        `json:"type"` // "restore"
	ID       store.PointID `json:"id"`
	VM       string        `json:"vm"`
	Name     string        `json:"name"`
	Disks    []restored    `json:"disks"`
	Duration float64       `json:"duration_s"`
}

func runRestore(ctx context.Context, c *call) error {
	began := time.Now()
	return c.withRepo(ctx, func(r *store.Repo) error {
		s, err := r.Find(ctx, c.args[0])
		if err != nil {
			return err
		}
		p, release, err := r.Hold(ctx, s.ID)
		if err != nil {
			return err
		}
		defer release()
		if name, ok := c.platformOf(c.String("to")); ok {
			return c.restoreToPlatform(ctx, r, p, name)
		}
		disks, err := c.chosenDisks(p)
		if err != nil {
			return err
		}
		res := restoreResult{Type: "restore", ID: p.ID, VM: p.VM.Name, Name: p.Name}
		if onto := c.String("onto"); onto != "" {
			res.Disks, err = c.restoreOnto(ctx, r, p, disks[0].Name, onto)
		} else {
			res.Disks, err = c.restoreTo(ctx, r, p, disks, c.String("to"), c.String("format"))
		}
		if err != nil {
			return err
		}
		res.Duration = time.Since(began).Seconds()
		for _, d := range res.Disks {
			if d.Written != nil {
				c.out.line("%s: %s of %s differed and were written", d.File, sizeText(*d.Written), sizeText(d.Size))
			} else {
				c.out.line("%s: %s", d.File, sizeText(d.Size))
			}
		}
		return c.out.object(res)
	})
}

// chosenDisks are the disks of a point that --disk names, or all.
func (c *call) chosenDisks(p *store.Point) ([]store.Disk, error) {
	want := c.String("disk")
	if want == "" {
		return p.Disks, nil
	}
	for i := range p.Disks {
		if p.Disks[i].Name == want {
			return p.Disks[i : i+1], nil
		}
	}
	return nil, withHint(fmt.Errorf("%s has no disk %q: %w", p.Path(), want, store.ErrNotExist), "'holdfast show %s' lists its disks", p.Path())
}

// restoreTo writes each disk to a new file. All of them are checked to be new
// before the first is written.
func (c *call) restoreTo(ctx context.Context, r *store.Repo, p *store.Point, disks []store.Disk, dir, format string) ([]restored, error) {
	var out []restored
	for _, d := range disks {
		file := filepath.Join(dir, d.Name+"."+fileEnding(format))
		if _, err := os.Lstat(file); err == nil {
			return nil, fmt.Errorf("%s: %w", file, backup.ErrTargetExists)
		}
		out = append(out, restored{Disk: d.Name, File: file, Size: d.Size})
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for i, d := range disks {
		if err := c.restoreDisk(ctx, r, p, d, out[i].File, format); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// formatStream is the one format that is written from beginning to end.
const formatStream = "vmdk-stream"

func fileEnding(format string) string {
	if format == formatStream {
		return "vmdk"
	}
	return format
}

// restoreDisk writes one disk to a new file.
func (c *call) restoreDisk(ctx context.Context, r *store.Repo, p *store.Point, d store.Disk, file, format string) (err error) {
	if format == formatStream {
		t := c.progress.task(p.VM.Name+"/"+d.Name, "", d.Size)
		err = backup.RestoreStream(file, func(w io.Writer) error {
			return fs.WriteVMDKStream(ctx, w, r, p, d.Name, filepath.Base(file), t.add)
		})
		t.end(err)
		return err
	}
	img, err := fs.Format(r, p, d.Name, format)
	if err != nil {
		return fmt.Errorf("%s %s as %s: %w", p.Path(), d.Name, format, err)
	}
	t := c.progress.task(p.VM.Name+"/"+d.Name, "", img.Size())
	err = backup.RestoreFile(ctx, img, file, t.add)
	t.end(err)
	return err
}

// restoreOnto makes an existing file or device equal to a disk.
func (c *call) restoreOnto(ctx context.Context, r *store.Repo, p *store.Point, disk, file string) ([]restored, error) {
	img, err := r.OpenDisk(p, disk)
	if err != nil {
		return nil, err
	}
	t := c.progress.task(p.VM.Name+"/"+disk, "", img.Size())
	n, err := backup.RestoreOnto(ctx, img, file, func() backup.ChunkNamer { return img.Comparer() }, t.add)
	t.end(err)
	return []restored{{Disk: disk, File: file, Size: img.Size(), Written: &n}}, err
}
