package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/term"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/extract"
	"github.com/holdfast-backup/holdfast/store"
)

// checkCp refuses flags that contradict each other.
func checkCp(c *call) error {
	tar, zip, stream := c.Bool("tar"), c.Bool("zip"), c.args[len(c.args)-1] == "-"
	switch {
	case tar && zip:
		return usagef("cp: --tar and --zip exclude each other")
	case stream && !tar && !zip:
		return usagef("cp: - needs --tar or --zip")
	case !stream && (tar || zip):
		return withHint(usagef("cp: an archive is written to standard output, not to %s", c.args[len(c.args)-1]), "holdfast cp PATH... - --tar > FILE")
	case stream && c.Bool("json"):
		return usagef("cp: --json and - exclude each other: both write to standard output")
	}
	if f, ok := c.stdout.(*os.File); stream && ok && term.IsTerminal(int(f.Fd())) {
		return withHint(usagef("cp: an archive is nothing for a terminal"), "holdfast cp PATH... - --tar > FILE")
	}
	return nil
}

func runCp(ctx context.Context, c *call) error {
	sources, dest := c.args[:len(c.args)-1], c.args[len(c.args)-1]
	return c.withRepo(ctx, func(r *store.Repo) error {
		tree, err := c.tree(r)
		if err != nil {
			return err
		}
		defer tree.Close()
		if dest == "-" {
			return c.cpStream(ctx, tree, sources)
		}
		st, err := os.Stat(dest)
		// A folder that was copied to a new name, and stopped, goes on under that.
		into := err == nil && st.IsDir() && (len(sources) > 1 || !extract.Unfinished(dest))
		if len(sources) > 1 && !into {
			return usagef("cp: %s is not a directory", dest)
		}
		dir := dest
		if !into {
			dir = filepath.Dir(filepath.Clean(dest))
		}
		var ofGuest []extract.Source
		for _, p := range sources {
			n, err := tree.Walk(ctx, p)
			if err != nil {
				return err
			}
			to := dest
			if into {
				to = filepath.Join(dest, path.Base(path.Clean("/"+p)))
			}
			if fs.OfGuest(n) {
				ofGuest = append(ofGuest, extract.Source{Name: filepath.Base(to), Node: n})
			} else if err := c.copyOut(ctx, n, to); err != nil {
				return err
			}
		}
		if len(ofGuest) == 0 {
			return nil
		}
		return c.extract(ofGuest, dir, func(opt extract.Options) (extract.Result, error) {
			opt.Mark = !into
			return extract.ToDir(ctx, dir, ofGuest, opt)
		})
	})
}

// cpStream writes an archive to standard output.
func (c *call) cpStream(ctx context.Context, tree *fs.Tree, sources []string) error {
	write := extract.Tar
	if c.Bool("zip") {
		write = extract.Zip
	}
	var list []extract.Source
	for _, p := range sources {
		n, err := tree.Walk(ctx, p)
		if err != nil {
			return err
		}
		name := path.Base(path.Clean("/" + p))
		if name == "/" {
			name = "holdfast"
		}
		list = append(list, extract.Source{Name: name, Node: n})
	}
	return c.extract(list, "", func(opt extract.Options) (extract.Result, error) {
		// The disks of a point hold what is below files/.
		opt.Skip = func(dir fs.Dir, name string) bool {
			if name != "files" || fs.OfGuest(dir) {
				return false
			}
			n, err := dir.Lookup(ctx, name)
			return err == nil && fs.OfGuest(n)
		}
		return write(ctx, c.stdout, list, opt)
	})
}

// copiedItem is a line of `cp --json`.
type copiedItem struct {
	Type  string `json:"type"` // "copied" or "failed"
	File  string `json:"file"`
	Hex   string `json:"file_hex,omitempty"` // when the name is not UTF-8
	Kind  string `json:"kind,omitempty"`
	Size  int64  `json:"bytes"`
	There bool   `json:"there,omitempty"` // it was there already
	Error string `json:"error,omitempty"`
}

// copiedSummary is the last object of `cp --json` of what is below files/.
type copiedSummary struct {
	Type      string   `json:"type"` // "summary"
	Files     int64    `json:"files"`
	Dirs      int64    `json:"dirs"`
	Links     int64    `json:"links"`
	HardLinks int64    `json:"hard_links"`
	Specials  int64    `json:"specials"`
	Bytes     int64    `json:"bytes"`
	There     int64    `json:"there"`
	Failed    int64    `json:"failed"`
	Damaged   int64    `json:"damaged"`
	Duration  float64  `json:"duration_s"`
	Warnings  []string `json:"warnings"`
}

// extract runs a copy into dir, or into an archive when that is "", and says what became of it.
func (c *call) extract(sources []extract.Source, dir string, run func(extract.Options) (extract.Result, error)) error {
	seen := map[string]bool{}
	for _, s := range sources {
		if seen[s.Name] {
			return usagef("cp: two of these would be called %s", quoteName(s.Name))
		}
		seen[s.Name] = true
	}
	name := sources[0].Name
	if len(sources) > 1 {
		name = fmt.Sprintf("%d paths", len(sources))
	}
	began := c.clock.now()
	t := c.progress.task(quoteName(filepath.Join(dir, name)), "", -1)
	var printed error
	r, err := run(extract.Options{
		Done: t.add, Walked: t.setTotal,
		Report: func(i extract.Item) {
			t.file()
			file := i.Path
			if dir != "" {
				file = filepath.Join(dir, i.Path)
			}
			o := copiedItem{Type: "copied", File: file, Hex: hexUnlessUTF8(file), Kind: kindNames[i.Kind], Size: i.Size, There: i.There}
			if i.Err != nil {
				o.Type, o.Error, o.Kind = "failed", i.Err.Error(), ""
				what := "left out"
				if i.Kept {
					what = "incomplete"
				}
				c.progress.warn("%s: %s: %v", quoteName(file), what, i.Err)
			}
			if perr := c.out.object(o); printed == nil {
				printed = perr
			}
		},
	})
	for _, what := range slices.Sorted(maps.Keys(r.Lost)) {
		c.progress.warn("the copy lacks, as its place cannot hold it: %s (of %d)", what, r.Lost[what])
	}
	t.end(err)
	if r.Things() > 0 {
		c.progress.note("%s", copiedText(r))
	}
	sum := copiedSummary{"summary", r.Files, r.Dirs, r.Symlinks, r.HardLinks, r.Specials, r.Bytes, r.There, r.Failed, r.Damaged,
		c.clock.now().Sub(began).Round(time.Millisecond).Seconds(), append([]string{}, c.progress.warned()...)}
	if perr := c.out.object(sum); printed == nil {
		printed = perr
	}
	switch {
	case err != nil:
		return err
	case r.Damaged > 0:
		return fmt.Errorf("%w: %d left out, %d of them damaged", errDamageFound, r.Failed, r.Damaged)
	case r.Failed == 1 && r.Things() == 0:
		return fmt.Errorf("nothing was copied: %w", r.First)
	case r.Failed > 0:
		return fmt.Errorf("%w: %d left out", errPartlyDone, r.Failed)
	}
	return printed
}

// copiedText sums a copy up for people.
func copiedText(r extract.Result) string {
	text := fmt.Sprintf("%d files, %d directories, %d links", r.Files, r.Dirs, r.Symlinks+r.HardLinks)
	if r.Specials > 0 {
		text += fmt.Sprintf(", %d devices and the like", r.Specials)
	}
	text += ", " + sizeText(r.Bytes)
	if r.There > 0 {
		text += fmt.Sprintf("; of these %d were there already", r.There)
	}
	return text
}

// copyOut copies a file, or a directory with all in it. Links become what they
// lead to; nothing is overwritten. What is below files/ is not for here.
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
			if fs.OfGuest(child) {
				continue // the disks hold it
			}
			if err := c.copyOut(ctx, child, filepath.Join(to, e.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}
