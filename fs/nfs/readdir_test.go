package nfs_test

import (
	"bytes"
	"fmt"
	"math"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// lister lists one page.
type lister func(c *nfstest.Client, dir nfstest.FH, cookie, verf uint64) (nfstest.Listing, error)

// listAll lists a directory to its end, and calls between after every page.
func listAll(t *testing.T, c *nfstest.Client, dir nfstest.FH, page lister, between func()) []nfstest.Entry {
	t.Helper()
	var all []nfstest.Entry
	var cookie, verf uint64
	for {
		l := must(page(c, dir, cookie, verf))(t)
		all = append(all, l.Entries...)
		if l.EOF {
			return all
		}
		if len(l.Entries) == 0 {
			t.Fatal("a page of nothing before the end")
		}
		cookie, verf = all[len(all)-1].Cookie, l.Verf
		between()
	}
}

func readdir(count uint32) lister {
	return func(c *nfstest.Client, dir nfstest.FH, cookie, verf uint64) (nfstest.Listing, error) {
		l, err := c.Readdir(dir, cookie, verf, count)
		if l.Len > int(count) {
			err = fmt.Errorf("%d bytes, more than %d", l.Len, count)
		}
		return l, err
	}
}

func readdirplus(dirCount, maxCount uint32) lister {
	return func(c *nfstest.Client, dir nfstest.FH, cookie, verf uint64) (nfstest.Listing, error) {
		l, err := c.Readdirplus(dir, cookie, verf, dirCount, maxCount)
		if l.Len > int(maxCount) {
			err = fmt.Errorf("%d bytes, more than %d", l.Len, maxCount)
		}
		names := 0
		for _, e := range l.Entries {
			names += 8 + 4 + (len(e.Name)+3)/4*4 + 8
		}
		if names > int(dirCount) && len(l.Entries) > 1 {
			err = fmt.Errorf("%d bytes of names, more than %d", names, dirCount)
		}
		return l, err
	}
}

// TestReaddir lists 10,000 entries in pages of many sizes, while others come and go.
func TestReaddir(t *testing.T) {
	m := nfstest.NewMemory()
	_, c, root := mounted(t, m)
	d := must(c.Mkdir(root, "d", &sattr{}))(t)
	const n = 10_000
	stay := make(map[string]bool)
	id := must(m.Lookup(t.Context(), m.Root(), "d"))(t)
	for i := range n {
		name := fmt.Sprintf("%0*d", i%40+5, i)
		if _, err := m.Create(t.Context(), id, name, nfs.Creation{}); err != nil {
			t.Fatal(err)
		}
		stay[name] = true
	}
	turn := 0
	for what, page := range map[string]lister{
		"READDIR 1024": readdir(1024), "READDIR 64K": readdir(64 << 10), "READDIR 4G": readdir(math.MaxUint32), "READDIRPLUS 4K": readdirplus(1024, 4096),
		"READDIRPLUS 64K": readdirplus(64<<10, 64<<10), "READDIRPLUS 512": readdirplus(512, 32<<10), "READDIRPLUS 1M": readdirplus(1<<20, 1<<20),
	} {
		come := 0
		entries := listAll(t, c, d.FH, page, func() {
			turn++
			if come++; come > 50 {
				return
			}
			must(c.Create(d.FH, fmt.Sprintf("come%d", turn), true, &sattr{}))(t)
			if turn > 3 {
				c.Remove(d.FH, fmt.Sprintf("come%d", turn-3))
			}
		})
		seen := make(map[string]int)
		for i, e := range entries {
			seen[e.Name]++
			if i > 1 && stay[e.Name] {
				checkEntry(t, c, d.FH, e, i%1000 == 0)
			}
		}
		for name := range stay {
			if seen[name] != 1 {
				t.Errorf("%s: %q was listed %d times", what, name, seen[name])
				break
			}
		}
		if entries[0].Name != "." || entries[0].FileID != d.Attr.FileID || entries[1].Name != ".." || entries[1].FileID != must(c.Getattr(root))(t).FileID {
			t.Errorf("%s starts with %+v", what, entries[:2])
		}
	}
}

// checkEntry compares an entry with LOOKUP, when asked to.
func checkEntry(t *testing.T, c *nfstest.Client, dir nfstest.FH, e nfstest.Entry, look bool) {
	t.Helper()
	if e.Attr != nil && e.Attr.FileID != e.FileID {
		t.Errorf("%q: attributes of another", e.Name)
	}
	if !look {
		return
	}
	f := must(c.Lookup(dir, e.Name))(t)
	if f.Attr.FileID != e.FileID || e.FH != nil && !bytes.Equal(e.FH, f.FH) || e.Attr != nil && *e.Attr != *f.Attr {
		t.Errorf("%q: %+v, LOOKUP says %+v", e.Name, e, f)
	}
}

// TestReaddirEdges asks for too little, with cookies of nobody, and where there is nothing.
func TestReaddirEdges(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	d := must(c.Mkdir(root, "d", &sattr{Mode: ptr(uint32(0o754))}))(t).FH
	if l := must(c.Readdir(d, 0, 0, 1000))(t); len(l.Entries) != 2 || !l.EOF || l.Dir == nil {
		t.Errorf("an empty directory: %+v", l)
	}
	must(c.Create(d, "name", true, &sattr{}))(t)
	// Attributes 88, verifier 8, no more 4, eof 4; one entry 24 and its name 4.
	for count, want := range map[uint32]int{132: 1, 159: 1, 160: 2, 187: 2, 188: 3} {
		l := must(c.Readdir(d, 0, 0, count))(t)
		if len(l.Entries) != want || l.EOF != (want == 3) || l.Len > int(count) {
			t.Errorf("READDIR of %d bytes: %d entries in %d bytes, eof %v", count, len(l.Entries), l.Len, l.EOF)
		}
	}
	for _, count := range []uint32{0, 1, 103, 104, 131} {
		_, err := c.Readdir(d, 0, 0, count)
		wants(t, fmt.Sprintf("READDIR of %d bytes", count), err, nfstest.TooSmall)
		_, err = c.Readdirplus(d, 0, 0, 1000, count)
		wants(t, fmt.Sprintf("READDIRPLUS of %d bytes", count), err, nfstest.TooSmall)
	}
	if l := must(c.Readdirplus(d, 0, 0, 0, 1000))(t); len(l.Entries) != 1 {
		t.Errorf("READDIRPLUS of no names: %+v", l)
	}
	all := must(c.Readdir(d, 0, 0, 1000))(t)
	if l := must(c.Readdir(d, all.Entries[2].Cookie, all.Verf, 104))(t); len(l.Entries) != 0 || !l.EOF {
		t.Errorf("after the last one: %+v", l)
	}
	for cookie, verf := range map[uint64]uint64{99999: all.Verf, math.MaxUint64: all.Verf, all.Entries[1].Cookie: all.Verf + 1} {
		_, err := c.Readdir(d, cookie, verf, 1000)
		wants(t, fmt.Sprintf("cookie %d of %d", cookie, verf), err, nfstest.BadCookie)
	}
	// Whoever may list but not look up sees names alone.
	l := must(c.As(&nfstest.Cred{UID: 5, GID: 5}).Readdirplus(d, 0, 0, 1000, 1000))(t)
	for _, e := range l.Entries {
		if e.Attr != nil || e.FH != nil {
			t.Errorf("%q has attributes for who may not look it up", e.Name)
		}
	}
}
