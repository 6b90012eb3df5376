package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/folder"
	"github.com/holdfast-backup/holdfast/fs/nfs/point"
	"github.com/holdfast-backup/holdfast/store"
)

// exportedNFS is the NFS part of `export --json`.
type exportedNFS struct {
	Address string `json:"address"`
	Export  string `json:"export"`
	Portmap string `json:"portmap,omitempty"` // address; missing when clients must be told the port
}

// allowed are the addresses that --allow names.
func (c *call) allowed() ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, text := range c.StringSlice("allow") {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(text); err == nil {
				p = netip.PrefixFrom(a, a.BitLen())
			}
		}
		if err != nil {
			return nil, withHint(usagef("export: --allow: %q is no address", text), "write 192.0.2.7 or 192.0.2.0/24")
		}
		list = append(list, p.Masked())
	}
	return list, nil
}

// exportNFS begins to listen, and gives what serves.
func (c *call) exportNFS(ctx context.Context, r *store.Repo, sum store.Summary, p *store.Point, disks *openedDisks, out *exported) (run func(context.Context) error, err error) {
	opt := point.Options{Only: c.String("disk")}
	if c.Bool("writable") {
		opt.Writable = map[string]point.Disk{}
	}
	raw := map[string]folder.Content{}
	for _, d := range disks.list {
		if raw[d.name] = d.image; d.overlay != nil {
			opt.Writable[d.name] = d.overlay
		}
	}
	opt.Raw = func(disk string) folder.Content { return raw[disk] }
	dir := disks.dir
	if dir == "" {
		if dir, err = disks.scratch(); err != nil {
			return nil, err
		}
	}
	tree := fs.New(r)
	disks.closers = append(disks.closers, func() error { tree.Close(); return nil })
	f, err := point.Open(ctx, tree.Point(sum), filepath.Join(dir, "nfs"), opt)
	if err != nil {
		return nil, err
	}
	disks.closers = append(disks.closers, f.Close)
	clients, err := c.allowed()
	if err != nil {
		return nil, err
	}
	srv := &nfs.Server{Log: func(err error) { c.progress.warn("%v", err) }}
	disks.closers = append(disks.closers, srv.Close)
	x := nfs.Export{Path: "/" + strings.ReplaceAll(p.VM.Name, "/", "_"), ID: point.ID(p.ID), FS: f, Writable: c.Bool("writable"), Clients: clients, NoRootSquash: c.Bool("no-root-squash")}
	if err := srv.Export(x); err != nil {
		return nil, err
	}
	if err := srv.Listen(c.String("nfs")); err != nil {
		return nil, err
	}
	out.NFS = &exportedNFS{Address: srv.Addr().String(), Export: x.Path}
	if err := c.listenPortmap(srv); err != nil {
		return nil, err
	}
	if at := srv.PortmapAddr(); at != nil {
		out.NFS.Portmap = at.String()
	}
	c.out.line("%s: served by NFS at %s, export %s", p.Path(), out.NFS.Address, x.Path)
	return srv.Serve, nil
}

// listenPortmap opens the portmapper, where that is asked for or can be.
func (c *call) listenPortmap(srv *nfs.Server) error {
	switch at := c.String("portmap"); at {
	case "off":
		return nil
	case "auto":
		host, _, err := net.SplitHostPort(c.String("nfs"))
		if err != nil {
			return err
		}
		if err := srv.ListenPortmap(net.JoinHostPort(host, "111")); err != nil {
			why := "it may not be opened"
			if errors.Is(err, nfs.ErrPortmapInUse) {
				why = "another program answers there"
			}
			c.progress.warn("no portmapper at port 111 (%s): clients must be told the port of NFS, which is that of MOUNT, too", why)
		}
		return nil
	default:
		return srv.ListenPortmap(at)
	}
}
