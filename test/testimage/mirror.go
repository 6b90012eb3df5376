//go:build linux

package testimage

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// mirror is where this machine gets the packages of its own release from.
type mirror struct {
	uri     string
	suite   string // code name of the release
	keyring string // file that signs it; empty for debootstrap's own choice
}

// findMirror reads the machine's apt sources below etc ("/etc"), old form and
// new (sources.list(5)).
func findMirror(etc string) (mirror, error) {
	suite, err := codeName(filepath.Join(etc, "os-release"))
	if err != nil {
		return mirror{}, err
	}
	files := []string{filepath.Join(etc, "apt/sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		more, err := filepath.Glob(filepath.Join(etc, "apt/sources.list.d", pattern))
		if err != nil {
			return mirror{}, err
		}
		files = append(files, more...)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // not there, or not for us
		}
		entries := oneLineSources(string(b))
		if strings.HasSuffix(file, ".sources") {
			entries = deb822Sources(string(b))
		}
		for _, e := range entries {
			if m, ok := e.match(suite); ok {
				return m, nil
			}
		}
	}
	return mirror{}, fmt.Errorf("no apt source for suite %q in %s", suite, filepath.Join(etc, "apt"))
}

// source is one entry of apt's lists.
type source struct {
	types, uris, suites, components []string
	signedBy                        string
}

func (s source) match(suite string) (mirror, bool) {
	if !slices.Contains(s.types, "deb") || !slices.Contains(s.suites, suite) || !slices.Contains(s.components, "main") || len(s.uris) == 0 {
		return mirror{}, false
	}
	m := mirror{uri: s.uris[0], suite: suite}
	if strings.HasPrefix(s.signedBy, "/") {
		m.keyring = s.signedBy
	}
	return m, true
}

// oneLineSources parses "deb [signed-by=KEY] URI SUITE COMPONENT...".
func oneLineSources(text string) []source {
	var all []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		rest = strings.TrimSpace(rest)
		s := source{types: []string{kind}}
		if strings.HasPrefix(rest, "[") {
			var options string
			options, rest, _ = strings.Cut(rest[1:], "]")
			for o := range strings.FieldsSeq(options) {
				if key, ok := strings.CutPrefix(o, "signed-by="); ok {
					s.signedBy = key
				}
			}
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue
		}
		s.uris, s.suites, s.components = f[:1], f[1:2], f[2:]
		all = append(all, s)
	}
	return all
}

// deb822Sources parses stanzas of "Field: values" lines.
func deb822Sources(text string) []source {
	var all []source
	for stanza := range strings.SplitSeq(text, "\n\n") {
		var s source
		enabled := true
		for line := range strings.Lines(stanza) {
			if strings.HasPrefix(line, "#") {
				continue
			}
			field, value, _ := strings.Cut(line, ":")
			value = strings.TrimSpace(value)
			switch strings.ToLower(field) {
			case "types":
				s.types = strings.Fields(value)
			case "uris":
				s.uris = strings.Fields(value)
			case "suites":
				s.suites = strings.Fields(value)
			case "components":
				s.components = strings.Fields(value)
			case "signed-by":
				s.signedBy = value
			case "enabled":
				enabled = value != "no"
			}
		}
		if enabled {
			all = append(all, s)
		}
	}
	return all
}

// codeName reads VERSION_CODENAME of os-release(5).
func codeName(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, ok := strings.CutPrefix(lines.Text(), "VERSION_CODENAME="); ok {
			return strings.Trim(name, `"'`), nil
		}
	}
	return "", fmt.Errorf("%s: no VERSION_CODENAME", file)
}
