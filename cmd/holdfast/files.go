package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/store"
)

// listed is one line of `ls --json`.
type listed struct {
	Type string    `json:"type"` // "dir", "file" or "link"
	Path string    `json:"path"`
	Size int64     `json:"bytes"`
	Time time.Time `json:"time"`
	To   string    `json:"to,omitempty"` // where a link leads
}

var kindNames = map[fs.Kind]string{fs.KindDir: "dir", fs.KindFile: "file", fs.KindLink: "link"}

func runLs(ctx context.Context, c *call) error {
	where := ""
	if len(c.args) == 1 {
		where = path.Clean("/" + c.args[0])[1:]
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		n, err := fs.New(r).Walk(ctx, where)
		if err != nil {
			return err
		}
		d, ok := n.(fs.Dir)
		if !ok {
			l, err := describe(ctx, n, where)
			if err != nil {
				return err
			}
			return c.printListed([]listed{l}, "")
		}
		entries, err := d.Entries(ctx)
		if err != nil {
			return err
		}
		list := make([]listed, 0, len(entries))
		for _, e := range entries {
			l := listed{Type: kindNames[e.Kind], Path: path.Join(where, e.Name)}
			if c.Bool("long") || c.json {
				child, err := d.Lookup(ctx, e.Name)
				if err != nil {
					return err
				}
				if l, err = describe(ctx, child, l.Path); err != nil {
					return err
				}
			}
			list = append(list, l)
		}
		return c.printListed(list, where)
	})
}

func describe(ctx context.Context, n fs.Node, p string) (listed, error) {
	a, err := n.Attr(ctx)
	if err != nil {
		return listed{}, err
	}
	l := listed{Type: kindNames[a.Kind], Path: p, Size: a.Size, Time: a.Time}
	if link, ok := n.(fs.Link); ok {
		l.To, err = link.Target(ctx)
	}
	return l, err
}

// printListed prints names, below where, as ls does.
func (c *call) printListed(list []listed, where string) error {
	t := newTable("", ">", "", "")
	for _, l := range list {
		name := l.Path
		if where != "" {
			name = l.Path[len(where)+1:]
		}
		switch {
		case l.Type == "dir":
			name += "/"
		case l.To != "":
			name += " -> " + l.To
		}
		if c.Bool("long") {
			t.row(l.Type, fmt.Sprint(l.Size), timeText(l.Time), name)
		} else {
			c.out.line("%s", name)
		}
		if err := c.out.object(l); err != nil {
			return err
		}
	}
	c.out.table(t)
	return nil
}

func runCp(ctx context.Context, c *call) error {
	sources, dest := c.args[:len(c.args)-1], c.args[len(c.args)-1]
	return c.withRepo(ctx, func(r *store.Repo) error {
		tree := fs.New(r)
		defer tree.Close()
		st, err := os.Stat(dest)
		into := err == nil && st.IsDir()
		if len(sources) > 1 && !into {
			return usagef("cp: %s is not a directory", dest)
		}
		for _, p := range sources {
			n, err := tree.Walk(ctx, p)
			if err != nil {
				return err
			}
			to := dest
			if into {
				to = filepath.Join(dest, path.Base(path.Clean("/"+p)))
			}
			if err := c.copyOut(ctx, n, to); err != nil {
				return err
			}
		}
		return nil
	})
}

// copyOut copies a file, or a directory with all in it. Links become what they
// lead to; nothing is overwritten.
func (c *call) copyOut(ctx context.Context, n fs.Node, to string) error {
	switch n := n.(type) {
	case fs.File:
		release, err := n.Hold(ctx)
		if err != nil {
			return err
		}
		defer release()
		img, err := n.Image(ctx)
		if err != nil {
			return err
		}
		t := c.progress.task(to, "", img.Size())
		err = backup.RestoreFile(ctx, img, to, t.add)
		t.end(err)
		if err != nil {
			return err
		}
		return c.out.object(struct {
			Type string `json:"type"`
			File string `json:"file"`
			Size int64  `json:"bytes"`
		}{"copied", to, img.Size()})
	case fs.Dir:
		if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		entries, err := n.Entries(ctx)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Kind == fs.KindLink {
				continue
			}
			child, err := n.Lookup(ctx, e.Name)
			if err != nil {
				return err
			}
			if err := c.copyOut(ctx, child, filepath.Join(to, e.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}
