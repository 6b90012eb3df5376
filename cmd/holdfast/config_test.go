package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseConfig(t *testing.T) {
	for _, c := range []struct{ yaml, path, passwordFile, err string }{
		{"", "", "", ""},
		{"# nothing\n", "", "", ""},
		{"---\n", "", "", ""},
		{"{}", "", "", ""},
		{"repository: {path: /backup/main, password_file: /etc/pw}", "/backup/main", "/etc/pw", ""},
		{"repository:\n  path: main", "/etc/holdfast/main", "", ""},
		{"repository: {path: '010'}", "/etc/holdfast/010", "", ""},
		{"repository: {path: &p /backup, password_file: *p}", "/backup", "/backup", ""},
		{"repository: {path: 010}", "", "", "c.yaml:1: a text is wanted"},
		{"repository: {path: yes}", "/etc/holdfast/yes", "", ""}, // a text in YAML 1.2
		{"repository: {path: true}", "", "", "a text is wanted"},
		{"repository: {path: ~}", "", "", "a text is wanted"},
		{"repository: {path: [a]}", "", "", "a text is wanted"},
		{"repository: {path: ''}", "", "", "the value is empty"},
		{"repository: /backup", "", "", "repository must be a section"},
		{"repository:", "", "", "repository must be a section"},
		{"- repository", "", "", "the config must be a section"},
		{"repository: {path: a}\n\nrepository: {path: b}", "", "", `c.yaml:3: key "repository" in the config again, first in line 1`},
		{"repository: {path: a, path: b}", "", "", `key "path"`},
		{"\n\nrepositry: {}", "", "", `c.yaml:3: unknown key "repositry"`},
		{"repository: {<<: {path: a}}", "", "", `unknown key "<<"`},
		{"repository: {}\n---\nrepository: {}", "", "", "more than one YAML document"},
		{"repository: {path: a}\n--- {", "", "", "more than one YAML document"},
		{"repository: [", "", "", "yaml: "},
		{"sources: {}", "", "", ""},
		{"sources: {lab: {vsphere: https://vc.example/sdk, user: u}}", "", "", "c.yaml:1: sources.lab has no password_file"},
		{"sources: {lab: {vsphere: https://vc.example/sdk, user: u, password_file: p, quiesce: maybe}}", "", "", `"maybe" is none of try, require, off`},
		{"sources: {lab: {vsphere: https://vc.example/sdk, user: u, password_file: p, vms_at_once: 0}}", "", "", "a number from 1 on"},
		{"sources: {lab: {scp: https://scp.example}}", "", "", "cannot back up scp"},
		{"sources: {lab: {vsphere: https://vc.example/sdk, user: u, password_file: p}}", "", "", ""},
		{"backup: {lock_for: 30d}", "", "", ""},
		{"backup: {lock_for: 30}", "", "", "a text is wanted"},
		{"backup: {lock_for: 30x}", "", "", `duration "30x": unknown unit 'x'`},
		{"backup: {lockfor: 30d}", "", "", `unknown key "lockfor" in backup`},
		{"backup: 30d", "", "", "backup must be a section"},
		{"a: &a [*a]\nrepository: *a", "", "", `unknown key "a"`},
		{"repository: &a {path: *a}", "", "", "a text is wanted"},
	} {
		cfg, err := parseConfig("/etc/holdfast/c.yaml", []byte(c.yaml))
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: %v, want %s", c.yaml, err, c.err)
			}
			continue
		}
		if err != nil || cfg.repository.path != c.path || cfg.repository.passwordFile != c.passwordFile {
			t.Errorf("%q: %+v, %v", c.yaml, cfg, err)
		}
	}
}

func TestConfigLock(t *testing.T) {
	cfg, err := parseConfig("/etc/holdfast/c.yaml", []byte("backup:\n  lock_for: 1y6m\n"))
	if err != nil || cfg.backup.lockFor.Years != 1 || cfg.backup.lockFor.Months != 6 {
		t.Errorf("%+v, %v", cfg, err)
	}
}

func TestConfigTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(strings.Repeat("#\n", maxConfig/2+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := findConfig(path, ""); !isType[*configError](err) || !strings.Contains(err.Error(), "larger than 1.0 MiB") {
		t.Error(err)
	}
	// The usual file must be readable if it is there.
	if _, err := findConfig("", t.TempDir()); !isType[*configError](err) {
		t.Errorf("a directory as the usual config: %v", err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("repository: {path: /backup, password_file: pw}"))
	f.Add([]byte("repository: &a {path: *a}\n---\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg, err := parseConfig("/etc/c.yaml", b)
		if err == nil && cfg.repository.path != "" && !filepath.IsAbs(cfg.repository.path) {
			t.Errorf("%q: relative path %q", b, cfg.repository.path)
		}
	})
}
