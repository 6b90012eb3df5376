package test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/holdfast-backup/holdfast/"

// mayImport maps a package to the packages of ours that it may import, besides
// the leaves and the packages below itself. "x/..." stands for x and all below it.
var mayImport = map[string][]string{
	"cmd/...":          {"..."},
	"vsphere/...":      {"backup"},
	"hyperv/...":       {"backup"},
	"scp/...":          {"backup"},
	"backup":           {"store", "store/bucket", "store/remote/agent"},
	"backup/...":       {"backup"},
	"store":            {"store/bucket"},
	"store/bucket":     {},
	"store/bucket/...": {"store/bucket"},
	"store/remote":     {"store", "store/bucket"},
	// A second protocol, of which backup has the client as one of its targets.
	"store/remote/agent": {"store", "store/bucket", "store/remote/wire"},
	"store/...":          {"store", "store/bucket"},
	"fs":                 {"store"},
	"fs/fuse":            {"fs", "store"},
	"fs/nfs":             {"fs", "store"},
	"fs/nfs/...":         {"fs/nfs"},
	"fs/nfs/point":       {"fs", "fs/nfs/folder", "store"},
	"fs/extract":         {"fs", "store"},
	"fs/boot":            {"fs", "store"},
	"fs/boot/...":        {"fs/boot"},
	"fs/boot/nfsd":       {"fs/boot", "fs/nfs", "fs/nfs/folder", "store"},
	"test/...":           {"..."},
}

// leaves may be imported by anyone and import only store/extent and what lies below themselves.
var leaves = []string{"store/extent", "fs/vdisk", "fs/guest", "fs/nbd", "fs/overlay"}

// topLevel is every folder with Go code that DESIGN allows at the root.
var topLevel = []string{"cmd", "backup", "store", "fs", "vsphere", "hyperv", "scp", "test"}

// TestImports fails when a package imports another of ours against the layering.
func TestImports(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, imp := range p.Imports {
			if why := forbidden(p.ImportPath, imp); why != "" {
				t.Errorf("%s imports %s: %s", p.ImportPath, imp, why)
			}
		}
		for _, imp := range append(p.TestImports, p.XTestImports...) {
			// Tests may use any package's test suites; only leaves stay pure.
			if isLeaf(p.ImportPath) && forbidden(p.ImportPath, imp) != "" {
				t.Errorf("test of %s imports %s", p.ImportPath, imp)
			}
		}
	}
}

// TestRuleCanFail makes sure that the rule refuses what it is there to refuse.
func TestRuleCanFail(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"store", "backup", false},
		{"store", "store/extent", true},
		{"store/bucket", "store", false},
		{"fs/vdisk", "store", false},
		{"fs/vdisk", "fs/vdisk/vhdx", true},
		{"fs", "backup", false},
		{"backup", "fs", false},
		{"backup/imagefile", "fs/vdisk", true},
		{"cmd/holdfast", "fs/fuse", true},
		{"vsphere", "store", false},
		{"misc", "store", false},
	} {
		if got := forbidden(module+c.from, module+c.to) == ""; got != c.ok {
			t.Errorf("%s -> %s: allowed %v, want %v", c.from, c.to, got, c.ok)
		}
	}
}

func forbidden(from, to string) string {
	if !strings.HasPrefix(to, module) {
		return ""
	}
	from, to = strings.TrimPrefix(from, module), strings.TrimPrefix(to, module)
	if top, _, _ := strings.Cut(from, "/"); !contains(topLevel, top) {
		return "no such top-level folder in the design"
	}
	if strings.HasPrefix(to, from+"/") && from != "store" && from != "backup" && from != "fs" {
		return ""
	}
	for _, leaf := range leaves {
		if to == leaf || strings.HasPrefix(to, leaf+"/") {
			if isLeaf(module+from) && to != "store/extent" && !strings.HasPrefix(from, leaf) {
				return "a leaf imports nothing but store/extent"
			}
			return ""
		}
	}
	if isLeaf(module + from) {
		return "a leaf imports nothing but store/extent"
	}
	allowed, ok := mayImport[from]
	for dir := from; !ok && dir != ""; {
		allowed, ok = mayImport[dir+"/..."]
		i := strings.LastIndexByte(dir, '/')
		dir = dir[:max(i, 0)]
	}
	for _, a := range allowed {
		if a == "..." || a == to {
			return ""
		}
	}
	return "against the import rule"
}

func isLeaf(path string) bool {
	path = strings.TrimPrefix(path, module)
	for _, leaf := range leaves {
		if path == leaf || strings.HasPrefix(path, leaf+"/") {
			return true
		}
	}
	return false
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

type goPackage struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var ps []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	if len(ps) < 3 {
		t.Fatalf("go list found only %d packages", len(ps))
	}
	return ps
}
