package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/fs/boot"
	"github.com/holdfast-backup/holdfast/fs/boot/nfsd"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/vsphere"
)

func platformBootFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "host", Usage: "on a platform: `NAME` of the host that runs the VM; the one that it was on"},
		&cli.StringFlag{Name: "folder", Usage: "on a platform: `PATH` of its folder in the inventory; as the VM had"},
		&cli.StringFlag{Name: "pool", Usage: "on a platform: `NAME` of its resource pool; as the VM had"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "connect", Usage: "on a platform: connect its network cards"},
		&cli.BoolFlag{DisableDefaultText: true, Name: "keep-identity", Usage: "on a platform: keep UUIDs and MAC addresses, for a VM that replaces the old one"},
		&cli.StringFlag{Name: "nfs", Value: ":2049", EnvVars: []string{"HOLDFAST_NFS"}, Usage: "on a platform: `ADDRESS` where NFS is served, HOST:PORT or :PORT"},
		&cli.StringFlag{Name: "portmap", Value: ":111", EnvVars: []string{"HOLDFAST_PORTMAP"}, Usage: "on a platform: `ADDRESS` of the portmapper, or off"},
		&cli.StringFlag{Name: "nfs-address", Usage: "on a platform: `ADDRESS` of this computer as hosts reach it; the one that the platform is reached from"},
		&cli.StringSliceFlag{Name: "allow", Usage: "on a platform: `ADDRESS` or network that may mount the export besides the host; may be repeated"},
		&cli.DurationFlag{Name: "idle", Usage: "serve: end after this `TIME` without a boot; 0s: never"},
	}
}

func (c *call) checkPlatformBoot() error {
	for _, name := range []string{"memory", "cpus", "firmware", "bus", "vnc", "background", "patience"} {
		if c.IsSet(name) {
			return usagef("boot on a platform takes no --%s", name)
		}
	}
	_, err := c.allowed()
	return err
}

// instantVM is a VM of a session on vSphere.
type instantVM struct {
	src *vsphere.Source
	rec *vsphere.Instant
}

var _ boot.Remote = (*instantVM)(nil)

func (v *instantVM) Record() (json.RawMessage, error)   { return json.Marshal(v.rec) }
func (v *instantVM) Mount(ctx context.Context) error    { return v.src.Mount(ctx, v.rec) }
func (v *instantVM) Register(ctx context.Context) error { return v.src.Register(ctx, v.rec) }
func (v *instantVM) PowerOn(ctx context.Context) error  { return v.src.PowerOn(ctx, v.rec) }
func (v *instantVM) Remove(ctx context.Context) error   { return v.src.Remove(ctx, v.rec) }
func (v *instantVM) PowerOff(ctx context.Context, patience time.Duration) error {
	return v.src.PowerOff(ctx, v.rec, patience)
}

func (v *instantVM) Look(ctx context.Context) (boot.RemoteState, error) {
	st, err := v.src.Look(ctx, v.rec)
	return boot.RemoteState{Mounted: st.Mounted, Registered: st.Registered, On: st.On, Ours: st.Ours, Busy: st.Busy}, err
}

func (v *instantVM) Move(ctx context.Context, to string, progress func(percent int)) error {
	return v.src.Relocate(ctx, v.rec, to, func(percent int32) { progress(int(percent)) })
}

// remotes are connections to platforms, one for all sessions on each.
type remotes struct {
	c      *call
	by     map[string]*vsphere.Source
	failed map[string]error // a platform that does not answer is waited for once
}

// of gives the VM of a session.
func (r *remotes) of(ctx context.Context, st *boot.State) (*instantVM, error) {
	v := &instantVM{rec: &vsphere.Instant{}}
	if err := json.Unmarshal(st.Platform, v.rec); err != nil {
		return nil, fmt.Errorf("%s: %w", st.Name, err)
	}
	if err := r.failed[st.Host]; err != nil {
		return nil, err
	}
	if r.by == nil {
		r.by, r.failed = map[string]*vsphere.Source{}, map[string]error{}
	}
	if v.src = r.by[st.Host]; v.src != nil {
		return v, nil
	}
	var err error
	if v.src, _, err = r.c.platformNamed(ctx, st.Host); err != nil {
		r.failed[st.Host] = err
		return nil, err
	}
	r.by[st.Host] = v.src
	return v, nil
}

func (r *remotes) close() {
	for _, src := range r.by {
		src.Close()
	}
}

// exporter is the NFS service of the boots, which is started when it is needed.
func (c *call) exporter(root string) *nfsd.Client {
	return &nfsd.Client{Root: root, Start: func(ctx context.Context) error {
		if err := c.resolve(needRepository); err != nil {
			return err
		}
		at := c.serviceAddresses(root)
		words := []string{"boot", "serve", "--boots=" + root, "--nfs=" + at.Listen, "--portmap=" + at.Portmap, "--idle=" + serviceIdle.String()}
		word, _, err := c.goBackground(ctx, words)
		if err == nil && word == "" {
			err = errors.New("the NFS service ended before it was ready")
		}
		if err != nil && strings.Contains(err.Error(), nfsd.ErrRuns.Error()) { // by another process it is text only
			err = nfsd.ErrRuns
		}
		return err
	}}
}

// serviceAddresses is where NFS is served: while hosts may have something mounted, where they look for it, whatever else is asked for.
func (c *call) serviceAddresses(root string) nfsd.Addresses {
	at := nfsd.Addresses{Listen: c.String("nfs"), Portmap: c.String("portmap")}
	last, ok := nfsd.LastAddresses(root)
	if last.Portmap == "" {
		last.Portmap = "off"
	}
	list, _ := boot.List(root)
	mounted := slices.ContainsFunc(list, func(st *boot.State) bool {
		return st.Export != nil && !slices.Contains([]boot.Step{boot.StepMade, boot.StepExporting, boot.StepKept}, st.Step)
	})
	asked := c.IsSet("nfs") || c.IsSet("portmap")
	if !ok || asked && !mounted || !asked && !mounted && c.args[0] == "serve" {
		return at
	}
	if asked && at != last {
		c.progress.warn("NFS stays at %s (portmapper: %s), where hosts have boots mounted", last.Listen, last.Portmap)
	}
	return last
}

// serviceIdle is how long the NFS service stays without a boot.
const serviceIdle = time.Minute

// serveNFS is the NFS service.
func (c *call) serveNFS(ctx context.Context) error {
	if err := c.resolve(needRepository); err != nil {
		return err
	}
	say := reporter()
	err := c.withRepo(ctx, func(r *store.Repo) error {
		root, err := c.bootsDir()
		if err != nil {
			return err
		}
		repo, err := filepath.Abs(c.repo)
		if err != nil {
			return err
		}
		at := c.serviceAddresses(root)
		s := nfsd.Service{Root: root, Repo: r, Repository: repo, Listen: at.Listen, Portmap: at.Portmap, CacheBytes: cacheBytes(), Idle: c.Duration("idle"),
			Log: func(err error) { c.progress.warn("%v", err) }}
		if s.Portmap == "off" {
			s.Portmap = ""
		}
		return s.Run(ctx, func() { say("ready", nil) })
	})
	say("", err)
	return err
}

// settleBoots finishes or undoes what commands on boots left that did not come to their end, and has the NFS service run where a VM needs it.
// look: at VMs that run, too, which somebody may have moved away.
func (c *call) settleBoots(ctx context.Context, look bool) error {
	root, err := c.bootsDir()
	if err != nil {
		return err
	}
	list, _ := boot.List(root) // what cannot be read the command itself will say
	exporter, on := c.exporter(root), &remotes{c: c}
	defer on.close()
	for _, st := range list {
		if st.Export == nil || st.Step == boot.StepKept {
			continue
		}
		if err := c.settleBoot(ctx, st, exporter, on, look); err != nil && !st.Ended() {
			c.progress.warn("%s: %v", st.Name, err)
		}
	}
	c.seen = seenIn(list)
	return ctx.Err()
}

// seenIn gives what was seen of sessions, by their ids.
func seenIn(list []*boot.State) map[string]*boot.RemoteState {
	out := map[string]*boot.RemoteState{}
	for _, st := range list {
		out[st.ID] = st.Seen
	}
	return out
}

func (c *call) settleBoot(ctx context.Context, st *boot.State, exporter *nfsd.Client, on *remotes, look bool) error {
	if st.Step == boot.StepRunning && !look {
		return c.servedAgain(ctx, st, exporter.ExportAgain)
	}
	release, err := st.Work(ctx, 0)
	if errors.Is(err, boot.ErrAtWork) {
		if st.Step == boot.StepMade {
			return nil
		}
		return c.servedAgain(ctx, st, exporter.ExportAgain) // whoever it is may need the service, too
	}
	if err != nil {
		return err
	}
	err = c.settle(ctx, st, exporter, on, look)
	release()
	c.unpinEnded(ctx, st)
	return err
}

// servedAgain has the folder of a session served, by a service of the session's repository. The command's own stays what it is.
func (c *call) servedAgain(ctx context.Context, st *boot.State, export func(ctx context.Context, id string) error) error {
	defer func(flag, repo string) { c.repoFlag, c.repo = flag, repo }(c.repoFlag, c.repo)
	c.repoFlag = c.repositoryOf(st)
	return export(ctx, st.ID)
}

// repositoryOf is where the repository of a boot is: where it was, unless it is there no more and the user names one.
func (c *call) repositoryOf(st *boot.State) string {
	if _, err := os.Stat(st.Repository); errors.Is(err, os.ErrNotExist) && c.repoFlag != "" {
		return c.repoFlag
	}
	return st.Repository
}

// unpinEnded lets the point be forgotten when the session has ended.
func (c *call) unpinEnded(ctx context.Context, st *boot.State) {
	if st.Ended() {
		c.unpin(context.WithoutCancel(ctx), st)
	}
}

// lookTime is how long a platform has to say how a VM is.
const lookTime = 30 * time.Second

func (c *call) settle(ctx context.Context, st *boot.State, exporter *nfsd.Client, on *remotes, look bool) error {
	if st.Step == boot.StepMade {
		_, err := st.Settle(ctx, nil, exporter)
		return err
	}
	if err := c.servedAgain(ctx, st, exporter.Export); err != nil {
		return err
	}
	runs := st.Step == boot.StepRunning
	if runs {
		if !look {
			return nil
		}
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, lookTime)
		defer cancel()
	}
	v, err := on.of(ctx, st)
	if err != nil {
		return err
	}
	what, err := st.Settle(ctx, v, exporter)
	switch {
	case err != nil || what == "":
	case runs:
		c.progress.note("%s: %s", st.Name, what)
	default:
		c.progress.note("%s: an earlier command did not come to its end: %s", st.Name, what)
	}
	return err
}

// bootOnPlatform runs the VM of a point on a platform.
func (c *call) bootOnPlatform(ctx context.Context) error {
	if err := c.knowsSource(c.String("on")); err != nil {
		return withHint(err, "boot runs VMs on qemu, or on a source of the config")
	}
	if err := c.resolve(needRepository); err != nil {
		return err
	}
	return c.withRepo(ctx, func(r *store.Repo) error {
		root, err := c.bootsDir()
		if err != nil {
			return err
		}
		sum, err := r.Find(ctx, c.args[0])
		if err != nil {
			return err
		}
		src, cfg, err := c.platformNamed(ctx, c.String("on"))
		if err != nil {
			return err
		}
		defer src.Close()
		p, err := r.Point(ctx, sum.ID)
		if err != nil {
			return err
		}
		v := &instantVM{src, &vsphere.Instant{Keep: c.Bool("keep-identity")}}
		opt, warnings, err := c.instantOptions(ctx, r, p, v)
		if err != nil {
			return err
		}
		if v.rec.Server, err = c.nfsAddress(cfg); err != nil {
			return err
		}
		s, err := boot.Create(ctx, root, r, sum.ID, opt)
		if err != nil {
			return err
		}
		if s.Unpinned != nil {
			c.progress.warn("%s: nothing keeps its point from being forgotten: %v", s.Name, s.Unpinned)
		}
		st, release, err := s.Launching()
		if err != nil {
			return err
		}
		defer release()
		v.rec.Name, v.rec.Datastore, v.rec.Export = st.Name, "holdfast-"+st.ID, st.Export.Path
		v.rec.VMX = st.Export.Folder + "/" + vmxName
		for _, w := range warnings {
			c.progress.warn("%s: %s", st.Name, w)
		}
		if err := st.Launch(ctx, v, c.exporter(root)); err != nil {
			if st.Ended() {
				err = errors.Join(err, st.Unpin(context.WithoutCancel(ctx), r))
			}
			return err
		}
		c.out.line("%s: %s runs on %s, from datastore %s", st.Name, st.Path, st.Host, v.rec.Datastore)
		c.out.line("  'holdfast boot migrate %s --to DATASTORE' makes it the platform's alone; 'holdfast boot stop %s' ends it and drops what it wrote", st.Name, st.Name)
		return c.out.object(infoOf(st))
	})
}

// vmxName is the file of a VM's configuration in its folder. The VM's own name may be one that no file can have.
const vmxName = "vm.vmx"

// instantOptions says what session there is to be, and finds where its VM is to run.
func (c *call) instantOptions(ctx context.Context, r *store.Repo, p *store.Point, v *instantVM) (opt boot.Options, warnings []string, err error) {
	if len(p.Disks) == 0 {
		return opt, nil, fmt.Errorf("%s has no disks", p.Path())
	}
	what, err := c.restoreOf(r, p)
	if err != nil {
		return opt, nil, err
	}
	name := c.String("name")
	if name == "" {
		if name, err = c.freeBootName(p.VM.Name + "-instant"); err != nil {
			return opt, nil, err
		}
	}
	network := c.network()
	if network == "none" {
		network = ""
	}
	if warnings, err = v.src.FindPlace(ctx, vsphere.InstantPlace{Host: c.String("host"), Folder: c.String("folder"), Pool: c.String("pool"), Network: network, Inventory: what.Inventory}, v.rec); err != nil {
		return opt, nil, err
	}
	vm := vsphere.InstantVM{Name: name, Network: network, Mapping: what.Mapping, Machine: what.Machine, Connect: c.Bool("connect"), KeepIdentity: v.rec.Keep}
	opt = boot.Options{Name: name, Host: c.String("on"), Machine: boot.Machine{Name: name, Firmware: boot.BIOS}, Bus: func(*store.Disk) boot.Bus { return "" },
		Now: c.clock.now, Files: map[string][]byte{}}
	for _, d := range p.Disks {
		vm.Disks = append(vm.Disks, d.Name)
	}
	for i := range p.Config {
		if p.VM.Source == "vsphere" && strings.HasSuffix(strings.ToLower(p.Config[i].Name), ".vmx") {
			if vm.VMX, err = configOf(r, p, &p.Config[i]); err != nil {
				return opt, nil, err
			}
		}
	}
	if len(what.NVRAM) > 0 {
		opt.Files[vm.NVRAM()] = what.NVRAM
	}
	text, more, err := vm.Text()
	if err != nil {
		return opt, nil, err
	}
	opt.Files[vmxName] = text
	if opt.Clients, err = v.src.HostAddresses(ctx, v.rec); err != nil {
		return opt, nil, err
	}
	also, err := c.allowed()
	if err != nil {
		return opt, nil, err
	}
	if opt.Clients = append(opt.Clients, also...); len(opt.Clients) == 0 {
		return opt, nil, withHint(errors.New("the host does not say which addresses it has"), "name them with --allow")
	}
	opt.Repository, err = filepath.Abs(c.repo)
	return opt, append(warnings, more...), err
}

// freeBootName adds a number to a name that a boot has.
func (c *call) freeBootName(want string) (string, error) {
	root, err := c.bootsDir()
	if err != nil {
		return "", err
	}
	list, _ := boot.List(root) // one that cannot be read has no name
	taken := map[string]bool{}
	for _, s := range list {
		taken[s.Name] = true
	}
	name := want
	for n := 2; taken[name]; n++ {
		name = fmt.Sprintf("%s-%d", want, n)
	}
	return name, nil
}

// nfsAddress is this computer's address as the platform's hosts reach it.
func (c *call) nfsAddress(cfg sourceConfig) (string, error) {
	if a := c.String("nfs-address"); a != "" {
		return a, nil
	}
	return vsphere.LocalAddress(cfg.vsphere)
}

// workTime is how long a command waits for another one that is at work on the boot, such as one that looks at all of them.
const workTime = 10 * time.Second

// onPlatform works on a session.
func (c *call) onPlatform(ctx context.Context, st *boot.State, do func(v *instantVM, x boot.Exporter) error) error {
	release, err := st.Work(ctx, workTime)
	if err != nil {
		return err
	}
	defer release()
	if err := c.useRepositoryOf(st); err != nil {
		return err
	}
	root, err := c.bootsDir()
	if err != nil {
		return err
	}
	on := &remotes{c: c}
	defer on.close()
	v, err := on.of(ctx, st)
	if err != nil {
		return err
	}
	defer c.unpinEnded(ctx, st)
	return do(v, c.exporter(root))
}

// stopOnPlatform ends a session, unless that was done already: how it ended is in its state.
func (c *call) stopOnPlatform(ctx context.Context, st *boot.State, how boot.StopRequest) error {
	if st.Step == boot.StepKept {
		if how.Keep {
			return nil
		}
		release, err := st.Work(ctx, workTime)
		if err != nil {
			return err
		}
		defer release()
		if st.Step == boot.StepKept {
			defer c.unpinEnded(ctx, st)
			return st.Remove()
		}
		return fmt.Errorf("%s runs again", st.Name)
	}
	return c.onPlatform(ctx, st, func(v *instantVM, x boot.Exporter) error {
		what, err := st.Settle(ctx, v, x)
		if what != "" {
			c.progress.note("%s: %s", st.Name, what)
		}
		if err != nil || st.Ended() {
			return err
		}
		if st.Step == boot.StepKept { // by an earlier command, which did not come to its end
			if how.Keep {
				return nil
			}
			return st.Remove()
		}
		if why := st.Elsewhere(); how.Keep && why != nil {
			c.progress.warn("%s: what is kept is not all that it wrote: %v", st.Name, why)
		}
		return st.End(ctx, v, x, how)
	})
}

// resumeOnPlatform runs a VM again that was kept. The service of one that runs was seen to already.
func (c *call) resumeOnPlatform(ctx context.Context, st *boot.State) error {
	err := c.onPlatform(ctx, st, func(v *instantVM, x boot.Exporter) error {
		if st.Step != boot.StepKept {
			return c.powerOnAgain(ctx, st, v, x)
		}
		v.rec.VM = ""
		st.Keep = true // what it wrote is not dropped when it cannot be started
		return st.Launch(ctx, v, x)
	})
	if err != nil {
		return err
	}
	c.out.line("%s runs on %s", st.Name, st.Host)
	return c.out.object(infoOf(st))
}

// powerOnAgain starts a VM that is on its platform, and off.
func (c *call) powerOnAgain(ctx context.Context, st *boot.State, v *instantVM, x boot.Exporter) error {
	what, err := st.Settle(ctx, v, x)
	if err != nil {
		return err
	}
	if st.Ended() {
		return fmt.Errorf("%s: %s", st.Name, what)
	}
	now, err := v.Look(ctx)
	switch {
	case err != nil:
		return err
	case st.Step != boot.StepRunning:
		return fmt.Errorf("%s is %s", st.Name, st.Step)
	case !now.Registered:
		return withHint(fmt.Errorf("%s is not on %s any more", st.Name, st.Host), "'holdfast boot stop %s --keep' and then 'boot resume' make it a VM again", st.Name)
	case now.On:
		return nil
	}
	return v.PowerOn(ctx)
}

func (c *call) migrateOnPlatform(ctx context.Context, st *boot.State) error {
	if c.IsSet("disk") {
		return usagef("boot migrate: on a platform the whole VM moves: no --disk")
	}
	to := c.String("to")
	t := c.progress.task(st.Name, "", 100)
	last := 0
	err := c.onPlatform(ctx, st, func(v *instantVM, x boot.Exporter) error {
		return st.MoveAway(ctx, v, x, to, func(percent int) {
			t.add(int64(percent - last))
			last = percent
		})
	})
	t.end(err)
	if err != nil {
		return err
	}
	c.out.line("%s is on datastore %s of %s, and no boot any more", st.Name, to, st.Host)
	return c.out.object(struct {
		Type string `json:"type"`
		Name string `json:"name"`
		To   string `json:"to"`
	}{"boot migrate", st.Name, to})
}

// nfsClients gives the clients of boots on platforms, by their ids.
func (c *call) nfsClients(ctx context.Context, root string, list []*boot.State) map[string][]string {
	out := map[string][]string{}
	for _, st := range list {
		if st.Export == nil {
			continue
		}
		all, err := (&nfsd.Client{Root: root}).Status(ctx)
		if err != nil && !errors.Is(err, nfsd.ErrGone) {
			c.progress.warn("%v", err)
		}
		for _, s := range all {
			out[s.ID] = s.Clients
		}
		break
	}
	return out
}
