package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/fs/nbd"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/store"
)

const exportHelp = `Each disk of the point is an export of its name, raw; a single one is the default export, too. It runs until
SIGINT or SIGTERM. ADDRESS is unix:PATH, HOST:PORT or :PORT. Without TLS anybody who can reach a port can read the
disks. With --writable, what is written goes to an overlay and never to the point; it is gone at the end, unless --overlay
names a directory for it, which the same command finds again. Up to 256 MiB of what was read is kept in memory.
` + pointHelp

func exportFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "nbd", Usage: "serve NBD at `ADDRESS`"},
		&cli.StringFlag{Name: "disk", Usage: "only this `DISK` of the point, such as disk0"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "writable", Usage: "let clients write, to an overlay"},
		&cli.StringFlag{Name: "overlay", TakesFile: true, Usage: "`DIR` that keeps what is written"},
		&cli.StringFlag{Name: "tls-cert", TakesFile: true, Usage: "`FILE` with the certificate of the server (PEM): all clients must use TLS"},
		&cli.StringFlag{Name: "tls-key", TakesFile: true, Usage: "`FILE` with its key"},
		&cli.StringFlag{Name: "tls-ca", TakesFile: true, Usage: "`FILE` with the authorities whose certificates clients must show"},
	}
}

func checkExport(c *call) error {
	if c.String("nbd") == "" {
		return usagef("export: how? --nbd is missing")
	}
	if path, unix := strings.CutPrefix(c.String("nbd"), "unix:"); unix && path == "" {
		return usagef("export: --nbd: the path of the socket is missing")
	} else if _, port, err := net.SplitHostPort(c.String("nbd")); !unix && (err != nil || port == "") {
		return withHint(usagef("export: --nbd: %q is no address", c.String("nbd")), "write unix:PATH, HOST:PORT or :PORT")
	}
	if c.String("overlay") != "" && !c.Bool("writable") {
		return usagef("export: --overlay goes with --writable")
	}
	if (c.String("tls-cert") == "") != (c.String("tls-key") == "") {
		return usagef("export: --tls-cert and --tls-key go together")
	}
	if c.String("tls-ca") != "" && c.String("tls-cert") == "" {
		return usagef("export: --tls-ca goes with --tls-cert")
	}
	return nil
}

// exported is the object of `export --json`.
type exported struct {
	Type     string        `json:"type"` // "export"
	ID       store.PointID `json:"id"`
	Path     string        `json:"path"`
	Address  string        `json:"address"`
	Exports  []string      `json:"exports"`
	Writable bool          `json:"writable"`
	TLS      bool          `json:"tls"`
}

func runExport(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) (err error) {
		sum, err := r.Find(ctx, c.args[0])
		if err != nil {
			return err
		}
		p, release, err := r.Hold(ctx, sum.ID)
		if err != nil {
			return err
		}
		defer release()
		srv := &nbd.Server{Log: func(err error) { c.progress.warn("%v", err) }}
		if srv.TLS, err = c.exportTLS(); err != nil {
			return err
		}
		srv.RequireTLS = srv.TLS != nil
		exports, closeAll, err := c.exportsOf(r, p)
		defer func() { err = errors.Join(err, closeAll()) }()
		if err != nil {
			return err
		}
		srv.Exports = exports
		ln, err := nbd.Listen(c.String("nbd"))
		if err != nil {
			return err
		}
		out := exported{Type: "export", ID: p.ID, Path: p.Path(), Address: ln.Addr().String(), Writable: c.Bool("writable"), TLS: srv.RequireTLS}
		for _, e := range exports {
			out.Exports = append(out.Exports, e.Name)
		}
		c.out.line("%s: %s served by NBD at %s", p.Path(), strings.Join(out.Exports, ", "), out.Address)
		if err := errors.Join(c.out.object(out), c.out.flush()); err != nil {
			ln.Close()
			return err
		}
		return srv.Serve(ctx, ln)
	})
}

// exportCache is how much of what clients read, or will read next, is kept decoded, bytes.
const exportCache = 256 << 20

// exportsOf opens the disks. closeAll is never nil.
func (c *call) exportsOf(r *store.Repo, p *store.Point) (list []nbd.Export, closeAll func() error, err error) {
	var closers []func() error
	closeAll = func() error {
		var errs []error
		for _, f := range closers {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	dir := c.String("overlay")
	if c.Bool("writable") && dir == "" {
		if dir, err = os.MkdirTemp("", "holdfast-export-"); err != nil {
			return nil, closeAll, err
		}
		defer func() { closers = append(closers, func() error { return os.RemoveAll(dir) }) }()
	}
	disks, err := c.chosenDisks(p)
	if err != nil {
		return nil, closeAll, err
	}
	cache := store.NewCache(exportCache)
	for i := range disks {
		d := &disks[i]
		whole, err := r.OpenDisk(p, d.Name)
		if err != nil {
			return nil, closeAll, err
		}
		img := whole.Ahead(cache)
		e := nbd.Export{Name: d.Name, Description: p.Path() + " " + d.Name, Disk: img}
		if c.Bool("writable") {
			o, err := openOverlay(filepath.Join(dir, d.Name), img, overlay.Options{Base: p.ID.String() + "/" + d.Name})
			if err != nil {
				return nil, closeAll, err
			}
			closers = append(closers, o.Close)
			e.Disk, e.Writable = o, true
		}
		list = append(list, e)
	}
	return list, closeAll, nil
}

// openOverlay opens an overlay, or makes it.
func openOverlay(dir string, img overlay.Image, opt overlay.Options) (*overlay.Disk, error) {
	o, err := overlay.Open(dir, img, opt)
	if errors.Is(err, os.ErrNotExist) {
		return overlay.Create(dir, img, opt)
	}
	return o, err
}

// exportTLS is nil without --tls-cert.
func (c *call) exportTLS() (*tls.Config, error) {
	if c.String("tls-cert") == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(c.String("tls-cert"), c.String("tls-key"))
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	file := c.String("tls-ca")
	if file == "" {
		return cfg, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	cfg.ClientCAs, cfg.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !cfg.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate in PEM", file)
	}
	return cfg, nil
}
