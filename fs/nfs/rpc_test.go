package nfs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/nfstest"
)

// TestRefusals calls what is not to be answered with results (RFC 5531 §9).
func TestRefusals(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	garbage := nfstest.RPCError{Stat: 4}
	badCred, badVerf := nfstest.RPCError{Denied: true, Stat: 1, Auth: 1}, nfstest.RPCError{Denied: true, Stat: 1, Auth: 3}
	for what, v := range map[string]struct {
		prog, vers, proc uint32
		args             []byte
		want             nfstest.RPCError
	}{
		"unknown program":         {100099, 1, 0, nil, nfstest.RPCError{Stat: 1}},
		"portmapper on this port": {nfstest.Portmap, 2, 0, nil, nfstest.RPCError{Stat: 1}},
		"NFS version 2":           {nfstest.NFS, 2, 0, nil, nfstest.RPCError{Stat: 2, Low: 3, High: 3}},
		"NFS version 4":           {nfstest.NFS, 4, 0, nil, nfstest.RPCError{Stat: 2, Low: 3, High: 3}},
		"MOUNT version 1":         {nfstest.Mount, 1, 0, nil, nfstest.RPCError{Stat: 2, Low: 3, High: 3}},
		"procedure 22":            {nfstest.NFS, 3, 22, nil, nfstest.RPCError{Stat: 3}},
		"MOUNT procedure 6":       {nfstest.Mount, 3, 6, nil, nfstest.RPCError{Stat: 3}},
		"highest procedure":       {nfstest.NFS, 3, 1<<32 - 1, nil, nfstest.RPCError{Stat: 3}},
		"no handle":               {nfstest.NFS, 3, 1, nil, garbage},
		"handle of 65 bytes":      {nfstest.NFS, 3, 1, new(nfstest.Args).Opaque(make([]byte, 65)).B, garbage},
		"handle cut off":          {nfstest.NFS, 3, 1, new(nfstest.Args).Opaque(root).B[:20], garbage},
		"handle without padding":  {nfstest.NFS, 3, 1, new(nfstest.Args).Opaque(root).B[:4+len(root)], garbage},
		"stable_how 3":            {nfstest.NFS, 3, 7, new(nfstest.Args).Opaque(root).U64(0).U32(0).U32(3).Opaque(nil).B, garbage},
		"createmode3 3":           {nfstest.NFS, 3, 8, new(nfstest.Args).Opaque(root).Text("a").U32(3).U64(0).B, garbage},
		"boolean of 2":            {nfstest.NFS, 3, 2, new(nfstest.Args).Opaque(root).U32(2).B, garbage},
		"path of 4 GiB":           {nfstest.Mount, 3, 1, new(nfstest.Args).U32(1<<32 - 1).B, garbage},
	} {
		_, err := c.Call(v.prog, v.vers, v.proc, v.args)
		wantsRPC(t, what, err, v.want)
	}
	head := func(rpcVers, flavor uint32, body []byte, verfFlavor uint32, verf []byte) func(xid uint32) []byte {
		return func(xid uint32) []byte {
			a := new(nfstest.Args).U32(xid).U32(0).U32(rpcVers).U32(nfstest.NFS).U32(3).U32(0)
			return a.U32(flavor).Opaque(body).U32(verfFlavor).Opaque(verf).B
		}
	}
	sys := func(groups int) []byte {
		a := new(nfstest.Args).U32(1).Text("m").U32(0).U32(0).U32(uint32(groups))
		for range groups {
			a.U32(1)
		}
		return a.B
	}
	for what, v := range map[string]struct {
		msg  func(xid uint32) []byte
		want *nfstest.RPCError
	}{
		"AUTH_NONE":              {head(2, 0, nil, 0, nil), nil},
		"AUTH_SYS, 16 groups":    {head(2, 1, sys(16), 0, nil), nil},
		"RPC version 3":          {head(3, 0, nil, 0, nil), &nfstest.RPCError{Denied: true, Low: 2, High: 2}},
		"AUTH_SYS, 17 groups":    {head(2, 1, sys(17), 0, nil), &badCred},
		"AUTH_SYS, empty":        {head(2, 1, nil, 0, nil), &badCred},
		"AUTH_SYS, cut off":      {head(2, 1, sys(3)[:24], 0, nil), &badCred},
		"AUTH_SYS, long name":    {head(2, 1, new(nfstest.Args).U32(1).Text(strings.Repeat("m", 256)).U32(0).U32(0).U32(0).B, 0, nil), &badCred},
		"RPCSEC_GSS":             {head(2, 6, make([]byte, 20), 0, nil), &badCred},
		"credential of 404":      {head(2, 1, make([]byte, 404), 0, nil), &badCred},
		"AUTH_SYS with verifier": {head(2, 1, sys(0), 1, []byte{1}), &badVerf},
		"verifier of 404":        {head(2, 1, sys(0), 0, make([]byte, 404)), &badVerf},
	} {
		xid := c.NextXID()
		_, err := c.Send(xid, nfstest.Record(v.msg(xid)))
		if v.want == nil {
			wants(t, what, err, nil)
		} else {
			wantsRPC(t, what, err, *v.want)
		}
	}
	xid := c.NextXID()
	_, err := c.Send(xid, nfstest.Record(head(2, 1, sys(3), 0, nil)(xid)[:30]))
	wantsRPC(t, "message cut off in its head", err, garbage)
	wants(t, "after all that", c.Null(), nil)
}

// TestFragments sends one call in pieces, also empty ones.
func TestFragments(t *testing.T) {
	_, c, root := mounted(t, nfstest.NewMemory())
	f := must(c.Create(root, "f", false, &nfstest.Sattr{}))(t)
	data := bytes.Repeat([]byte("fragment"), 1<<17)
	for _, size := range []int{1, 100, 5000, 1 << 20} {
		p := data[:min(len(data), size*900)]
		xid := c.NextXID()
		args := new(nfstest.Args).Opaque(f.FH).U64(0).U32(uint32(len(p))).U32(nfstest.Unstable).Opaque(p)
		msg := nfstest.CallMessage(xid, nfstest.NFS, 3, 7, nfstest.Root, args.B)
		var stream []byte
		for len(msg) > size {
			stream = append(binary.BigEndian.AppendUint32(stream, uint32(size)), msg[:size]...)
			msg = msg[size:]
			if len(stream) < 10000 {
				stream = binary.BigEndian.AppendUint32(stream, 0)
			}
		}
		stream = append(stream, nfstest.Record(msg)...)
		if size == 1 {
			continue // more than a thousand of them is for TestHostileRecords
		}
		r, err := c.Send(xid, stream)
		if err != nil || r.U32() != 0 {
			t.Fatalf("fragments of %d bytes: %v", size, err)
		}
		if d := must(c.Read(f.FH, 0, uint32(len(p))))(t); !bytes.Equal(d.P, p) {
			t.Errorf("fragments of %d bytes: other data", size)
		}
	}
}

// TestHostileRecords sends what is no record of a call: the connection ends, the server does not.
func TestHostileRecords(t *testing.T) {
	r := serve(t, &nfs.Server{}, share(nfstest.NewMemory()))
	u32 := func(v ...uint32) (p []byte) {
		for _, v := range v {
			p = binary.BigEndian.AppendUint32(p, v)
		}
		return p
	}
	for words, p := range map[string][]byte{
		"more than 1052672 bytes":    u32(1<<31 | 1<<30),
		"more than 1052672":          append(u32(10), append(make([]byte, 10), u32(1<<31|1<<20+4<<10-9)...)...),
		"no RPC call":                u32(1<<31|8, 5, 1),
		"RPC call":                   u32(1 << 31),
		"is no RPC call":             u32(1<<31|4, 5),
		"more than 1024 fragments":   make([]byte, 4*1025),
		"unexpected EOF":             u32(1<<31|1000, 1, 0, 2),
		"unexpected EOF in the mark": append(u32(3), 1, 2, 3, 0)[:7],
	} {
		nc, err := net.Dial("tcp", r.addr())
		if err != nil {
			t.Fatal(err)
		}
		nc.Write(p)
		nc.(*net.TCPConn).CloseWrite()
		nc.SetReadDeadline(time.Now().Add(10 * time.Second))
		if rest, err := io.ReadAll(nc); err != nil && !errors.Is(err, syscall.ECONNRESET) || len(rest) != 0 {
			t.Errorf("%s: %d bytes and %v", words, len(rest), err)
		}
		nc.Close()
		words, _, _ = strings.Cut(words, " in the")
		r.log.has(t, words)
	}
}

func TestMount(t *testing.T) {
	m := nfstest.NewMemory()
	hidden := nfs.Export{Path: "/other", ID: 5, FS: m, Clients: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
	nested := nfs.Export{Path: "/ds/sub/nested", ID: 6, FS: m, Clients: []netip.Prefix{netip.MustParsePrefix("::ffff:127.0.0.0/104"), netip.MustParsePrefix("2001:db8::/32")}}
	r := serve(t, &nfs.Server{}, share(m), hidden, nested)
	c := r.dial(nfstest.Root)
	root, flavors, err := c.Mnt("/ds")
	if err != nil || !slices.Equal(flavors, []uint32{1, 0}) {
		t.Fatal(err, flavors)
	}
	sub := must(c.Mkdir(root, "sub", &nfstest.Sattr{}))(t)
	must(c.Create(root, "file", false, &nfstest.Sattr{}))(t)
	if fh := must(c.Mount("/ds/sub"))(t); !bytes.Equal(fh, sub.FH) {
		t.Error("another handle for a directory that is mounted")
	}
	if fh := must(c.Mount("//ds/./sub/"))(t); !bytes.Equal(fh, sub.FH) {
		t.Error("another handle for an untidy path")
	}
	must(c.Mount("/ds/sub/nested"))(t)
	for path, want := range map[string]error{
		"/nowhere":                        nfstest.NoEnt,
		"/":                               nfstest.NoEnt,
		"/dsx":                            nfstest.NoEnt,
		"/ds/nowhere":                     nfstest.NoEnt,
		"/ds/file":                        nfstest.NotDir,
		"/ds/file/sub":                    nfstest.NotDir,
		"ds":                              nfstest.Inval,
		"":                                nfstest.Inval,
		"/ds/a\x00b":                      nfstest.Inval,
		"/other":                          nfstest.Access,
		"/ds/" + strings.Repeat("a", 300): nfstest.NameTooLong,
		strings.Repeat("/ds", 400):        nfstest.NameTooLong,
	} {
		_, err := c.Mount(path)
		wants(t, "MNT "+path, err, want)
	}
	want := [][2]string{{"127.0.0.1", "/ds"}, {"127.0.0.1", "/ds/sub"}, {"127.0.0.1", "/ds/sub/nested"}}
	if list := must(c.Dump())(t); !slices.Equal(list, want) {
		t.Errorf("DUMP: %v", list)
	}
	wants(t, "Export of /", r.Export(nfs.Export{Path: "/", ID: 9, FS: m}), nil)
	must(c.Mount("/"))(t)
	must(c.Mount("/sub"))(t)
	wants(t, "MNT in /", second(c.Mount("/file/x")), nfstest.NotDir)
	wants(t, "Unexport of /", r.Unexport("/"), nil)
	wants(t, "UMNT of /", c.Umnt("/"), nil)
	wants(t, "UMNT of /sub", c.Umnt("/sub"), nil)
	list := must(c.Exports())(t)
	if len(list) != 2 || !slices.Equal(list[0], []string{"/ds", "127.0.0.0/8", "::1/128"}) || !slices.Equal(list[1], []string{"/ds/sub/nested", "127.0.0.0/8", "2001:db8::/32"}) {
		t.Errorf("EXPORT: %v", list)
	}
	clients := r.Clients("/ds")
	if len(clients) != 1 || clients[0].Conns != 1 || !slices.Equal(clients[0].Mounts, []string{"/ds", "/ds/sub"}) {
		t.Errorf("Clients: %+v", clients)
	}
	wants(t, "UMNT", c.Umnt("/ds/sub"), nil)
	wants(t, "UMNT of what is not mounted", c.Umnt("/nowhere"), nil)
	if list := must(c.Dump())(t); len(list) != 2 {
		t.Errorf("DUMP after UMNT: %v", list)
	}
	wants(t, "UMNTALL", c.Umntall(), nil)
	if list := must(c.Dump())(t); len(list) != 0 {
		t.Errorf("DUMP after UMNTALL: %v", list)
	}
	c.Close()
	for range 100 {
		if len(r.Clients("/ds")) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("Clients after the end: %+v", r.Clients("/ds"))
}

// TestMountErrors has an FS that fails.
func TestMountErrors(t *testing.T) {
	m := nfstest.NewMemory()
	var fail error
	m.Before = func(op string, _ nfs.ID) error {
		if op == "Lookup" {
			return fail
		}
		return nil
	}
	r, c, _ := mounted(t, m)
	for err, want := range map[error]error{syscall.EIO: nfstest.IO, syscall.EACCES: nfstest.Access, syscall.EPERM: nfstest.Perm,
		syscall.ESTALE: nfstest.NoEnt, syscall.ENOSPC: nfstest.Status(10006), errors.New("odd"): nfstest.IO} {
		fail = err
		_, got := c.Mount("/ds/a")
		wants(t, err.Error(), got, want)
	}
	r.log.has(t, "MNT: odd")
	r.log.has(t, "input/output error")
}

// TestPortmap asks the portmapper over TCP and UDP.
func TestPortmap(t *testing.T) {
	s := &nfs.Server{}
	if err := s.ListenPortmap("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	r := serve(t, s, share(nfstest.NewMemory()))
	nfsPort := uint32(r.Addr().(*net.TCPAddr).Port)
	addr := r.PortmapAddr().String()
	tcp, err := nfstest.Dial(addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	getport := func(prog, vers, proto uint32) []byte {
		return new(nfstest.Args).U32(prog).U32(vers).U32(proto).U32(0).B
	}
	calls := map[string]func(proc uint32, args []byte) (*nfstest.Results, error){
		"TCP": func(proc uint32, args []byte) (*nfstest.Results, error) {
			return tcp.Call(nfstest.Portmap, 2, proc, args)
		},
		"UDP": func(proc uint32, args []byte) (*nfstest.Results, error) {
			return callUDP(t, addr, nfstest.Portmap, 2, proc, args)
		},
	}
	for proto, call := range calls {
		for _, v := range []struct{ prog, vers, proto, want uint32 }{
			{nfstest.NFS, 3, 6, nfsPort}, {nfstest.Mount, 3, 6, nfsPort}, {nfstest.Mount, 3, 17, nfsPort},
			{nfstest.NFS, 3, 17, 0}, {nfstest.NFS, 4, 6, 0}, {nfstest.Mount, 1, 6, 0}, {100021, 4, 6, 0},
		} {
			res := must(call(3, getport(v.prog, v.vers, v.proto)))(t)
			if port := res.U32(); port != v.want || res.End() != nil {
				t.Errorf("%s: GETPORT %+v: %d", proto, v, port)
			}
		}
		for proc := range uint32(3) {
			args := getport(nfstest.NFS, 3, 6)
			if proc == 0 {
				args = nil
			}
			res := must(call(proc, args))(t)
			if proc > 0 && res.Bool() || res.End() != nil {
				t.Errorf("%s: procedure %d was done", proto, proc)
			}
		}
		res, n := must(call(4, nil))(t), 0
		for res.Bool() && res.Err == nil {
			res.Fixed(16)
			n++
		}
		if n != 5 || res.End() != nil {
			t.Errorf("%s: DUMP has %d lines, %v", proto, n, res.Err)
		}
		_, err := call(3, nil)
		wantsRPC(t, proto+": GETPORT of nothing", err, nfstest.RPCError{Stat: 4})
	}
	silent := must(net.Dial("tcp", addr))(t)
	defer silent.Close()
	silent.SetDeadline(time.Now().Add(10 * time.Second))
	silent.Write(nfstest.Record(nfstest.CallMessage(1, nfstest.Portmap, 2, 5, nil, nil)))
	silent.Write(nfstest.Record(nfstest.CallMessage(2, nfstest.Portmap, 2, 0, nil, nil)))
	if p := must(nfstest.ReadRecord(silent))(t); binary.BigEndian.Uint32(p) != 2 {
		t.Error("CALLIT was answered over TCP")
	}
	_, err = tcp.Call(nfstest.Portmap, 4, 3, nil)
	wantsRPC(t, "rpcbind 4", err, nfstest.RPCError{Stat: 2, Low: 2, High: 2})
	// MOUNT over UDP; NFS is not there.
	if _, err := callUDP(t, r.addr(), nfstest.Mount, 3, 3, new(nfstest.Args).Text("/ds").B); err != nil {
		t.Errorf("UMNT over UDP: %v", err)
	}
	_, err = callUDP(t, r.addr(), nfstest.NFS, 3, 0, nil)
	wantsRPC(t, "NFS over UDP", err, nfstest.RPCError{Stat: 1})

	if err := new(nfs.Server).ListenPortmap(addr); !errors.Is(err, nfs.ErrPortmapInUse) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second portmapper: %v", err)
	}
}

// callUDP sends a call, after one that is not answered (CALLIT) and one that is cut off.
func callUDP(t *testing.T, addr string, prog, vers, proc uint32, args []byte) (*nfstest.Results, error) {
	t.Helper()
	nc := must(net.Dial("udp", addr))(t)
	defer nc.Close()
	nc.Write([]byte{1, 2, 3, 4, 0, 0})
	nc.Write(nfstest.CallMessage(8, nfstest.Portmap, 2, 5, nil, nil))
	nc.Write(nfstest.CallMessage(9, prog, vers, proc, nfstest.Root, args))
	nc.SetReadDeadline(time.Now().Add(10 * time.Second))
	p := make([]byte, 9000)
	for {
		n, err := nc.Read(p)
		if err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint32(p) == 9 {
			return nfstest.ParseReply(p[:n])
		}
	}
}

// TestAddresses checks that a handle is no permission: the address is, at every call.
func TestAddresses(t *testing.T) {
	m := nfstest.NewMemory()
	r, c, root := mounted(t, m)
	wants(t, "GETATTR", second(c.Getattr(root)), nil)
	wants(t, "Unexport", r.Unexport("/ds"), nil)
	wants(t, "GETATTR when it is gone", second(c.Getattr(root)), nfstest.Stale)
	wants(t, "Unexport again", r.Unexport("/ds"), nfs.ErrNotExported)
	x := share(m)
	x.Clients = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}
	wants(t, "Export", r.Export(x), nil)
	wants(t, "Export again", r.Export(x), nfs.ErrExported)
	_, err := c.Getattr(root)
	wants(t, "GETATTR from elsewhere", err, nfstest.Access)
	_, err = c.Write(root, 0, nil, nfstest.Unstable)
	wants(t, "WRITE from elsewhere", err, nfstest.Access)
	_, err = c.Readdirplus(root, 0, 0, 1000, 1000)
	wants(t, "READDIRPLUS from elsewhere", err, nfstest.Access)
	wants(t, "Unexport", r.Unexport("/ds"), nil)
	wants(t, "Export", r.Export(share(m)), nil)
	wants(t, "GETATTR when it is back", second(c.Getattr(root)), nil)
	for _, bad := range []nfs.Export{{Path: "ds", FS: m}, {Path: "/a/../b", FS: m}, {Path: "/b"}, {Path: "/c", FS: readOnly{m}, Writable: true}, {Path: "/d", FS: m, Clients: make([]netip.Prefix, 1)}} {
		if err := r.Export(bad); err == nil {
			t.Errorf("%q was exported", bad.Path)
		}
	}
	if list := r.Exports(); len(list) != 1 || list[0].Path != "/ds" {
		t.Errorf("Exports: %v", list)
	}
}

// readOnly hides that an FS can be changed.
type readOnly struct{ nfs.FS }

func second[T any](_ T, err error) error { return err }
