package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/vsphere"
)

// sourceConfig is a platform in the config file.
type sourceConfig struct {
	vsphere                       string // URL
	user, passwordFile            string
	thumbprint, caFile            string
	tracking, quiesce             string
	compareEvery                  backup.Duration
	transport                     string
	vddk                          vsphere.VDDK
	perDatastore, perHost, atOnce int
}

// sources takes the platforms.
func (d configDecoder) sources(to *map[string]sourceConfig) func(key, value *yaml.Node) error {
	return func(_, value *yaml.Node) error {
		*to = map[string]sourceConfig{}
		return d.named(value, "sources", func(name string, value *yaml.Node) error {
			var s sourceConfig
			err := d.section(value, "sources."+name, keys{
				"vsphere": d.text(&s.vsphere), "user": d.text(&s.user), "password_file": d.path(&s.passwordFile),
				"thumbprint": d.text(&s.thumbprint), "ca_file": d.path(&s.caFile),
				"change_tracking": d.oneOf(&s.tracking, "use", "enable", "off"), "quiesce": d.oneOf(&s.quiesce, "try", "require", "off"),
				"transport":   d.oneOf(&s.transport, "auto", vsphere.TransportVDDK, vsphere.TransportFolder, vsphere.TransportLease),
				"vddk_libdir": d.path(&s.vddk.LibDir), "vddk_transports": d.text(&s.vddk.Transports), "vddk_compression": d.oneOf(&s.vddk.Compression, "zlib", "fastlz", "skipz"),
				"nbdkit":                  d.path(&s.vddk.Nbdkit),
				"verify_changes_every":    d.duration(&s.compareEvery),
				"snapshots_per_datastore": d.count(&s.perDatastore), "snapshots_per_host": d.count(&s.perHost), "vms_at_once": d.count(&s.atOnce),
				"hyperv": d.unsupported(name), "scp": d.unsupported(name),
			})
			if err != nil {
				return err
			}
			for _, want := range []struct{ key, value string }{{"vsphere", s.vsphere}, {"user", s.user}, {"password_file", s.passwordFile}} {
				if want.value == "" {
					return d.errorf(value, "sources.%s has no %s", name, want.key)
				}
			}
			(*to)[name] = s
			return nil
		})
	}
}

// unsupported refuses a platform.
func (d configDecoder) unsupported(name string) func(key, value *yaml.Node) error {
	return func(key, _ *yaml.Node) error {
		return d.errorf(key, "sources.%s: this build cannot back up %s", name, key.Value)
	}
}

// oneOf takes one of a few words.
func (d configDecoder) oneOf(to *string, words ...string) func(key, value *yaml.Node) error {
	return func(_, value *yaml.Node) error {
		v := resolveAlias(value)
		if *to = v.Value; v.Kind != yaml.ScalarNode || !slices.Contains(words, v.Value) {
			return d.errorf(value, "%q is none of %s", v.Value, strings.Join(words, ", "))
		}
		return nil
	}
}

// count takes a number from 1 on.
func (d configDecoder) count(to *int) func(key, value *yaml.Node) error {
	return func(_, value *yaml.Node) error {
		if err := resolveAlias(value).Decode(to); err != nil || *to < 1 {
			return d.errorf(value, "a number from 1 on is wanted here")
		}
		return nil
	}
}

// knowsSource is an error when the config has no such source.
func (c *call) knowsSource(name string) error {
	if _, ok := c.cfg.sources[name]; ok {
		return nil
	}
	err := usagef("the config names no source %q", name)
	names := slices.Sorted(maps.Keys(c.cfg.sources))
	if near := nearest(name, names); near != "" {
		return withHint(err, "did you mean %q?", near)
	}
	return withHint(err, "known sources: %q; they stand below sources: in the config", names)
}

// platform connects to the source that --source names.
func (c *call) platform(ctx context.Context) (*vsphere.Source, sourceConfig, error) {
	return c.platformNamed(ctx, c.String("source"))
}

func (c *call) platformNamed(ctx context.Context, name string) (*vsphere.Source, sourceConfig, error) {
	if err := c.knowsSource(name); err != nil {
		return nil, sourceConfig{}, err
	}
	s := c.cfg.sources[name]
	password, err := c.secretFrom("password", s.passwordFile)
	if err != nil {
		return nil, s, err
	}
	journal, err := openJournal()
	if err != nil {
		return nil, s, err
	}
	if s.transport == "auto" {
		s.transport = ""
	}
	src, err := vsphere.Connect(ctx, vsphere.Config{
		Transport: s.transport, VDDK: s.vddk,
		Name: name, URL: s.vsphere, User: s.user, Password: string(password), CAFile: s.caFile, Thumbprint: s.thumbprint,
		Quiesce:               map[string]vsphere.Quiesce{"require": vsphere.QuiesceRequire, "off": vsphere.QuiesceOff}[s.quiesce],
		Tracking:              map[string]vsphere.Tracking{"enable": vsphere.TrackingEnable, "off": vsphere.TrackingOff}[s.tracking],
		SnapshotsPerDatastore: s.perDatastore, SnapshotsPerHost: s.perHost,
		Journal: journal,
		Log:     func(text string) { c.progress.note("%s", text) },
	})
	return src, s, err
}

// listedVM is a VM in the output of `vms --json`.
type listedVM struct {
	Type     string   `json:"type"` // "vm"
	Name     string   `json:"name"`
	Path     string   `json:"path"`
	ID       string   `json:"id"`
	UUID     string   `json:"uuid,omitempty"`
	Pool     string   `json:"pool,omitempty"`
	Guest    string   `json:"guest,omitempty"`
	On       bool     `json:"powered_on"`
	Template bool     `json:"template"`
	Tracked  bool     `json:"change_tracking"`
	Disks    int      `json:"disks"`
	Size     int64    `json:"bytes_total"`
	Skipped  []string `json:"skipped,omitempty"`
	Tags     []string `json:"tags,omitempty"`
}

func runVMs(ctx context.Context, c *call) error {
	src, _, err := c.platform(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	var list []vsphere.VM
	if len(c.args) > 0 {
		list, err = choose(ctx, src, c.args)
	} else {
		list, err = src.List(ctx)
	}
	if err != nil {
		return err
	}
	t := newTable("VM", "STATE", ">DISKS", ">SIZE", "TRACKED", "PATH")
	for _, vm := range list {
		state := "off"
		switch {
		case vm.Template:
			state = "template"
		case vm.On:
			state = "on"
		}
		tracked := "no"
		if vm.Tracked {
			tracked = "yes"
		}
		t.row(printable(vm.Name), state, fmt.Sprint(vm.Disks), sizeText(vm.Size), tracked, printable(vm.Path))
		if err := c.out.object(listedVM{"vm", vm.Name, vm.Path, vm.ID, vm.InstanceUUID, vm.Pool, vm.Guest, vm.On, vm.Template, vm.Tracked, vm.Disks, vm.Size, vm.Skipped, vm.Tags}); err != nil {
			return err
		}
	}
	if len(t.rows) > 0 {
		c.out.table(t)
	}
	for _, vm := range list {
		for _, why := range vm.Skipped {
			c.progress.warn("%s: %s", printable(vm.Name), printable(why))
		}
	}
	return nil
}

// openJournal opens the journal of what runs leave on hosts.
func openJournal() (*backup.Journal, error) {
	dir, err := stateDir()
	if err != nil {
		return nil, err
	}
	return backup.OpenJournal(filepath.Join(dir, "journal"))
}

// stateDir is where holdfast keeps what belongs to no repository.
func stateDir() (string, error) {
	if dir := os.Getenv("HOLDFAST_STATE"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Geteuid() == 0 {
		return "/var/lib/holdfast", nil
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) { // XDG Base Directory Specification 0.8
		return filepath.Join(dir, "holdfast"), nil
	}
	home, err := os.UserHomeDir()
	return filepath.Join(home, ".local", "state", "holdfast"), err
}

// vmsAtOnce is how many VMs of a source are backed up at once where nothing else is said.
const vmsAtOnce = 4

// fromPlatform is a backup of VMs of a source.
func (c *call) fromPlatform(ctx context.Context) (*work, error) {
	src, cfg, err := c.platform(ctx)
	if err != nil {
		return nil, err
	}
	list, err := choose(ctx, src, c.args)
	if err != nil {
		src.Close()
		return nil, err
	}
	w := &work{src: src, close: src.Close, atOnce: cmp.Or(c.Int("vms-at-once"), cfg.atOnce, vmsAtOnce), sizes: map[string]int64{}}
	for _, vm := range list {
		w.vms = append(w.vms, vm.Name)
		w.sizes[vm.Name], w.disks = vm.Size, w.disks+vm.Disks
	}
	return w, nil
}

// choose lists the VMs that patterns ask for; tags cost a session of their own and are only asked for where a pattern has one.
func choose(ctx context.Context, src *vsphere.Source, patterns []string) ([]vsphere.VM, error) {
	look := src.List
	if slices.ContainsFunc(patterns, func(p string) bool { return strings.HasPrefix(p, "tag:") }) {
		look = src.ListTagged
	}
	list, err := look(ctx)
	if err != nil {
		return nil, err
	}
	return vsphere.Choose(list, patterns)
}
