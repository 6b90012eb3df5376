package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/store"
)

// listed is one line of `ls --json`.
type listed struct {
	Type string    `json:"type"` // one of kindNames
	Path string    `json:"path"`
	Hex  string    `json:"path_hex,omitempty"` // when the path is not UTF-8
	Size int64     `json:"bytes"`
	Time time.Time `json:"time"`
	To   string    `json:"to,omitempty"` // where a link leads
	// ToHex is set when that is not UTF-8.
	ToHex string `json:"to_hex,omitempty"`
	*guestListed
	Error string `json:"error,omitempty"` // why there is no more to say

	name string // the last component
}

// guestListed is what there is to say of a guest's file besides.
type guestListed struct {
	Mode        uint32 `json:"mode"`        // the lower 12 bits
	Permissions string `json:"permissions"` // all of it, as in "drwxr-xr-x"
	UID         uint32 `json:"uid"`
	GID         uint32 `json:"gid"`
	Nlink       uint32 `json:"nlink"`
	Inode       uint64 `json:"inode"` // as a mount shows it
	Allocated   int64  `json:"bytes_allocated"`
	// Device is "MAJOR:MINOR" of a device.
	Device string     `json:"device,omitempty"`
	Atime  *time.Time `json:"atime,omitempty"`
	Ctime  *time.Time `json:"ctime,omitempty"`
	Btime  *time.Time `json:"btime,omitempty"`
}

var kindNames = map[fs.Kind]string{
	fs.KindDir: "dir", fs.KindFile: "file", fs.KindLink: "link",
	fs.KindChar: "char", fs.KindBlock: "block", fs.KindFIFO: "fifo", fs.KindSocket: "socket",
}

func runLs(ctx context.Context, c *call) error {
	arg, where := "", ""
	if len(c.args) == 1 {
		arg, where = c.args[0], path.Clean("/" + c.args[0])[1:]
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		tree, err := c.tree(r)
		if err != nil {
			return err
		}
		n, err := tree.Walk(ctx, arg)
		if err != nil {
			return err
		}
		p := c.lsPrinter(fs.OfGuest(n))
		d, ok := n.(fs.Dir)
		if !ok {
			l, err := describe(ctx, n, listed{Path: where, name: where})
			if err != nil {
				return err
			}
			if err := p.print(l); err != nil {
				return err
			}
			p.flush()
			return nil
		}
		return c.list(ctx, p, d, where)
	})
}

// list prints a directory.
func (c *call) list(ctx context.Context, p *lsPrinter, d fs.Dir, where string) error {
	prefix := where + "/"
	if where == "" {
		prefix = ""
	}
	damaged := 0
	for e, err := range entriesOf(ctx, d) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			p.flush()
			return err
		}
		l := listed{Type: kindNames[e.Kind], Path: prefix + e.Name, name: e.Name}
		if c.Bool("long") || c.json {
			child, err := d.Lookup(ctx, e.Name)
			if err == nil {
				l, err = describe(ctx, child, l)
			}
			if err != nil {
				if !fs.OfGuest(d) || ctx.Err() != nil {
					return err
				}
				// The others can be listed all the same.
				damaged++
				l.Error = err.Error()
				c.progress.warn("%s: %v", quoteName(l.Path), err)
			}
		}
		if err := p.print(l); err != nil {
			return err
		}
	}
	p.flush()
	if damaged > 0 {
		return fmt.Errorf("%w: %d entries", errDamageFound, damaged)
	}
	return nil
}

// maxSorted is up to how many entries a guest's directory is listed in order. More come as they are, so that memory is bounded.
const maxSorted = 100_000

// entriesOf lists a directory, in order unless it is very large.
func entriesOf(ctx context.Context, d fs.Dir) iter.Seq2[fs.Entry, error] {
	return func(yield func(fs.Entry, error) bool) {
		l, ok := d.(fs.Lister)
		if !ok {
			list, err := d.Entries(ctx)
			for _, e := range list {
				if !yield(e, nil) {
					return
				}
			}
			if err != nil {
				yield(fs.Entry{}, err)
			}
			return
		}
		var held []fs.Entry
		giveHeld := func() bool {
			slices.SortFunc(held, func(a, b fs.Entry) int { return cmp.Compare(a.Name, b.Name) })
			for _, e := range held {
				if !yield(e, nil) {
					return false
				}
			}
			held = nil
			return true
		}
		for e, err := range l.List(ctx) {
			if err != nil {
				if giveHeld() {
					yield(e, err)
				}
				return
			}
			if held = append(held, e); len(held) >= maxSorted && !giveHeld() {
				return
			}
		}
		giveHeld()
	}
}

// describe adds what is known of a node.
func describe(ctx context.Context, n fs.Node, l listed) (listed, error) {
	a, err := n.Attr(ctx)
	if err != nil {
		return l, err
	}
	l.Type, l.Hex, l.Size, l.Time = kindNames[a.Kind], hexUnlessUTF8(l.Path), a.Size, a.Time
	if g := a.Guest; g != nil {
		l.guestListed = &guestListed{
			Mode: g.Mode & 0o7777, Permissions: permissions(g.Mode), UID: g.UID, GID: g.GID, Nlink: g.Nlink, Inode: a.Inode,
			Allocated: g.Allocated, Atime: known(g.Atime), Ctime: known(g.Ctime), Btime: known(g.Btime),
		}
		if a.Kind == fs.KindChar || a.Kind == fs.KindBlock {
			l.Device = fmt.Sprintf("%d:%d", g.Major, g.Minor)
		}
	}
	if link, ok := n.(fs.Link); ok {
		l.To, err = link.Target(ctx)
		l.ToHex = hexUnlessUTF8(l.To)
	}
	return l, err
}

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// hexUnlessUTF8 gives bytes for which JSON has no words in digits; "" for others.
func hexUnlessUTF8(s string) string {
	if utf8.ValidString(s) {
		return ""
	}
	return hex.EncodeToString([]byte(s))
}

// typeLetters are those of ls(1).
var typeLetters = map[uint32]byte{
	guest.ModeDir: 'd', guest.ModeRegular: '-', guest.ModeLink: 'l', guest.ModeChar: 'c', guest.ModeBlock: 'b', guest.ModeFIFO: 'p', guest.ModeSocket: 's',
}

// permissions is a mode as ls shows it.
func permissions(mode uint32) string {
	b := []byte("?rwxrwxrwx")
	if t, ok := typeLetters[mode&guest.ModeType]; ok {
		b[0] = t
	}
	for i := range 9 {
		if mode&(0o400>>i) == 0 {
			b[1+i] = '-'
		}
	}
	for i, special := range []struct {
		bit         uint32
		with, alone byte
	}{{0o4000, 's', 'S'}, {0o2000, 's', 'S'}, {0o1000, 't', 'T'}} {
		if at := 3 + 3*i; mode&special.bit != 0 {
			if b[at] == 'x' {
				b[at] = special.with
			} else {
				b[at] = special.alone
			}
		}
	}
	return string(b)
}

// quoteName makes a name or path fit for a line of text: as a shell takes it, $'…' with escapes, when there is in it what is not
// printable or not UTF-8.
func quoteName(s string) string {
	plain := true
	for i, r := range s {
		if bad := r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD"); bad || !unicode.IsPrint(r) {
			plain = false
			break
		}
	}
	if plain {
		return s
	}
	var b strings.Builder
	b.WriteString("$'")
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == '\'' || r == '\\':
			b.WriteString("\\" + s[:n])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == utf8.RuneError && n == 1, !unicode.IsPrint(r):
			for _, c := range []byte(s[:n]) {
				fmt.Fprintf(&b, "\\%03o", c)
			}
		default:
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String() + "'"
}

// lsPrinter prints lines as ls does. Columns are aligned among lsRows lines, so that a large directory is not held in memory.
type lsPrinter struct {
	*call
	ofGuest bool // with modes and owners
	table   *table
}

const lsRows = 1000

func (c *call) lsPrinter(ofGuest bool) *lsPrinter { return &lsPrinter{call: c, ofGuest: ofGuest} }

func (p *lsPrinter) print(l listed) error {
	name := quoteName(l.name)
	switch {
	case l.Type == "dir":
		name += "/"
	case l.To != "":
		name += " -> " + quoteName(l.To)
	}
	if !p.Bool("long") {
		p.out.line("%s", name)
		return p.out.object(l)
	}
	if p.table == nil {
		p.table = newTable("", ">", "", "")
		if p.ofGuest {
			p.table = newTable("", ">", ">", ">", ">", "", "")
		}
	}
	switch g := l.guestListed; {
	case !p.ofGuest:
		p.table.row(l.Type, fmt.Sprint(l.Size), timeText(l.Time), name)
	case l.Error != "":
		p.table.row("?", "?", "?", "?", "?", "?", name)
	case g == nil:
		p.table.row(l.Type, "", "", "", fmt.Sprint(l.Size), timeText(l.Time), name)
	default:
		p.table.row(g.Permissions, fmt.Sprint(g.Nlink), fmt.Sprint(g.UID), fmt.Sprint(g.GID), cmp.Or(g.Device, fmt.Sprint(l.Size)), timeText(l.Time), name)
	}
	if len(p.table.rows) >= lsRows {
		p.flush()
	}
	return p.out.object(l)
}

// flush prints the rows so far.
func (p *lsPrinter) flush() {
	if p.table != nil {
		p.out.table(p.table)
		p.table = nil
	}
}
