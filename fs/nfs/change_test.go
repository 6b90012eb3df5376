package nfs_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// TestStability loses what was not synced, by a crash and a restart.
func TestStability(t *testing.T) {
	m := nfstest.NewMemory()
	r, c, root := mounted(t, m)
	addr := r.addr()
	fh := must(c.Create(root, "f", false, &sattr{}))(t).FH
	data := bytes.Repeat([]byte("x"), 1000)
	for _, how := range []uint32{nfstest.DataSync, nfstest.FileSync} {
		syncs := m.Syncs()
		w := must(c.Write(fh, uint64(how)*1000, data, how))(t)
		if w.Committed != how || w.Count != 1000 || m.Syncs() != syncs+1 {
			t.Errorf("%+v with %d calls of Sync", w, m.Syncs()-syncs)
		}
	}
	syncs := m.Syncs()
	w1 := must(c.Write(fh, 5000, data, nfstest.Unstable))(t)
	if w1.Committed != nfstest.Unstable || m.Syncs() != syncs {
		t.Errorf("%+v with %d calls of Sync", w1, m.Syncs()-syncs)
	}
	_, verf, err := c.Commit(fh, 0, 0)
	if err != nil || verf != w1.Verf || m.Syncs() != syncs+1 {
		t.Errorf("COMMIT: %v, verifier %x, of WRITE %x", err, verf, w1.Verf)
	}
	must(c.Write(fh, 9000, data, nfstest.Unstable))(t)
	must(c.Write(fh, 0, nil, nfstest.FileSync))(t) // of nothing makes the rest durable too
	must(c.Write(fh, 12000, data, nfstest.Unstable))(t)

	r.stop()
	m.Crash()
	serveAt(t, addr, &nfs.Server{}, share(m))
	c = r.dial(nfstest.Root)
	if a := must(c.Getattr(fh))(t); a.Size != 10000 {
		t.Errorf("%d bytes outlived the crash, want 10000", a.Size)
	}
	_, verf, err = c.Commit(fh, 0, 0)
	if err != nil || verf == w1.Verf {
		t.Errorf("COMMIT after a restart: %v, verifier %x as before", err, verf)
	}
}

// TestSyncError loses data by a Sync that fails: the clients must hear of it, also
// those who did not ask for that Sync.
func TestSyncError(t *testing.T) {
	m := nfstest.NewMemory()
	var fail atomic.Bool
	m.Before = func(op string, _ nfs.ID) error {
		if op == "Sync" && fail.Load() {
			return syscall.ENOSPC
		}
		return nil
	}
	_, c, root := mounted(t, m)
	fh := must(c.Create(root, "f", false, &sattr{}))(t).FH
	w := must(c.Write(fh, 0, []byte("data"), nfstest.Unstable))(t)
	fail.Store(true)
	_, err := c.Write(fh, 4, []byte("data"), nfstest.FileSync)
	wants(t, "WRITE", err, nfstest.NoSpc)
	fail.Store(false)
	_, verf, err := c.Commit(fh, 0, 0)
	if err != nil || verf == w.Verf {
		t.Errorf("COMMIT after a Sync that failed: %v, the same verifier", err)
	}
}

// TestSharedSync has many wait for the same file: they share few Syncs, each of
// which began after the writes that it is to cover.
func TestSharedSync(t *testing.T) {
	m := nfstest.NewMemory()
	var file nfs.ID
	gate, entered := make(chan struct{}), make(chan struct{}, 100)
	m.Before = func(op string, id nfs.ID) error {
		if op == "Sync" {
			entered <- struct{}{}
			if id == file {
				<-gate
			}
		}
		return nil
	}
	_, c, root := mounted(t, m)
	fh := must(c.Create(root, "f", false, &sattr{}))(t).FH
	file = must(m.Lookup(t.Context(), m.Root(), "f"))(t)
	other := must(c.Create(root, "g", false, &sattr{}))(t).FH
	var all sync.WaitGroup
	var answered atomic.Int32
	write := func(i int) {
		all.Go(func() {
			if _, err := c.Write(fh, uint64(i), []byte{byte(i + 1)}, nfstest.FileSync); err != nil {
				t.Error(err)
			}
			answered.Add(1)
		})
	}
	write(0)
	<-entered // the first Sync is at work
	for i := range 30 {
		write(i + 1)
	}
	for must(c.Getattr(fh))(t).Size != 31 { // until all of them are written
		time.Sleep(time.Millisecond)
	}
	must(c.Write(other, 0, []byte("1"), nfstest.FileSync))(t) // another file does not wait
	<-entered
	time.Sleep(50 * time.Millisecond)
	gate <- struct{}{}
	<-entered // the second Sync, for all the others
	time.Sleep(50 * time.Millisecond)
	if n := answered.Load(); n != 1 {
		t.Errorf("%d writes were answered when one was durable", n)
	}
	close(gate)
	all.Wait()
	if n := m.Syncs(); n > 6 {
		t.Errorf("%d calls of Sync for 32 writes", n)
	}
	m.Crash()
	for i, b := range must(c.Read(fh, 0, 100))(t).P {
		if int(b) != i+1 {
			t.Fatalf("byte %d was answered as durable and is lost", i)
		}
	}
}

// TestBefore checks that the attributes of before a change are given only if nobody else's fell into it.
func TestBefore(t *testing.T) {
	m := nfstest.NewMemory()
	var slow atomic.Bool
	release, entered := make(chan struct{}), make(chan struct{})
	m.Before = func(op string, _ nfs.ID) error {
		if op == "WriteAt" && slow.CompareAndSwap(true, false) {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	_, c, root := mounted(t, m)
	f := must(c.Create(root, "f", false, &sattr{}))(t)
	w := must(c.Write(f.FH, 0, []byte("1234"), nfstest.Unstable))(t)
	checkBefore(t, "WRITE alone", w.Wcc, f.Attr)
	last := w.Wcc.After

	slow.Store(true)
	done := make(chan nfstest.Written)
	go func() {
		w, _ := c.Write(f.FH, 4, []byte("5678"), nfstest.Unstable)
		done <- w
	}()
	<-entered
	w = must(c.Write(f.FH, 8, []byte("9"), nfstest.Unstable))(t)
	if w.Wcc.Before != nil || w.Wcc.After == nil {
		t.Errorf("WRITE during another: %+v", w.Wcc)
	}
	wcc, _, err := c.Commit(f.FH, 0, 0)
	if err != nil || wcc.Before != nil || wcc.After == nil {
		t.Errorf("COMMIT during a WRITE: %+v, %v", wcc, err)
	}
	release <- struct{}{}
	if w = <-done; w.Wcc.Before != nil || w.Wcc.After == nil {
		t.Errorf("WRITE that another fell into: %+v", w.Wcc)
	}
	last = w.Wcc.After
	wcc = must(c.Setattr(f.FH, &sattr{Mode: ptr(uint32(0o600))}, nil))(t)
	checkBefore(t, "SETATTR alone again", wcc, last)
	// A COMMIT changes nothing.
	last = wcc.After
	slow.Store(true)
	go func() {
		w, _ := c.Write(f.FH, 4, []byte("5678"), nfstest.Unstable)
		done <- w
	}()
	<-entered
	third(c.Commit(f.FH, 0, 0))
	release <- struct{}{}
	checkBefore(t, "WRITE during a COMMIT", (<-done).Wcc, last)
	wcc, _, err = c.Commit(f.FH, 0, 0)
	wants(t, "COMMIT", err, nil)
	checkBefore(t, "COMMIT", wcc, must(c.Getattr(f.FH))(t))

	dir := must(c.Getattr(root))(t)
	g := must(c.Create(root, "g", true, &sattr{}))(t)
	checkBefore(t, "CREATE", g.Wcc, dir)
	d := must(c.Mkdir(root, "d", &sattr{}))(t)
	checkBefore(t, "MKDIR", d.Wcc, g.Wcc.After)
	a, b, err := c.Rename(root, "g", root, "h")
	wants(t, "RENAME", err, nil)
	checkBefore(t, "RENAME", a, d.Wcc.After)
	checkBefore(t, "RENAME", b, d.Wcc.After)
	a2, b, err := c.Rename(root, "h", d.FH, "h")
	wants(t, "RENAME", err, nil)
	checkBefore(t, "RENAME from", a2, a.After)
	checkBefore(t, "RENAME to", b, d.Attr)
	wcc = must(c.Remove(d.FH, "h"))(t)
	checkBefore(t, "REMOVE", wcc, b.After)
	rm := must(c.Rmdir(root, "d"))(t)
	checkBefore(t, "RMDIR", rm, a2.After)
	wcc, err = c.Remove(root, "missing")
	wants(t, "REMOVE", err, nfstest.NoEnt)
	checkBefore(t, "REMOVE of nothing", wcc, rm.After)
}

func TestCreate(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	f := must(c.Create(root, "f", true, &sattr{Mode: ptr(uint32(0o640)), Size: ptr(uint64(100))}))(t)
	_, err := c.Create(root, "f", true, &sattr{})
	wants(t, "GUARDED again", err, nfstest.Exist)
	again := must(c.Create(root, "f", false, &sattr{Mode: ptr(uint32(0o777))}))(t)
	if !bytes.Equal(again.FH, f.FH) || again.Attr.Size != 100 || again.Attr.Mode != 0o640 {
		t.Errorf("UNCHECKED again: %+v", again.Attr)
	}
	if again = must(c.Create(root, "f", false, &sattr{Size: ptr(uint64(0))}))(t); again.Attr.Size != 0 {
		t.Errorf("UNCHECKED with a size: %+v", again.Attr)
	}
	e := must(c.CreateExclusive(root, "e", 42))(t)
	if again := must(c.CreateExclusive(root, "e", 42))(t); !bytes.Equal(again.FH, e.FH) {
		t.Error("EXCLUSIVE again is another file")
	}
	_, err = c.CreateExclusive(root, "e", 43)
	wants(t, "EXCLUSIVE with another verifier", err, nfstest.Exist)
	_, err = c.CreateExclusive(root, "f", 42)
	wants(t, "EXCLUSIVE of a file that is there", err, nfstest.Exist)
	must(c.Mkdir(root, "d", &sattr{Mode: ptr(uint32(0o700)), Size: ptr(uint64(5))}))(t)
	for _, name := range []string{"d", ".", ".."} {
		_, err = c.Mkdir(root, name, &sattr{})
		wants(t, "MKDIR "+name, err, nfstest.Exist)
		_, err = c.Create(root, name, false, &sattr{})
		wants(t, "UNCHECKED "+name, err, nfstest.Exist)
		_, err = c.Create(root, name, true, &sattr{})
		wants(t, "GUARDED "+name, err, nfstest.Exist)
	}
	_, err = c.Create(root, "big", true, &sattr{Size: ptr(uint64(1 << 62))})
	wants(t, "CREATE of a size that is too large", err, nfstest.FBig)
	_, err = c.Write(f.FH, 1<<62, []byte("1"), 0)
	wants(t, "WRITE beyond the largest", err, nfstest.FBig)
	_, err = c.Write(f.FH, 1<<64-1, []byte("1"), 0)
	wants(t, "WRITE at the end of numbers", err, nfstest.FBig)
	res := must(c.Call(nfstest.NFS, 3, 7, new(args).Opaque(f.FH).U64(0).U32(5).U32(0).Opaque([]byte("1234")).B))(t)
	wants(t, "WRITE of another count", nfstest.Status(res.U32()), nfstest.Inval)
}

func TestRemoveRename(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	d := must(c.Mkdir(root, "d", &sattr{}))(t).FH
	e := must(c.Mkdir(root, "e", &sattr{}))(t).FH
	f := must(c.Create(d, "f", false, &sattr{}))(t).FH
	for _, v := range []struct {
		what string
		err  error
		want error
	}{
		{"REMOVE of a directory", second(c.Remove(root, "d")), nfstest.IsDir},
		{"REMOVE of .", second(c.Remove(root, ".")), nfstest.Inval},
		{"RMDIR of a file", second(c.Rmdir(d, "f")), nfstest.NotDir},
		{"RMDIR of a full directory", second(c.Rmdir(root, "d")), nfstest.NotEmpty},
		{"RMDIR of .", second(c.Rmdir(root, ".")), nfstest.Inval},
		{"RMDIR of ..", second(c.Rmdir(root, "..")), nfstest.Exist},
		{"RENAME of .", third(c.Rename(d, ".", root, "x")), nfstest.Inval},
		{"RENAME to ..", third(c.Rename(root, "e", root, "..")), nfstest.Inval},
		{"RENAME of nothing", third(c.Rename(root, "x", root, "y")), nfstest.NoEnt},
		{"RENAME into itself", third(c.Rename(root, "d", d, "d")), nfstest.Inval},
		{"RENAME over a full directory", third(c.Rename(root, "e", root, "d")), nfstest.NotEmpty},
		{"RENAME of a file over a directory", third(c.Rename(d, "f", root, "e")), nfstest.Exist},
		{"RENAME over itself", third(c.Rename(d, "f", d, "f")), nil},
		{"RENAME over an empty directory", third(c.Rename(root, "d", root, "e")), nil},
	} {
		wants(t, v.what, v.err, v.want)
	}
	wants(t, "GETATTR of what was replaced", second(c.Getattr(e)), nfstest.Stale)
	wants(t, "GETATTR after renames", second(c.Getattr(f)), nil)
	if got := must(c.Lookup(must(c.Lookup(root, "e"))(t).FH, ".."))(t); !bytes.Equal(got.FH, root) {
		t.Error("..  of a directory that was renamed")
	}
}

func third[A, B any](_ A, _ B, err error) error { return err }

// TestOnce sends calls again, over another connection, that must not be done twice.
func TestOnce(t *testing.T) {
	m := nfstest.NewMemory()
	var later atomic.Int64 // minutes
	clock := func() time.Time { return time.Now().Add(time.Duration(later.Load()) * time.Minute) }
	r := serve(t, &nfs.Server{Now: clock}, share(m))
	c := r.dial(nfstest.Root)
	root := must(c.Mount("/ds"))(t)
	sub := must(c.Mkdir(root, "sub", &sattr{}))(t).FH
	must(c.Create(root, "gone", true, &sattr{}))(t)
	must(c.Create(root, "old", true, &sattr{}))(t)
	must(c.Mkdir(root, "gonedir", &sattr{}))(t)
	f := must(c.Create(root, "f", true, &sattr{Size: ptr(uint64(9))}))(t)
	guarded := new(args).Opaque(f.FH)
	(&sattr{Size: ptr(uint64(5))}).Encode(guarded)
	guarded.U32(1).U32(f.Attr.Ctime.Sec).U32(f.Attr.Ctime.Nsec)
	calls := map[uint32][]byte{
		2:  guarded.B,
		8:  nfstest.CreateArgs(root, "new", 1, &sattr{}).B,
		9:  nfstest.CreateArgs(sub, "d", 0, &sattr{}).B,
		12: new(args).Opaque(root).Text("gone").B,
		13: new(args).Opaque(root).Text("gonedir").B,
		14: new(args).Opaque(root).Text("old").Opaque(root).Text("renamed").B,
	}
	mk := new(args).Opaque(sub).Text("d")
	(&sattr{}).Encode(mk)
	calls[9] = mk.B
	other := r.dial(nfstest.Root)
	for proc, p := range calls {
		xid := c.NextXID()
		first := must(c.CallAs(xid, nfstest.NFS, 3, proc, p))(t)
		if st := binary.BigEndian.Uint32(first.P); st != 0 {
			t.Fatalf("procedure %d: %v", proc, nfstest.Status(st))
		}
		again := must(other.CallAs(xid, nfstest.NFS, 3, proc, p))(t)
		if !bytes.Equal(again.P, first.P) {
			t.Errorf("procedure %d: another reply the second time: %x, first %x", proc, again.P, first.P)
		}
		fresh := must(other.Call(nfstest.NFS, 3, proc, p))(t)
		if st := binary.BigEndian.Uint32(fresh.P); st == 0 {
			t.Errorf("procedure %d: a new call of the same was not done", proc)
		}
		differs := must(other.As(&nfstest.Cred{UID: 1}).CallAs(xid, nfstest.NFS, 3, proc, p))(t)
		if st := binary.BigEndian.Uint32(differs.P); st == 0 {
			t.Errorf("procedure %d: another user got the reply", proc)
		}
		later.Add(3)
		forgotten := must(other.CallAs(xid, nfstest.NFS, 3, proc, p))(t)
		if st := binary.BigEndian.Uint32(forgotten.P); st == 0 {
			t.Errorf("procedure %d: the reply is kept for ever", proc)
		}
	}
}

// TestOnceAtWork sends a call again while it is at work: it waits for the same reply.
func TestOnceAtWork(t *testing.T) {
	m := nfstest.NewMemory()
	entered, release := make(chan struct{}, 10), make(chan struct{})
	m.Before = func(op string, _ nfs.ID) error {
		if op == "Create" {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	_, c, root := mounted(t, m)
	p := nfstest.CreateArgs(root, "f", 1, &sattr{}).B
	xid := c.NextXID()
	go c.CallAs(xid, nfstest.NFS, 3, 8, p) // its reply may be taken for the second one's
	<-entered
	done := make(chan error)
	go func() {
		r, err := c.CallAs(xid, nfstest.NFS, 3, 8, p)
		if err == nil && r.U32() != 0 {
			err = fmt.Errorf("not created")
		}
		done <- err
	}()
	select {
	case <-entered:
		t.Error("created twice")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	wants(t, "CREATE", <-done, nil)
}

// TestPermissions goes through modes and users.
func TestPermissions(t *testing.T) {
	m := nfstest.NewMemory()
	squash := share(m)
	squash.Path, squash.ID, squash.NoRootSquash, squash.AnonUID, squash.AnonGID = "/squash", 78, false, 99, 98
	r := serve(t, &nfs.Server{}, share(m), squash)
	su := r.dial(nfstest.Root)
	owner, group, groups, other := su.As(&nfstest.Cred{UID: 10, GID: 10}), su.As(&nfstest.Cred{UID: 11, GID: 10}), su.As(&nfstest.Cred{UID: 11, GID: 11, Groups: []uint32{5, 10}}), su.As(&nfstest.Cred{UID: 11, GID: 11})
	root := must(su.Mount("/ds"))(t)
	d := must(su.Mkdir(root, "d", &sattr{Mode: ptr(uint32(0o777))}))(t).FH
	file := func(name string, mode uint32) nfstest.FH {
		return must(owner.Create(d, name, true, &sattr{Mode: &mode}))(t).FH
	}
	fh := file("f", 0o640)
	if a := must(su.Getattr(fh))(t); a.UID != 10 || a.GID != 10 {
		t.Errorf("a new file is of %d:%d", a.UID, a.GID)
	}
	read := func(c *nfstest.Client, fh nfstest.FH) error { return second(c.Read(fh, 0, 1)) }
	write := func(c *nfstest.Client, fh nfstest.FH) error { return second(c.Write(fh, 0, []byte("1"), 0)) }
	for _, v := range []struct {
		what string
		err  error
		want error
	}{
		{"owner reads", read(owner, fh), nil}, {"owner writes", write(owner, fh), nil},
		{"group reads", read(group, fh), nil}, {"group writes", write(group, fh), nfstest.Access},
		{"further group reads", read(groups, fh), nil}, {"other reads", read(other, fh), nfstest.Access},
		{"other commits", third(other.Commit(fh, 0, 0)), nfstest.Access},
		{"root reads", read(su, fh), nil}, {"root writes", write(su, fh), nil},
		{"nobody reads", read(su.As(nil), fh), nfstest.Access},
		{"owner reads 0000", read(owner, file("zero", 0)), nil}, {"owner writes 0000", write(owner, must(su.Lookup(d, "zero"))(t).FH), nil},
		{"other reads what he may execute", read(other, file("x", 0o711)), nil},
		{"other reads 0700", read(other, file("y", 0o700)), nfstest.Access},
		{"other chmods", second(other.Setattr(fh, &sattr{Mode: ptr(uint32(0))}, nil)), nfstest.Perm},
		{"other truncates", second(other.Setattr(fh, &sattr{Size: ptr(uint64(0))}, nil)), nfstest.Access},
		{"other touches", second(other.Setattr(fh, &sattr{MtimeNow: true}, nil)), nfstest.Access},
		{"other sets a time", second(other.Setattr(fh, &sattr{Mtime: &nfstest.Time{}}, nil)), nfstest.Perm},
		{"owner gives away", second(owner.Setattr(fh, &sattr{UID: ptr(uint32(11))}, nil)), nfstest.Perm},
		{"owner keeps", second(owner.Setattr(fh, &sattr{UID: ptr(uint32(10)), GID: ptr(uint32(10))}, nil)), nil},
		{"owner gives to a foreign group", second(owner.Setattr(fh, &sattr{GID: ptr(uint32(11))}, nil)), nfstest.Perm},
		{"owner creates for another", second(owner.Create(d, "z", true, &sattr{UID: ptr(uint32(11))})), nfstest.Perm},
		{"root gives away", second(su.Setattr(file("w", 0o600), &sattr{UID: ptr(uint32(11)), GID: ptr(uint32(11))}, nil)), nil},
		{"chmod of the directory", second(su.Setattr(d, &sattr{Mode: ptr(uint32(0o754))}, nil)), nil},
		{"other looks up", second(other.Lookup(d, "f")), nfstest.Access},
		{"other lists", second(other.Readdir(d, 0, 0, 1000)), nil},
		{"other removes", second(other.Remove(d, "f")), nfstest.Access},
		{"other creates", second(other.Create(d, "new", false, &sattr{})), nfstest.Access},
		{"other renames", third(other.Rename(d, "f", d, "g")), nfstest.Access},
		{"chmod of the directory", second(su.Setattr(d, &sattr{Mode: ptr(uint32(0o1773))}, nil)), nil},
		{"other lists", second(other.Readdir(d, 0, 0, 1000)), nfstest.Access},
		{"other removes from a sticky one", second(other.Remove(d, "f")), nfstest.Perm},
		{"other renames over in a sticky one", third(other.Rename(d, "w", d, "f")), nfstest.Perm},
		{"other renames his own in a sticky one", third(other.Rename(d, "w", d, "w2")), nil},
		{"owner removes from a sticky one", second(owner.Remove(d, "f")), nil},
	} {
		wants(t, v.what, v.err, v.want)
	}
	for _, v := range []struct {
		who  *nfstest.Client
		mode uint32
		want uint32
	}{{owner, 0o700, 0x2d}, {owner, 0o400, 1}, {owner, 0o070, 0}, {group, 0o070, 0x2d}, {other, 0o002, 0x0c}, {su, 0, 0x0d}, {su, 0o001, 0x2d}} {
		fh := file("access", v.mode)
		if got := must(v.who.Access(fh, 63))(t); got != v.want {
			t.Errorf("ACCESS of mode %o: %#x, want %#x", v.mode, got, v.want)
		}
		must(su.Remove(d, "access"))(t)
	}
	must(su.Setattr(d, &sattr{Mode: ptr(uint32(0o755))}, nil))(t)
	if got := must(su.Access(d, 63))(t); got != 0x1f {
		t.Errorf("ACCESS of a directory: %#x", got)
	}
	if got := must(other.Access(d, 63))(t); got != 3 {
		t.Errorf("ACCESS of another's directory: %#x", got)
	}
	must(su.Setattr(d, &sattr{Mode: ptr(uint32(0o2777)), GID: ptr(uint32(55))}, nil))(t)
	if f := must(owner.Create(d, "of the group", true, &sattr{}))(t); f.Attr.GID != 55 || f.Attr.UID != 10 {
		t.Errorf("a file in a set-group-ID directory is of %d:%d", f.Attr.UID, f.Attr.GID)
	}
	_, err := owner.Create(d, "foreign", true, &sattr{GID: ptr(uint32(56))})
	wants(t, "a file for a foreign group", err, nfstest.Perm)
	_, err = owner.Mkdir(d, "foreign", &sattr{GID: ptr(uint32(56))})
	wants(t, "a directory for a foreign group", err, nfstest.Perm)
	must(su.Create(d, "unchecked", true, &sattr{Mode: ptr(uint32(0o600)), Size: ptr(uint64(5))}))(t)
	_, err = other.Create(d, "unchecked", false, &sattr{Size: ptr(uint64(0))})
	wants(t, "other truncates by CREATE", err, nfstest.Access)
	// By the other export root is nobody.
	sq := must(su.Mount("/squash"))(t)
	f := must(su.Create(sq, "squashed", true, &sattr{}))(t)
	if f.Attr.UID != 99 || f.Attr.GID != 98 {
		t.Errorf("a squashed root's file is of %d:%d", f.Attr.UID, f.Attr.GID)
	}
	f = must(su.As(nil).CreateExclusive(sq, "exclusive", 1))(t)
	if f.Attr.UID != 99 || f.Attr.GID != 98 {
		t.Errorf("nobody's file is of %d:%d", f.Attr.UID, f.Attr.GID)
	}
	_, err = su.Setattr(f.FH, &sattr{UID: ptr(uint32(0))}, nil)
	wants(t, "a squashed root's chown", err, nfstest.Perm)
	must(su.Create(root, "of root's group", true, &sattr{Mode: ptr(uint32(0o640))}))(t)
	rooted := must(su.As(&nfstest.Cred{UID: 5, GID: 5, Groups: []uint32{3, 0}}).Lookup(sq, "of root's group"))(t).FH
	wants(t, "a squashed group reads", read(su.As(&nfstest.Cred{UID: 5, GID: 5, Groups: []uint32{3, 0}}), rooted), nfstest.Access)
	wants(t, "a squashed group reads", read(su.As(&nfstest.Cred{UID: 5, GID: 0}), rooted), nfstest.Access)
}

// TestModel has 64 connections do random things, each in its own part of a file
// and a directory that all share, and compares with what they did.
func TestModel(t *testing.T) {
	m := nfstest.NewMemory()
	r, c, root := mounted(t, m)
	shared := must(c.Create(root, "shared", true, &sattr{}))(t).FH
	dir := must(c.Mkdir(root, "dir", &sattr{}))(t).FH
	const conns, part, ops = 64, 16 << 10, 150
	var all sync.WaitGroup
	models := make([][]byte, conns)
	for i := range conns {
		c := r.dial(nfstest.Root)
		all.Go(func() {
			if err := model(c, shared, dir, i, part, ops, &models[i]); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	all.Wait()
	for i, want := range models {
		got := must(c.Read(shared, uint64(i*part), part))(t).P
		got = append(got, make([]byte, part-len(got))...)
		if !bytes.Equal(got, want) {
			t.Errorf("part %d differs", i)
		}
	}
}

func model(c *nfstest.Client, shared, dir nfstest.FH, i, part, ops int, result *[]byte) error {
	rnd := rand.New(rand.NewPCG(uint64(i), 7))
	mine := make([]byte, part)
	*result = mine
	names := make(map[string]nfstest.FH)
	for op := range ops {
		name := fmt.Sprintf("%d-%d", i, rnd.IntN(5))
		switch rnd.IntN(6) {
		case 0, 1:
			off := rnd.IntN(part)
			p := mine[off : off+rnd.IntN(part-off+1)]
			for j := range p {
				p[j] = byte(rnd.Uint32())
			}
			w, err := c.Write(shared, uint64(i*part+off), p, uint32(rnd.IntN(3)))
			if err != nil || int(w.Count) != len(p) {
				return fmt.Errorf("WRITE: %d, %w", w.Count, err)
			}
		case 2:
			off := rnd.IntN(part)
			d, err := c.Read(shared, uint64(i*part+off), uint32(part-off))
			if err != nil || !bytes.Equal(d.P, mine[off:off+len(d.P)]) {
				return fmt.Errorf("operation %d: READ: %w", op, err)
			}
		case 3:
			f, err := c.Create(dir, name, true, &sattr{})
			if (err == nil) == (names[name] != nil) {
				return fmt.Errorf("CREATE %s: %w", name, err)
			}
			if err == nil {
				names[name] = f.FH
			}
		case 4:
			_, err := c.Remove(dir, name)
			if (err == nil) != (names[name] != nil) {
				return fmt.Errorf("REMOVE %s: %w", name, err)
			}
			delete(names, name)
		case 5:
			f, err := c.Lookup(dir, name)
			if (err == nil) != (names[name] != nil) || err == nil && !bytes.Equal(f.FH, names[name]) {
				return fmt.Errorf("LOOKUP %s: %w", name, err)
			}
		}
	}
	return nil
}
