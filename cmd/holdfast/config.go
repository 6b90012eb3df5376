package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-backup/holdfast/backup"
)

// maxConfig bounds what the YAML parser may be given. 1 MiB
const maxConfig = 1 << 20

// config is what a config file says. The zero value is that of an empty file.
type config struct {
	repository struct {
		path         string // absolute or tls://…, or "" when the file names none
		passwordFile string // absolute, or ""
		tokenFile    string // likewise
	}
	backup struct {
		exclude string          // as --exclude; empty when the file says nothing
		lockFor backup.Duration // for how long points are locked; zero when the file says nothing
	}
	vms     map[string]vmConfig     // by name
	sources map[string]sourceConfig // by name
}

// configError is a config file that cannot be read or says something unknown.
type configError struct{ err error }

func (e *configError) Error() string { return e.err.Error() }
func (e *configError) Unwrap() error { return e.err }

// findConfig reads the config file that the user named, or else the usual one if
// it exists. Every error is a configError.
func findConfig(named, usual string) (config, error) {
	path := named
	if path == "" {
		path = usual
	}
	if path == "" {
		return config{}, nil
	}
	cfg, err := readConfig(path)
	if named == "" && errors.Is(err, fs.ErrNotExist) {
		return config{}, nil
	}
	if err != nil {
		return config{}, &configError{fmt.Errorf("config: %w", err)}
	}
	return cfg, nil
}

func readConfig(path string) (config, error) {
	f, err := os.Open(path)
	if err != nil {
		return config{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return config{}, err
	}
	if len(b) > maxConfig {
		return config{}, fmt.Errorf("%s: larger than %s", path, sizeText(maxConfig))
	}
	return parseConfig(path, b)
}

// parseConfig decodes strict YAML: one document, no unknown and no repeated key,
// no value of another type than the key wants. Relative paths in the file are
// relative to its folder, so that it means the same wherever holdfast runs.
func parseConfig(path string, b []byte) (config, error) {
	var cfg config
	var doc yaml.Node
	d := configDecoder{file: path}
	if err := unmarshalOne(b, &doc); err != nil {
		return cfg, fmt.Errorf("%s: %w", path, err)
	}
	if doc.Kind == 0 || len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return cfg, nil // empty, or nothing but comments
	}
	err := d.section(doc.Content[0], "the config", keys{
		"repository": func(_, value *yaml.Node) error {
			return d.section(value, "repository", keys{
				"path":          d.repository(&cfg.repository.path),
				"password_file": d.path(&cfg.repository.passwordFile),
				"token_file":    d.path(&cfg.repository.tokenFile),
			})
		},
		"backup": func(_, value *yaml.Node) error {
			return d.section(value, "backup", keys{
				"exclude":  d.exclude(&cfg.backup.exclude),
				"lock_for": d.duration(&cfg.backup.lockFor),
			})
		},
		"vms": func(_, value *yaml.Node) error {
			cfg.vms = map[string]vmConfig{}
			return d.named(value, "vms", func(name string, value *yaml.Node) error {
				var vm vmConfig
				err := d.section(value, "vms."+name, keys{
					"sign": d.text(&vm.sign), "bus": d.text(&vm.bus), "firmware": d.text(&vm.firmware),
					"memory": d.text(&vm.memory), "cpus": d.text(&vm.cpus), "boot_limit": d.text(&vm.limit),
					"exclude": d.exclude(&vm.exclude),
				})
				cfg.vms[name] = vm
				return err
			})
		},
		"sources": d.sources(&cfg.sources),
	})
	return cfg, err
}

// unmarshalOne parses the only document of b into doc, which stays as it is when
// there is none.
func unmarshalOne(b []byte, doc *yaml.Node) error {
	dec := yaml.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(doc); err != nil {
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return errors.Join(err, errors.New("more than one YAML document"))
	}
	return nil
}

// keys maps the known keys of a section to what takes their value.
type keys map[string]func(key, value *yaml.Node) error

// configDecoder takes YAML nodes apart and says where in the file an error is.
type configDecoder struct{ file string }

func (d configDecoder) errorf(n *yaml.Node, format string, a ...any) error {
	return fmt.Errorf("%s:%d: %w", d.file, n.Line, fmt.Errorf(format, a...))
}

// section walks a mapping, once through each known key.
func (d configDecoder) section(n *yaml.Node, name string, known keys) error {
	n = resolveAlias(n)
	if n.Kind != yaml.MappingNode {
		return d.errorf(n, "%s must be a section of keys and values", name)
	}
	seen := map[string]int{} // key => line
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		take, ok := known[key.Value]
		if !ok {
			err := d.errorf(key, "unknown key %q in %s", key.Value, name)
			names := slices.Sorted(maps.Keys(known))
			if near := nearest(key.Value, names); near != "" {
				return withHint(err, "did you mean %q?", near)
			}
			return withHint(err, "known keys: %q", names)
		}
		if line, twice := seen[key.Value]; twice {
			return d.errorf(key, "key %q in %s again, first in line %d", key.Value, name, line)
		}
		seen[key.Value] = key.Line
		if err := take(key, value); err != nil {
			return err
		}
	}
	return nil
}

// named walks a mapping whose keys are names of the user's, each once.
func (d configDecoder) named(n *yaml.Node, name string, take func(key string, value *yaml.Node) error) error {
	n = resolveAlias(n)
	if n.Kind != yaml.MappingNode {
		return d.errorf(n, "%s must be a section of names", name)
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if seen[key.Value] {
			return d.errorf(key, "%q in %s again", key.Value, name)
		}
		seen[key.Value] = true
		if err := take(key.Value, n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// path takes a text that names a file.
func (d configDecoder) path(to *string) func(key, value *yaml.Node) error {
	return func(key, value *yaml.Node) error {
		if err := d.text(to)(key, value); err != nil {
			return err
		}
		if !filepath.IsAbs(*to) {
			*to = filepath.Join(filepath.Dir(d.file), *to)
		}
		abs, err := filepath.Abs(*to)
		if err != nil {
			return d.errorf(value, "%w", err)
		}
		*to = abs
		return nil
	}
}

// repository takes a text that names a directory, or a server on another host.
func (d configDecoder) repository(to *string) func(key, value *yaml.Node) error {
	return func(key, value *yaml.Node) error {
		if v := resolveAlias(value); v.Kind == yaml.ScalarNode && isAway(v.Value) {
			return d.text(to)(key, value)
		}
		return d.path(to)(key, value)
	}
}

// duration takes a text such as 30d.
func (d configDecoder) duration(to *backup.Duration) func(key, value *yaml.Node) error {
	return func(key, value *yaml.Node) error {
		var s string
		err := d.text(&s)(key, value)
		if err != nil {
			return err
		}
		if *to, err = backup.ParseDuration(s); err != nil {
			return d.errorf(value, "%w", err)
		}
		return nil
	}
}

// text takes a string that is not empty. Numbers and booleans are refused: YAML
// reads "path: 010" as 8, and whoever meant text has to say so.
func (d configDecoder) text(to *string) func(key, value *yaml.Node) error {
	return func(_, value *yaml.Node) error {
		v := resolveAlias(value)
		if v.Kind != yaml.ScalarNode || v.Tag != "!!str" {
			return d.errorf(value, "a text is wanted here; put quotes around it")
		}
		if v.Value == "" {
			return d.errorf(value, "the value is empty")
		}
		*to = v.Value
		return nil
	}
}

// exclude takes what --exclude takes, also as a list.
func (d configDecoder) exclude(to *string) func(key, value *yaml.Node) error {
	return func(_, value *yaml.Node) error {
		v := resolveAlias(value)
		list := []*yaml.Node{v}
		if v.Kind == yaml.SequenceNode {
			list = v.Content
		}
		var words []string
		for _, n := range list {
			words = append(words, resolveAlias(n).Value)
		}
		*to = strings.Join(words, ",")
		if _, err := parseExclude(*to); err != nil {
			return d.errorf(value, "%w", err)
		}
		return nil
	}
}

// resolveAlias returns what a YAML alias stands for. The parser refuses aliases of aliases.
func resolveAlias(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}
