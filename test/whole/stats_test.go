package whole

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestStats has the unique bytes of a point and of a VM compared with what gc gives back
// when they are forgotten, and the metrics file read by Prometheus' own parser.
func TestStats(t *testing.T) {
	needs(t, "/usr/bin/python3 prometheus_client")
	t.Parallel()
	r := newRepository(t)
	dir := newDir(t)
	random := func(name string, parts ...byte) string {
		var b []byte
		for _, p := range parts {
			b = append(b, randomBytes(uint64(p), 1<<20)...)
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	const odd = `a "b" ü {x="1"}`
	r.backup(t, random("web.raw", 1, 2, 3), "--vm", "web")
	r.backup(t, random("odd.raw", 3, 4), "--vm", odd)
	second, _ := r.backup(t, random("web.raw", 1, 5, 3), "--vm", "web")

	type usage struct {
		VM, Name string
		Unique   int64 `json:"bytes_unique"`
		Size     int64 `json:"bytes_size"`
		Points   int
	}
	type stats struct {
		Points  int
		VMs     int
		Total   int64   `json:"bytes_total"`
		Data    int64   `json:"bytes_data"`
		Plain   int64   `json:"bytes_plain"`
		Live    int64   `json:"bytes_live"`
		Dedupe  float64 `json:"ratio_dedupe"`
		Growth  []struct{ Points int }
		ByVM    []usage `json:"by_vm"`
		ByPoint []usage `json:"by_point"`
	}
	metrics := filepath.Join(dir, "holdfast.prom")
	get := func(args ...string) (s stats) {
		out := r.must(t, append([]string{"stats", "--json"}, args...)...).out
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		return s
	}
	s := get("--metrics", metrics)
	const mib = 1 << 20
	unique := int64(5*mib + 3*128<<10) // each point has a configuration file, of one chunk
	if s.Points != 3 || s.VMs != 2 || s.Total != 8*mib || s.Data != 8*mib || s.Plain != unique || s.Dedupe != float64(8*mib)/float64(unique) || len(s.ByVM) != 2 || len(s.ByPoint) != 3 {
		t.Fatalf("%+v", s)
	}
	n := 0
	for _, g := range s.Growth {
		n += g.Points
	}
	if n != 3 {
		t.Errorf("growth: %+v", s.Growth)
	}

	read := exec.Command("/usr/bin/python3", "-c", `
import sys, json
from prometheus_client.parser import text_string_to_metric_families
print(json.dumps([[s.name, s.labels.get("vm", ""), s.value] for f in text_string_to_metric_families(open(sys.argv[1], encoding="utf-8").read()) for s in f.samples]))
`, metrics)
	out, err := read.Output()
	if err != nil {
		t.Fatalf("the metrics cannot be read: %v", err)
	}
	var samples [][3]any
	if err := json.Unmarshal(out, &samples); err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, s := range samples {
		got[s[0].(string)+"|"+s[1].(string)] = s[2].(float64)
	}
	want := map[string]int64{"holdfast_points|": 3, "holdfast_vms|": 2, "holdfast_logical_bytes|": 8 * mib, "holdfast_unique_bytes|": unique, "holdfast_live_bytes|": s.Live}
	for _, v := range s.ByVM {
		want["holdfast_vm_points|"+v.VM] = int64(v.Points)
		want["holdfast_vm_size_bytes|"+v.VM] = v.Size
		want["holdfast_vm_unique_bytes|"+v.VM] = v.Unique
	}
	for name, v := range want {
		if g, ok := got[name]; !ok || g != float64(v) {
			t.Errorf("metric %s is %v (%v), want %d", name, g, ok, v)
		}
	}
	if st, err := os.Stat(metrics); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", st, err)
	}
	if left := names(t, dir); strings.Contains(left, ".holdfast.prom") {
		t.Errorf("left behind: %s", left)
	}

	frees := func(what string, unique int64) {
		t.Helper()
		before := get().Live
		r.must(t, "forget", what, "--force")
		if after := get().Live; before-after != unique {
			t.Errorf("%s: unique %d, but forgetting it frees %d", what, unique, before-after)
		}
		r.must(t, "gc", "--repack-below", "100%")
		r.must(t, "verify", "--read-data")
	}
	for _, p := range s.ByPoint {
		if p.VM == "web" && p.Name == second.Name {
			if p.Unique < mib {
				t.Errorf("%+v", p)
			}
			frees(p.VM+"/"+p.Name, p.Unique)
		}
	}
	for _, v := range s.ByVM {
		if v.VM == odd {
			frees(odd+"/latest", v.Unique)
		}
	}
	r.must(t, "stats", "--quick", "--metrics", metrics)
	if b, err := os.ReadFile(metrics); err != nil || strings.Contains(string(b), "unique") || !strings.Contains(string(b), "holdfast_points 1\n") {
		t.Errorf("%s, %v", b, err)
	}
}
