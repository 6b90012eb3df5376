package nfstest

import (
	"errors"
	"fmt"
)

// A Status is an nfsstat3 or mountstat3 (RFC 1813 §2.6, §5.1.5) other than 0.
type Status uint32

// Those that are tested for.
const (
	Perm        Status = 1
	NoEnt       Status = 2
	IO          Status = 5
	Access      Status = 13
	Exist       Status = 17
	XDev        Status = 18
	NotDir      Status = 20
	IsDir       Status = 21
	Inval       Status = 22
	FBig        Status = 27
	NoSpc       Status = 28
	ROFS        Status = 30
	NameTooLong Status = 63
	NotEmpty    Status = 66
	DQuot       Status = 69
	Stale       Status = 70
	BadHandle   Status = 10001
	NotSync     Status = 10002
	BadCookie   Status = 10003
	NotSupp     Status = 10004
	TooSmall    Status = 10005
	Jukebox     Status = 10008
)

func (s Status) Error() string { return fmt.Sprintf("NFS status %d", uint32(s)) }

// FH is a file handle.
type FH []byte

// Time is nfstime3.
type Time struct{ Sec, Nsec uint32 }

// Fattr is fattr3.
type Fattr struct {
	Type, Mode, Nlink, UID, GID    uint32
	Size, Used, Rdev, FSID, FileID uint64
	Atime, Mtime, Ctime            Time
}

// WccAttr is wcc_attr.
type WccAttr struct {
	Size         uint64
	Mtime, Ctime Time
}

// Wcc is wcc_data; nil for what is not there.
type Wcc struct {
	Before *WccAttr
	After  *Fattr
}

// Sattr is sattr3; nil for what is not to be set.
type Sattr struct {
	Mode, UID, GID *uint32
	Size           *uint64
	Atime, Mtime   *Time
	AtimeNow       bool
	MtimeNow       bool
}

// Ptr is for the fields of Sattr.
func Ptr[T any](v T) *T { return &v }

// Encode gives sattr3.
func (s *Sattr) Encode(a *Args) {
	for _, v := range []*uint32{s.Mode, s.UID, s.GID} {
		if v == nil {
			a.U32(0)
		} else {
			a.U32(1).U32(*v)
		}
	}
	if s.Size == nil {
		a.U32(0)
	} else {
		a.U32(1).U64(*s.Size)
	}
	encodeTime(a, s.Atime, s.AtimeNow)
	encodeTime(a, s.Mtime, s.MtimeNow)
}

func encodeTime(a *Args, t *Time, now bool) {
	switch {
	case t != nil:
		a.U32(2).U32(t.Sec).U32(t.Nsec)
	case now:
		a.U32(1)
	default:
		a.U32(0)
	}
}

func (r *Results) time() Time { return Time{r.U32(), r.U32()} }

func (r *Results) fattr() *Fattr {
	f := &Fattr{Type: r.U32(), Mode: r.U32(), Nlink: r.U32(), UID: r.U32(), GID: r.U32(), Size: r.U64(), Used: r.U64()}
	f.Rdev, f.FSID, f.FileID = r.U64(), r.U64(), r.U64()
	f.Atime, f.Mtime, f.Ctime = r.time(), r.time(), r.time()
	return f
}

func (r *Results) post() *Fattr {
	if r.Bool() {
		return r.fattr()
	}
	return nil
}

func (r *Results) wcc() (w Wcc) {
	if r.Bool() {
		w.Before = &WccAttr{r.U64(), r.time(), r.time()}
	}
	w.After = r.post()
	return w
}

func (r *Results) postFH() FH {
	if r.Bool() {
		return r.Opaque()
	}
	return nil
}

// nfs calls a procedure of NFS, and gives the results after the status with that
// status as an error; the results are nil when there is no reply.
func (c *Client) nfs(proc uint32, a *Args) (*Results, error) {
	r, err := c.Call(NFS, 3, proc, a.B)
	if err != nil {
		return nil, err
	}
	if st := Status(r.U32()); st != 0 {
		return r, st
	}
	return r, nil
}

// end checks that the results have been taken whole.
func end(r *Results, err error) error {
	if r == nil {
		return err
	}
	if e := r.End(); e != nil {
		return errors.Join(err, e)
	}
	return err
}

// Null calls NULL.
func (c *Client) Null() error {
	r, err := c.Call(NFS, 3, 0, nil)
	return end(r, err)
}

// Getattr calls GETATTR.
func (c *Client) Getattr(fh FH) (*Fattr, error) {
	r, err := c.nfs(1, new(Args).Opaque(fh))
	var f *Fattr
	if err == nil {
		f = r.fattr()
	}
	return f, end(r, err)
}

// wccCall is for procedures of which the results are wcc_data alone.
func (c *Client) wccCall(proc uint32, a *Args) (w Wcc, err error) {
	r, err := c.nfs(proc, a)
	if r != nil {
		w = r.wcc()
	}
	return w, end(r, err)
}

// Setattr calls SETATTR; guard is the time of change that the file must have, or nil.
func (c *Client) Setattr(fh FH, s *Sattr, guard *Time) (Wcc, error) {
	a := new(Args).Opaque(fh)
	s.Encode(a)
	if guard == nil {
		a.U32(0)
	} else {
		a.U32(1).U32(guard.Sec).U32(guard.Nsec)
	}
	return c.wccCall(2, a)
}

// Found is what LOOKUP, CREATE and MKDIR give.
type Found struct {
	FH   FH
	Attr *Fattr
	Dir  *Fattr // of LOOKUP
	Wcc  Wcc    // of the others
}

// Lookup calls LOOKUP.
func (c *Client) Lookup(dir FH, name string) (f Found, err error) {
	r, err := c.nfs(3, new(Args).Opaque(dir).Text(name))
	if err == nil {
		f.FH, f.Attr = r.Opaque(), r.post()
	}
	if r != nil {
		f.Dir = r.post()
	}
	return f, end(r, err)
}

// Access calls ACCESS.
func (c *Client) Access(fh FH, bits uint32) (uint32, error) {
	r, err := c.nfs(4, new(Args).Opaque(fh).U32(bits))
	if r != nil {
		r.post()
	}
	if err == nil {
		bits = r.U32()
	}
	return bits, end(r, err)
}

// Readlink calls READLINK.
func (c *Client) Readlink(fh FH) (target string, err error) {
	r, err := c.nfs(5, new(Args).Opaque(fh))
	if r != nil {
		r.post()
	}
	if err == nil {
		target = r.Text()
	}
	return target, end(r, err)
}

// Data is what READ gives.
type Data struct {
	Attr *Fattr
	EOF  bool
	P    []byte
}

// Read calls READ.
func (c *Client) Read(fh FH, off uint64, count uint32) (d Data, err error) {
	r, err := c.nfs(6, new(Args).Opaque(fh).U64(off).U32(count))
	if r != nil {
		d.Attr = r.post()
	}
	if err == nil {
		n := r.U32()
		d.EOF, d.P = r.Bool(), r.Opaque()
		if int(n) != len(d.P) {
			r.Err = fmt.Errorf("a count of %d for %d bytes", n, len(d.P))
		}
	}
	return d, end(r, err)
}

// How durable a WRITE is to be.
const (
	Unstable = 0
	DataSync = 1
	FileSync = 2
)

// Written is what WRITE gives.
type Written struct {
	Wcc       Wcc
	Count     uint32
	Committed uint32
	Verf      uint64
}

// Write calls WRITE.
func (c *Client) Write(fh FH, off uint64, p []byte, stable uint32) (w Written, err error) {
	r, err := c.nfs(7, new(Args).Opaque(fh).U64(off).U32(uint32(len(p))).U32(stable).Opaque(p))
	if r != nil {
		w.Wcc = r.wcc()
	}
	if err == nil {
		w.Count, w.Committed, w.Verf = r.U32(), r.U32(), r.U64()
	}
	return w, end(r, err)
}

func (c *Client) made(proc uint32, a *Args) (f Found, err error) {
	r, err := c.nfs(proc, a)
	if err == nil {
		f.FH, f.Attr = r.postFH(), r.post()
	}
	if r != nil {
		f.Wcc = r.wcc()
	}
	return f, end(r, err)
}

// CreateArgs are those of an unchecked (0) or guarded (1) CREATE.
func CreateArgs(dir FH, name string, mode uint32, s *Sattr) *Args {
	a := new(Args).Opaque(dir).Text(name).U32(mode)
	s.Encode(a)
	return a
}

// Create calls CREATE, guarded or not.
func (c *Client) Create(dir FH, name string, guarded bool, s *Sattr) (Found, error) {
	mode := uint32(0)
	if guarded {
		mode = 1
	}
	return c.made(8, CreateArgs(dir, name, mode, s))
}

// CreateExclusive calls CREATE with a verifier.
func (c *Client) CreateExclusive(dir FH, name string, verf uint64) (Found, error) {
	return c.made(8, new(Args).Opaque(dir).Text(name).U32(2).U64(verf))
}

// Mkdir calls MKDIR.
func (c *Client) Mkdir(dir FH, name string, s *Sattr) (Found, error) {
	a := new(Args).Opaque(dir).Text(name)
	s.Encode(a)
	return c.made(9, a)
}

// Symlink calls SYMLINK.
func (c *Client) Symlink(dir FH, name, target string) (Wcc, error) {
	a := new(Args).Opaque(dir).Text(name)
	(&Sattr{}).Encode(a)
	return c.wccCall(10, a.Text(target))
}

// Mknod calls MKNOD for a FIFO.
func (c *Client) Mknod(dir FH, name string) (Wcc, error) {
	a := new(Args).Opaque(dir).Text(name).U32(7)
	(&Sattr{}).Encode(a)
	return c.wccCall(11, a)
}

// Remove calls REMOVE.
func (c *Client) Remove(dir FH, name string) (Wcc, error) {
	return c.wccCall(12, new(Args).Opaque(dir).Text(name))
}

// Rmdir calls RMDIR.
func (c *Client) Rmdir(dir FH, name string) (Wcc, error) {
	return c.wccCall(13, new(Args).Opaque(dir).Text(name))
}

// Rename calls RENAME.
func (c *Client) Rename(from FH, name string, to FH, as string) (a, b Wcc, err error) {
	r, err := c.nfs(14, new(Args).Opaque(from).Text(name).Opaque(to).Text(as))
	if r != nil {
		a, b = r.wcc(), r.wcc()
	}
	return a, b, end(r, err)
}

// Link calls LINK.
func (c *Client) Link(fh, dir FH, name string) (attr *Fattr, w Wcc, err error) {
	r, err := c.nfs(15, new(Args).Opaque(fh).Opaque(dir).Text(name))
	if r != nil {
		attr, w = r.post(), r.wcc()
	}
	return attr, w, end(r, err)
}

// An Entry is a line of a directory.
type Entry struct {
	FileID uint64
	Name   string
	Cookie uint64
	Attr   *Fattr // of READDIRPLUS
	FH     FH     // of READDIRPLUS
}

// A Listing is what READDIR and READDIRPLUS give.
type Listing struct {
	Dir     *Fattr
	Verf    uint64
	Entries []Entry
	EOF     bool
	Len     int // bytes of the results after the status
}

// Readdir calls READDIR.
func (c *Client) Readdir(dir FH, cookie, verf uint64, count uint32) (Listing, error) {
	return c.listing(16, new(Args).Opaque(dir).U64(cookie).U64(verf).U32(count))
}

// Readdirplus calls READDIRPLUS.
func (c *Client) Readdirplus(dir FH, cookie, verf uint64, dirCount, maxCount uint32) (Listing, error) {
	return c.listing(17, new(Args).Opaque(dir).U64(cookie).U64(verf).U32(dirCount).U32(maxCount))
}

func (c *Client) listing(proc uint32, a *Args) (l Listing, err error) {
	r, err := c.nfs(proc, a)
	if r != nil {
		l.Len = len(r.P)
		l.Dir = r.post()
	}
	if err != nil {
		return l, end(r, err)
	}
	l.Verf = r.U64()
	for r.Bool() && r.Err == nil {
		e := Entry{FileID: r.U64(), Name: r.Text(), Cookie: r.U64()}
		if proc == 17 {
			e.Attr, e.FH = r.post(), r.postFH()
		}
		l.Entries = append(l.Entries, e)
	}
	l.EOF = r.Bool()
	return l, end(r, err)
}

// Fsstat calls FSSTAT and gives its six numbers and the time that they hold for.
func (c *Client) Fsstat(fh FH) (n [6]uint64, invar uint32, err error) {
	r, err := c.nfs(18, new(Args).Opaque(fh))
	if r != nil {
		r.post()
	}
	if err == nil {
		for i := range n {
			n[i] = r.U64()
		}
		invar = r.U32()
	}
	return n, invar, end(r, err)
}

// Info is what FSINFO gives.
type Info struct {
	RtMax, RtPref, RtMult, WtMax, WtPref, WtMult, DtPref uint32
	MaxFileSize                                          uint64
	Delta                                                Time
	Properties                                           uint32
}

// Fsinfo calls FSINFO.
func (c *Client) Fsinfo(fh FH) (i Info, err error) {
	r, err := c.nfs(19, new(Args).Opaque(fh))
	if r != nil {
		r.post()
	}
	if err == nil {
		i = Info{r.U32(), r.U32(), r.U32(), r.U32(), r.U32(), r.U32(), r.U32(), r.U64(), r.time(), r.U32()}
	}
	return i, end(r, err)
}

// Conf is what PATHCONF gives.
type Conf struct {
	LinkMax, NameMax                                          uint32
	NoTrunc, ChownRestricted, CaseInsensitive, CasePreserving bool
}

// Pathconf calls PATHCONF.
func (c *Client) Pathconf(fh FH) (p Conf, err error) {
	r, err := c.nfs(20, new(Args).Opaque(fh))
	if r != nil {
		r.post()
	}
	if err == nil {
		p = Conf{r.U32(), r.U32(), r.Bool(), r.Bool(), r.Bool(), r.Bool()}
	}
	return p, end(r, err)
}

// Commit calls COMMIT.
func (c *Client) Commit(fh FH, off uint64, count uint32) (w Wcc, verf uint64, err error) {
	r, err := c.nfs(21, new(Args).Opaque(fh).U64(off).U32(count))
	if r != nil {
		w = r.wcc()
	}
	if err == nil {
		verf = r.U64()
	}
	return w, verf, end(r, err)
}

// Mount calls MNT of the MOUNT protocol, and gives the handle.
func (c *Client) Mount(path string) (FH, error) {
	fh, _, err := c.Mnt(path)
	return fh, err
}

// Mnt calls MNT, and gives the handle and the flavors.
func (c *Client) Mnt(path string) (fh FH, flavors []uint32, err error) {
	r, err := c.Call(Mount, 3, 1, new(Args).Text(path).B)
	if err != nil {
		return nil, nil, err
	}
	if st := Status(r.U32()); st != 0 {
		return nil, nil, errors.Join(st, r.End())
	}
	fh = r.Opaque()
	for range r.U32() {
		flavors = append(flavors, r.U32())
	}
	return fh, flavors, r.End()
}

// Umnt calls UMNT.
func (c *Client) Umnt(path string) error {
	return end(c.Call(Mount, 3, 3, new(Args).Text(path).B))
}

// Umntall calls UMNTALL.
func (c *Client) Umntall() error { return end(c.Call(Mount, 3, 4, nil)) }

// Dump calls DUMP, and gives host and path of every mount.
func (c *Client) Dump() (list [][2]string, err error) {
	r, err := c.Call(Mount, 3, 2, nil)
	if err != nil {
		return nil, err
	}
	for r.Bool() && r.Err == nil {
		list = append(list, [2]string{r.Text(), r.Text()})
	}
	return list, r.End()
}

// Exports calls EXPORT, and gives path and groups of every export.
func (c *Client) Exports() (list [][]string, err error) {
	r, err := c.Call(Mount, 3, 5, nil)
	if err != nil {
		return nil, err
	}
	for r.Bool() && r.Err == nil {
		e := []string{r.Text()}
		for r.Bool() && r.Err == nil {
			e = append(e, r.Text())
		}
		list = append(list, e)
	}
	return list, r.End()
}
