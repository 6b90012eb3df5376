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
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nbd"
	"github.com/holdfast-backup/holdfast/fs/overlay"
	"github.com/holdfast-backup/holdfast/store"
)

const exportHelp = `With --nbd each disk of the point is an export of its name, raw; a single one is the default export, too. ADDRESS is
unix:PATH, HOST:PORT or :PORT. Without TLS anybody who can reach a port can read the disks.
With --nfs (NFS version 3, HOST:PORT or :PORT) the export is called like the VM, /web, and has the disks as raw files,
VMDK, VHDX and qcow2, and the configuration. Only this computer may mount it unless --allow names others; their root is
nobody, unless --no-root-squash. Clients ask a portmapper at port 111 for the port: holdfast answers there if nobody else
does and it may.
It runs until SIGINT or SIGTERM. With --writable, what is written goes to an overlay and never to the point; it is gone at the end, unless --overlay
names a directory for it, which the same command finds again. Up to 256 MiB of what was read is kept in memory.
` + pointHelp

func exportFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "nbd", Usage: "serve NBD at `ADDRESS`"},
		&cli.StringFlag{Name: "nfs", Usage: "serve NFS at `ADDRESS`, HOST:PORT or :PORT; the usual port is 2049"},
		&cli.StringFlag{Name: "portmap", Value: "auto", Usage: "with --nfs, `ADDRESS` of the portmapper: auto, off, HOST:PORT or :PORT"},
		&cli.StringSliceFlag{Name: "allow", Usage: "with --nfs, `ADDRESS` or network (192.0.2.0/24) that may mount it; may be repeated"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "no-root-squash", Usage: "with --nfs, root of a client is root; ESXi needs it"},
		&cli.StringFlag{Name: "disk", Usage: "only this `DISK` of the point, such as disk0"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "writable", Usage: "let clients write, to an overlay"},
		&cli.StringFlag{Name: "overlay", TakesFile: true, Usage: "`DIR` that keeps what is written"},
		&cli.StringFlag{Name: "tls-cert", TakesFile: true, Usage: "`FILE` with the certificate of the server (PEM): all clients must use TLS"},
		&cli.StringFlag{Name: "tls-key", TakesFile: true, Usage: "`FILE` with its key"},
		&cli.StringFlag{Name: "tls-ca", TakesFile: true, Usage: "`FILE` with the authorities whose certificates clients must show"},
	}
}

func checkExport(c *call) error {
	if c.String("nbd") == "" && c.String("nfs") == "" {
		return usagef("export: how? --nbd or --nfs is missing")
	}
	for _, flag := range []string{"nbd", "nfs"} {
		if addr := c.String(flag); addr == "" {
			continue
		} else if path, unix := strings.CutPrefix(addr, "unix:"); unix && path == "" {
			return usagef("export: --%s: the path of the socket is missing", flag)
		} else if _, port, err := net.SplitHostPort(addr); !unix && (err != nil || port == "") {
			return withHint(usagef("export: --%s: %q is no address", flag, addr), "write unix:PATH, HOST:PORT or :PORT")
		}
	}
	if strings.HasPrefix(c.String("nfs"), "unix:") {
		return withHint(usagef("export: --nfs: no NFS client knows unix sockets"), "write HOST:PORT or :PORT")
	}
	for _, flag := range []string{"portmap", "allow", "no-root-squash"} {
		if c.IsSet(flag) && c.String("nfs") == "" {
			return usagef("export: --%s goes with --nfs", flag)
		}
	}
	if c.String("nbd") == "" && c.String("tls-cert")+c.String("tls-key")+c.String("tls-ca") != "" {
		return usagef("export: TLS goes with --nbd")
	}
	if _, err := c.allowed(); err != nil {
		return err
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
	Address  string        `json:"address,omitempty"` // of NBD
	Exports  []string      `json:"exports"`
	Writable bool          `json:"writable"`
	TLS      bool          `json:"tls"`
	NFS      *exportedNFS  `json:"nfs,omitempty"`
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
		disks, err := c.openDisks(r, p)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, disks.close()) }()
		out := exported{Type: "export", ID: p.ID, Path: p.Path(), Writable: c.Bool("writable")}
		for _, d := range disks.list {
			out.Exports = append(out.Exports, d.name)
		}
		var serve []func(context.Context) error
		if c.String("nbd") != "" {
			run, err := c.exportNBD(p, disks, &out)
			if err != nil {
				return err
			}
			serve = append(serve, run)
		}
		if c.String("nfs") != "" {
			run, err := c.exportNFS(ctx, r, sum, p, disks, &out)
			if err != nil {
				return err
			}
			serve = append(serve, run)
		}
		if err := errors.Join(c.out.object(out), c.out.flush()); err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		for _, run := range serve {
			g.Go(func() error { return run(ctx) })
		}
		return g.Wait()
	})
}

// exportNBD begins to listen, and gives what serves.
func (c *call) exportNBD(p *store.Point, disks *openedDisks, out *exported) (run func(context.Context) error, err error) {
	srv := &nbd.Server{Log: func(err error) { c.progress.warn("%v", err) }}
	if srv.TLS, err = c.exportTLS(); err != nil {
		return nil, err
	}
	srv.RequireTLS = srv.TLS != nil
	for _, d := range disks.list {
		e := nbd.Export{Name: d.name, Description: p.Path() + " " + d.name, Disk: d.image}
		if d.overlay != nil {
			e.Disk, e.Writable = d.overlay, true
		}
		srv.Exports = append(srv.Exports, e)
	}
	ln, err := nbd.Listen(c.String("nbd"))
	if err != nil {
		return nil, err
	}
	out.Address, out.TLS = ln.Addr().String(), srv.RequireTLS
	c.out.line("%s: %s served by NBD at %s", p.Path(), strings.Join(out.Exports, ", "), out.Address)
	return func(ctx context.Context) error { return srv.Serve(ctx, ln) }, nil
}

// cacheBytes is how much of what clients of a server read, or will read next, is kept decoded: a 16th of the machine's memory, from 256 MiB to 2 GiB.
func cacheBytes() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 256 << 20
	}
	return min(max(int64(info.Totalram)*int64(info.Unit)/16, 256<<20), 2<<30)
}

// openedDisk is a disk that is exported.
type openedDisk struct {
	name    string
	image   *store.CachedImage
	overlay *overlay.Disk // nil unless clients may write
}

// openedDisks are the disks of a point that are exported, and where what clients write is kept; dir is empty when they cannot.
type openedDisks struct {
	dir     string
	list    []openedDisk
	closers []func() error // the last first
}

func (o *openedDisks) close() error {
	var errs []error
	for _, f := range slices.Backward(o.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// openDisks opens the disks that are exported.
func (c *call) openDisks(r *store.Repo, p *store.Point) (_ *openedDisks, err error) {
	o := &openedDisks{dir: c.String("overlay")}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	if c.Bool("writable") && o.dir == "" {
		if o.dir, err = o.scratch(); err != nil {
			return nil, err
		}
	}
	disks, err := c.chosenDisks(p)
	if err != nil {
		return nil, err
	}
	cache := store.NewCache(cacheBytes())
	for i := range disks {
		d := &disks[i]
		whole, err := r.OpenDisk(p, d.Name)
		if err != nil {
			return nil, err
		}
		x := openedDisk{name: d.Name, image: whole.Ahead(cache)}
		if c.IsSet("nfs") { // clients read ahead themselves, and read again what they do not keep
			x.image = whole.Kept(cache)
		}
		if c.Bool("writable") {
			if x.overlay, err = openOverlay(filepath.Join(o.dir, d.Name), x.image, overlay.Options{Base: p.ID.String() + "/" + d.Name}); err != nil {
				return nil, err
			}
			o.closers = append(o.closers, x.overlay.Close)
		}
		o.list = append(o.list, x)
	}
	return o, nil
}

const scratchName = "holdfast-export-"

// scratch makes a directory that is removed at the end, or, after a kill, by the next export.
func (o *openedDisks) scratch() (string, error) {
	left, _ := filepath.Glob(filepath.Join(os.TempDir(), scratchName+"*"))
	for _, dir := range left {
		if lock, err := lockScratch(dir); err == nil { // nobody has it
			os.RemoveAll(dir)
			lock.Close()
		}
	}
	for {
		dir, err := os.MkdirTemp("", scratchName)
		if err != nil {
			return "", err
		}
		lock, err := lockScratch(dir)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EWOULDBLOCK) {
			continue // somebody took it for one that was left
		}
		if err != nil {
			return "", err
		}
		o.closers = append(o.closers, lock.Close, func() error { return os.RemoveAll(dir) })
		return dir, nil
	}
}

// lockScratch makes this process the one that a directory belongs to.
func lockScratch(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err == nil && int(st.Uid) != os.Geteuid() {
		err = os.ErrPermission
	}
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
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
