package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/fs/boot/qemu"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

const bootHelp = `boot POINT --on qemu   run the VM of a restore point, within seconds; what it writes goes to an overlay, the
                       point stays as it is. It has no network unless --network says so.
boot ls                list the VMs that were booted
boot stop NAME         end one, and drop what it wrote; with --keep only end it
boot resume NAME       run one again that was kept, or serve its disks again when holdfast was ended
boot commit NAME       make a new restore point of what it is now; only what it wrote is stored
boot migrate NAME --to FILE
                       move its disk to a raw file while it runs, and let it go on from there
boot screenshot NAME --to FILE
                       what is on its screen, as PNG
boot POINT --on SOURCE run it on a platform of the config: a host there mounts an NFS export of holdfast and starts the VM
                       from it. Its network cards are not connected unless --connect says so. ls, stop, and
                       migrate --to DATASTORE, after which the VM is the platform's alone
boot serve             serve NFS for such boots; it is started when it is needed, and by whoever watches over services
Without --background it runs until the VM ends, SIGINT or SIGTERM, which shut the VM down; what it wrote is kept.
` + pointHelp

// bootActions are what boot takes besides a point.
func bootActions() []string {
	return []string{"ls", "stop", "resume", "commit", "migrate", "screenshot", "serve"}
}

func bootFlags() []cli.Flag {
	return append([]cli.Flag{
		&cli.StringFlag{Name: "on", Usage: "`HOST` that runs the VM: qemu, on this computer, or a source of the config"},
		&cli.StringFlag{Name: "name", Usage: "`NAME` of the boot; that of the VM by default"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "background", Usage: "return as soon as the VM runs"},
		&cli.StringFlag{Name: "network", Value: "none", Usage: "`NETWORK` that its cards are plugged into: none, user, bridge:NAME"},
		&cli.StringFlag{Name: "vnc", Usage: "`ADDRESS` where its screen is shown, HOST:PORT with a port from 5900 on; anybody may connect"},
		&cli.StringFlag{Name: "boots", EnvVars: []string{"HOLDFAST_BOOTS"}, TakesFile: true, Usage: "`DIR` where boots are kept, with what the VMs write"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "keep", Usage: "stop: keep what the VM wrote"},
		&cli.DurationFlag{Name: "patience", Value: time.Minute, Usage: "`TIME` that the VM has to shut down before it is switched off; 0s: none"},
		&cli.StringSliceFlag{Name: "tag", Usage: "commit: `TEXT` to keep with the restore point; may be repeated"},
		&cli.StringFlag{Name: "to", TakesFile: true, Usage: "migrate, screenshot: `FILE` to make"},
		&cli.StringFlag{Name: "disk", Usage: "migrate: `DISK`, when there are several"},
	}, append(platformBootFlags(), machineFlags()...)...)
}

// bootTakes lists the flags of each action; boot POINT takes those of "".
func bootTakes(action string) []string {
	switch action {
	case "stop":
		return []string{"boots", "keep", "patience", "nfs", "portmap"}
	case "resume":
		return []string{"boots", "background", "patience", "nfs", "portmap"}
	case "commit":
		return []string{"boots", "tag"}
	case "migrate":
		return []string{"boots", "to", "disk", "nfs", "portmap"}
	case "screenshot":
		return []string{"boots", "to"}
	case "ls":
		return []string{"boots", "nfs", "portmap"}
	case "serve":
		return []string{"boots", "nfs", "portmap", "idle"}
	}
	return []string{"on", "name", "background", "memory", "cpus", "firmware", "bus", "network", "vnc", "boots", "patience",
		"host", "folder", "pool", "connect", "keep-identity", "nfs", "portmap", "nfs-address", "allow"}
}

// bootAction splits the arguments: an action and what follows, or "" and a point.
func (c *call) bootAction() (action string, rest []string) {
	if slices.Contains(bootActions(), c.args[0]) {
		return c.args[0], c.args[1:]
	}
	return "", c.args
}

func checkBoot(c *call) error {
	action, rest := c.bootAction()
	want, what := 1, "boot "+action
	if action == "ls" || action == "serve" {
		want = 0
	}
	switch {
	case len(rest) < want:
		return withHint(usagef("%s: which one?", what), "'holdfast boot ls' shows the names")
	case len(rest) > want:
		return usagef("%s: too many arguments", strings.TrimSpace(what))
	}
	takes := bootTakes(action)
	for _, f := range bootFlags() {
		name := f.Names()[0]
		if c.given(f) && !slices.Contains(takes, name) {
			return usagef("%s takes no --%s", strings.TrimSpace(what), name)
		}
	}
	switch action {
	case "":
		if on := c.String("on"); on == "" {
			return usagef("boot: on what? --on is missing")
		} else if on != "qemu" {
			return c.checkPlatformBoot()
		}
		for _, f := range platformBootFlags() {
			if name := f.Names()[0]; c.given(f) && name != "idle" {
				return usagef("boot --on qemu takes no --%s", name)
			}
		}
		if _, err := c.bootMemory(""); err != nil {
			return err
		}
		if _, err := c.bootCPUs(""); err != nil {
			return err
		}
	case "migrate", "screenshot":
		if c.String("to") == "" {
			return usagef("boot %s: where to? --to is missing", action)
		}
	}
	return nil
}

// given reports whether a flag is on the command line: one of the environment is for the commands that take it.
func (c *call) given(f cli.Flag) bool {
	if !c.IsSet(f.Names()[0]) {
		return false
	}
	d, ok := f.(cli.DocGenerationFlag)
	return !ok || !slices.ContainsFunc(d.GetEnvVars(), func(name string) bool { return os.Getenv(name) != "" })
}

func runBoot(ctx context.Context, c *call) error {
	action, rest := c.bootAction()
	if action != "serve" {
		if err := c.sweepBoots(); err != nil {
			c.progress.warn("%v", err)
		}
		if err := c.settleBoots(ctx, action == "ls"); err != nil {
			return err
		}
	}
	switch action {
	case "serve":
		return c.serveNFS(ctx)
	case "ls":
		return c.listBoots(ctx)
	case "stop":
		return c.stopBoot(ctx, rest[0])
	case "resume":
		return c.resumeBoot(ctx, rest[0])
	case "commit":
		return c.commitBoot(ctx, rest[0])
	case "migrate":
		return c.migrateBoot(ctx, rest[0])
	case "screenshot":
		return c.shootBoot(ctx, rest[0])
	}
	if c.String("on") != "qemu" {
		return c.bootOnPlatform(ctx)
	}
	return c.bootPoint(ctx)
}

// sweepBoots removes what is left of boots whose command was killed while it made or removed them.
func (c *call) sweepBoots() error {
	root, err := c.bootsDir()
	if err != nil {
		return err
	}
	return boot.Sweep(root)
}

// bootsDir is where boots are kept.
func (c *call) bootsDir() (string, error) {
	if dir := c.String("boots"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := stateDir()
	return filepath.Join(dir, "boots"), err
}

func (c *call) findBoot(name string) (*boot.State, error) {
	root, err := c.bootsDir()
	if err != nil {
		return nil, err
	}
	return boot.Find(root, name)
}

// setting is a flag, or else what the config file says.
func (c *call) setting(flag, config string) string {
	if s := c.String(flag); s != "" && (s != "auto" || c.IsSet(flag)) {
		return s
	}
	return config
}

// bootMemory is the memory of a VM, bytes; 0 as it had.
func (c *call) bootMemory(config string) (int64, error) {
	s := c.setting("memory", config)
	if s == "" {
		return 0, nil
	}
	n, err := byteSize(s)
	if err != nil || n < 32<<20 || n > 16<<40 {
		return 0, usagef("--memory: %q is no size of a memory", s)
	}
	return n, nil
}

// bootCPUs is the number of its processors; 0 as it had.
func (c *call) bootCPUs(config string) (int, error) {
	s := c.setting("cpus", config)
	if s == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 255 {
		return 0, usagef("--cpus: %q is no number of processors", s)
	}
	return n, nil
}

func (c *call) bootPoint(ctx context.Context) error {
	if err := c.resolve(needRepository); err != nil {
		return err
	}
	if !inBackground() && c.Bool("background") {
		return c.bootInBackground(ctx, c.bootWords())
	}
	say := reporter()
	err := c.withRepo(ctx, func(r *store.Repo) error {
		root, err := c.bootsDir()
		if err != nil {
			return err
		}
		sum, err := r.Find(ctx, c.args[0])
		if err != nil {
			return err
		}
		host := &qemu.Host{}
		opt, err := c.machineOf(ctx, r, sum.ID, host)
		if err != nil {
			return err
		}
		s, err := boot.Create(ctx, root, r, sum.ID, opt)
		if err != nil {
			return err
		}
		defer s.Close()
		if s.Unpinned != nil {
			c.progress.warn("%s: nothing keeps its point from being forgotten: %v", s.Name, s.Unpinned)
		}
		err = c.serveBoot(ctx, s, host, say)
		if err != nil && !s.Started() {
			// Nothing ran yet: nothing is lost.
			err = errors.Join(err, s.Discard(context.WithoutCancel(ctx)))
		}
		return err
	})
	say("", err)
	return err
}

// bootWords is the command line for the process in the background.
func (c *call) bootWords() []string {
	words := []string{"boot"}
	for _, name := range []string{"on", "name", "memory", "cpus", "firmware", "bus", "network", "vnc", "boots"} {
		if c.IsSet(name) {
			words = append(words, "--"+name+"="+fmt.Sprint(c.Value(name)))
		}
	}
	return append(words, "--patience="+c.Duration("patience").String(), "--", c.args[0])
}

// bootInBackground leaves a process that serves the VM and says which it is.
func (c *call) bootInBackground(ctx context.Context, words []string) error {
	id, _, err := c.goBackground(ctx, words)
	if err != nil {
		return err
	}
	if id == "" {
		return errors.New("the process in the background ended before the VM ran")
	}
	s, err := c.findBoot(id)
	if err != nil {
		return err
	}
	return c.showBoot(s)
}

// serveBoot runs the VM of a session to its end.
func (c *call) serveBoot(ctx context.Context, s *boot.Session, host boot.Host, say func(string, error)) error {
	drop, err := s.Run(ctx, host, boot.RunOptions{
		Ready: func(st *boot.State) {
			if !inBackground() {
				c.showBoot(st)
				c.out.flush()
			}
			say(st.ID, nil)
		},
		Log: func(err error) {
			if errors.Is(err, bucket.ErrReadOnly) { // what is read ahead the next time is a hint only
				c.progress.detail("%s: %v", s.Name, err)
				return
			}
			c.progress.warn("%s: %v", s.Name, err)
		},
		Commit: func(ctx context.Context, s *boot.Session, tags []string) (any, error) {
			return c.commitSession(ctx, s, tags)
		},
		Patience: c.Duration("patience"),
	})
	if err != nil || !drop {
		if s.Started() && !inBackground() {
			c.progress.note("%s has ended; what it wrote is kept: 'holdfast boot resume %s', 'boot commit %s' or 'boot stop %s'", s.Name, s.Name, s.Name, s.Name)
		}
		return err
	}
	return s.Discard(context.WithoutCancel(ctx))
}

// bootInfo is what is said of a boot.
type bootInfo struct {
	Type    string        `json:"type"` // "boot"
	ID      string        `json:"id"`
	Name    string        `json:"name"`
	Point   store.PointID `json:"point"`
	Path    string        `json:"path"`
	Host    string        `json:"host"`
	State   string        `json:"state"` // "running", "waiting" for its disks, "stopped"; on a platform also "off", "gone", "unknown", and the steps in between
	Created time.Time     `json:"created"`
	Dir     string        `json:"dir"`
	PID     int           `json:"pid,omitempty"`
	Stored  int64         `json:"bytes_overlay"`
	Serial  string        `json:"serial,omitempty"`
	Log     string        `json:"serial_log,omitempty"`
	Screen  string        `json:"vnc,omitempty"`
	NBD     string        `json:"nbd,omitempty"`
	NFS     string        `json:"nfs,omitempty"` // path of the export, on a platform
	Clients []string      `json:"clients,omitempty"`
}

func infoOf(s *boot.State) bootInfo {
	if s.Export != nil {
		return bootInfo{Type: "boot", ID: s.ID, Name: s.Name, Point: s.Point, Path: s.Path, Host: s.Host, Created: s.Created, Dir: s.Dir(),
			State: map[boot.Step]string{boot.StepRunning: "running", boot.StepKept: "stopped"}[s.Step], Stored: s.Stored(), NFS: s.Export.Path}
	}
	i := bootInfo{Type: "boot", ID: s.ID, Name: s.Name, Point: s.Point, Path: s.Path, Host: s.Host, Created: s.Created, Dir: s.Dir(),
		PID: s.Process.PID, Serial: "unix:" + s.File(qemu.SerialSocket), Log: s.File(boot.SerialLog), Screen: s.Machine.VNC, NBD: "unix:" + s.File(boot.NBDSocket)}
	if i.Screen == "" {
		i.Screen = "unix:" + s.File(qemu.ScreenSocket)
	}
	i.State = "stopped"
	switch alive := qemu.Runs(s); {
	case alive && s.Served():
		i.State = "running"
	case alive:
		i.State = "waiting"
	}
	i.Stored = s.Stored()
	return i
}

// showBoot says how a VM that runs can be reached.
func (c *call) showBoot(s *boot.State) error {
	i := infoOf(s)
	c.out.line("%s: %s runs in %s, from %s", i.Name, i.Path, i.Host, i.Dir)
	c.out.line("  screen: %s", i.Screen)
	c.out.line("  serial: %s, log %s", i.Serial, i.Log)
	c.out.line("  end it with 'holdfast boot stop %s', which drops what it wrote", i.Name)
	return c.out.object(i)
}

func (c *call) listBoots(ctx context.Context) error {
	root, err := c.bootsDir()
	if err != nil {
		return err
	}
	list, err := boot.List(root)
	t := newTable("NAME", "POINT", "ON", "STATE", "SINCE", ">WRITTEN", "CLIENTS")
	clients := c.nfsClients(ctx, root, list)
	for _, s := range list {
		i := infoOf(s)
		if i.Clients = clients[i.ID]; i.State == "" {
			i.State = string(s.Step)
		}
		if s.Export != nil && s.Step == boot.StepRunning {
			i.State = seenState(c.seen[s.ID])
		}
		t.row(i.Name, i.Path, i.Host, i.State, i.Created.Format("2006-01-02 15:04:05Z"), sizeText(i.Stored), strings.Join(i.Clients, " "))
		if err := c.out.object(i); err != nil {
			return err
		}
	}
	if len(t.rows) > 0 {
		c.out.table(t)
	}
	return err
}

// seenState says how a VM is that was started on a platform.
func seenState(seen *boot.RemoteState) string {
	switch {
	case seen == nil:
		return "unknown" // why was said
	case !seen.Registered:
		return "gone"
	case !seen.On:
		return "off"
	}
	return "running"
}

func (c *call) stopBoot(ctx context.Context, name string) error {
	s, err := c.findBoot(name)
	if err != nil {
		return err
	}
	how := boot.StopRequest{Patience: c.Duration("patience"), Keep: c.Bool("keep")}
	if s.Export != nil {
		err = c.stopOnPlatform(ctx, s, how)
		how.Keep = !s.Ended()
	} else if s.Served() {
		if err = s.AskStop(ctx, how); err == nil {
			c.progress.detail("%s shuts down", s.Name)
			err = s.AwaitEnd(ctx)
		}
	} else {
		err = c.stopUnserved(ctx, s, how)
	}
	if err != nil {
		return err
	}
	switch {
	case s.Away:
		c.out.line("%s had been moved away: it is the platform's alone, with what it wrote", s.Name)
	case how.Keep:
		c.out.line("%s has ended; what it wrote is kept", s.Name)
	default:
		c.out.line("%s has ended; what it wrote is dropped", s.Name)
	}
	return c.out.object(struct {
		Type  string `json:"type"`
		Name  string `json:"name"`
		Kept  bool   `json:"kept"`
		Moved bool   `json:"moved,omitempty"` // it was moved away before
	}{"boot stop", s.Name, how.Keep, s.Away})
}

// stopUnserved ends a VM whose disks nobody serves: it cannot shut down, only be switched off.
func (c *call) stopUnserved(ctx context.Context, s *boot.State, how boot.StopRequest) error {
	g, err := (&qemu.Host{}).Attach(ctx, s)
	if err == nil {
		err = g.Stop(ctx, 0)
		g.Close()
	}
	if err != nil && !errors.Is(err, boot.ErrGone) {
		return err
	}
	if how.Keep {
		return nil
	}
	if err := s.Remove(); err != nil {
		return err
	}
	c.unpin(ctx, s)
	return nil
}

// unpin lets the point of a boot that was removed be forgotten.
func (c *call) unpin(ctx context.Context, s *boot.State) {
	err := c.withRepositoryOf(ctx, s, func(r *store.Repo) error { return s.Unpin(ctx, r) })
	if err != nil {
		c.progress.detail("%s: its point can be forgotten from this computer only, since the repository cannot be reached: %v", s.Name, err)
	}
}

// withRepositoryOf opens the repository of a boot, whichever the command's own is.
func (c *call) withRepositoryOf(ctx context.Context, s *boot.State, fn func(*store.Repo) error) error {
	defer func(flag, repo string) { c.repoFlag, c.repo = flag, repo }(c.repoFlag, c.repo)
	c.repoFlag = c.repositoryOf(s)
	if err := c.resolve(needRepository); err != nil {
		return err
	}
	return c.withRepo(ctx, fn)
}

// useRepositoryOf takes the repository that a boot is of, unless the user named one.
func (c *call) useRepositoryOf(s *boot.State) error {
	if c.repoFlag == "" {
		c.repoFlag = s.Repository
	}
	return c.resolve(needRepository)
}

func (c *call) resumeBoot(ctx context.Context, name string) error {
	st, err := c.findBoot(name)
	if err != nil {
		return err
	}
	if err := c.useRepositoryOf(st); err != nil {
		return err
	}
	if st.Export != nil {
		return c.resumeOnPlatform(ctx, st)
	}
	if !inBackground() && c.Bool("background") {
		words := []string{"boot", "resume", "--patience=" + c.Duration("patience").String()}
		if c.IsSet("boots") {
			words = append(words, "--boots="+c.String("boots"))
		}
		return c.bootInBackground(ctx, append(words, "--", st.ID))
	}
	say := reporter()
	err = c.withRepo(ctx, func(r *store.Repo) error {
		s, err := boot.Open(ctx, st, r, nil)
		if err != nil {
			return err
		}
		defer s.Close()
		return c.serveBoot(ctx, s, &qemu.Host{}, say)
	})
	say("", err)
	return err
}

func (c *call) migrateBoot(ctx context.Context, name string) error {
	s, err := c.findBoot(name)
	if err != nil {
		return err
	}
	if s.Export != nil {
		return c.migrateOnPlatform(ctx, s)
	}
	disk := c.String("disk")
	if disk == "" && len(s.Machine.Disks) == 1 {
		disk = s.Machine.Disks[0].Name
	}
	if disk == "" {
		return withHint(usagef("boot migrate: %s has %d disks", s.Name, len(s.Machine.Disks)), "name one with --disk")
	}
	file, err := filepath.Abs(c.String("to"))
	if err != nil {
		return err
	}
	if _, err := os.Lstat(file); err == nil {
		return fmt.Errorf("%s: %w", file, backup.ErrTargetExists)
	}
	var t *task
	last := int64(0)
	progress := func(done, total int64) {
		if t == nil {
			t = c.progress.task(s.Name+"/"+disk, "", total)
		}
		t.add(done - last)
		last = done
	}
	if s.Served() {
		err = s.AskMigrate(ctx, disk, file, progress)
	} else {
		err = c.withBoot(ctx, s, func(open *boot.Session) error { return open.Migrate(ctx, disk, file, progress) })
	}
	if t != nil {
		t.end(err)
	}
	if err != nil {
		return err
	}
	c.out.line("%s of %s is in %s", disk, s.Name, file)
	return c.out.object(struct {
		Type string `json:"type"`
		Name string `json:"name"`
		Disk string `json:"disk"`
		File string `json:"file"`
	}{"boot migrate", s.Name, disk, file})
}

// withBoot opens a session that nobody serves. Its VM must not run.
func (c *call) withBoot(ctx context.Context, s *boot.State, fn func(*boot.Session) error) error {
	if qemu.Runs(s) {
		return withHint(fmt.Errorf("%s runs, but nobody serves its disks", s.Name), "'holdfast boot resume %s' does", s.Name)
	}
	if err := c.useRepositoryOf(s); err != nil {
		return err
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		open, err := boot.Open(ctx, s, r, nil)
		if err != nil {
			return err
		}
		defer open.Close()
		return fn(open)
	})
}

func (c *call) shootBoot(ctx context.Context, name string) error {
	s, err := c.findBoot(name)
	if err != nil {
		return err
	}
	if s.Export != nil {
		return withHint(fmt.Errorf("%s runs on %s", s.Name, s.Host), "its screen is shown there")
	}
	file, err := filepath.Abs(c.String("to"))
	if err != nil {
		return err
	}
	if err := s.AskScreenshot(ctx, file); err != nil {
		return err
	}
	return c.out.object(struct {
		Type string `json:"type"`
		Name string `json:"name"`
		File string `json:"file"`
	}{"boot screenshot", s.Name, file})
}

func (c *call) commitBoot(ctx context.Context, name string) error {
	s, err := c.findBoot(name)
	if err != nil {
		return err
	}
	if s.Export != nil && s.Step != boot.StepKept {
		return withHint(fmt.Errorf("%s runs on %s: a point of it is made when it has ended", s.Name, s.Host),
			"'holdfast boot stop %s --keep' ends it; 'boot migrate' keeps it running, and it is backed up as any other VM", s.Name)
	}
	if why := s.Elsewhere(); s.Export != nil && why != nil {
		return withHint(fmt.Errorf("%s: its disks here are not all that it wrote: %w", s.Name, why), "'holdfast boot resume %s' runs it again: delete its snapshots there, or 'boot migrate' it", s.Name)
	}
	var p committed
	if s.Served() {
		err = p.ask(ctx, s, c.StringSlice("tag"))
	} else {
		err = c.withBoot(ctx, s, func(open *boot.Session) error {
			got, err := c.commitSession(ctx, open, c.StringSlice("tag"))
			if err == nil {
				p = *got
			}
			return err
		})
	}
	if err != nil {
		return err
	}
	c.out.line("%s: %s read, %s stored", path.Join(p.VM, p.Name), sizeText(p.Read), sizeText(p.Stored))
	return c.out.object(p)
}

// nvramNames are the files of a configuration that may hold variables of UEFI.
func isNVRAM(name string) bool {
	ext := strings.ToLower(path.Ext(name))
	return ext == ".fd" || ext == ".nvram" || path.Base(name) == boot.NVRAMFile
}

// configOf reads a file of a point's configuration.
func configOf(r *store.Repo, p *store.Point, f *store.ConfigFile) ([]byte, error) {
	const limit = 64 << 20
	if f.Size > limit {
		return nil, fmt.Errorf("%s of %s is too large: %w", f.Name, p.Path(), fs.ErrInvalid)
	}
	img, err := r.OpenConfig(p, f.Name)
	if err != nil {
		return nil, err
	}
	b := make([]byte, f.Size)
	if n, err := img.ReadAt(b, 0); n < len(b) {
		return nil, err
	}
	return b, nil
}
