//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
)

// results is all that one run measured; --out writes it as JSON.
type results struct {
	Date      time.Time     `json:"date"`
	Seconds   float64       `json:"seconds"`
	Host      host          `json:"host"`
	LoadStart string        `json:"load_start"`
	LoadEnd   string        `json:"load_end"`
	Cold      bool          `json:"caches_dropped"`
	Image     image         `json:"image"`
	Tools     []toolVersion `json:"tools"`
	Samples   []sample      `json:"steps"`
	Sizes     []repoSize    `json:"sizes"`
	Mounts    []mountSample `json:"mounts"`
}

type host struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory int64  `json:"memory"` // bytes
	Kernel string `json:"kernel"`
	System string `json:"system"`
	Go     string `json:"go"`
}

// image describes the pair; all in bytes.
type image struct {
	Size    int64 `json:"size"`
	V1      int64 `json:"v1_allocated"`
	V2      int64 `json:"v2_allocated"`
	Changed int64 `json:"changed"` // in 4 KiB blocks that differ
}

type toolVersion struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// sample is one step of one program in one pass.
type sample struct {
	Pass int     `json:"pass"`
	Tool string  `json:"tool"`
	Step string  `json:"step"`
	Wall float64 `json:"wall_s"`
	CPU  float64 `json:"cpu_s"`
	RSS  int64   `json:"max_rss"`          // bytes
	Sync float64 `json:"sync_s,omitempty"` // restore: to sync the file system after it
}

// repoSize is what a repository takes of the medium after so many points.
type repoSize struct {
	Pass   int    `json:"pass"`
	Tool   string `json:"tool"`
	Points int    `json:"points"`
	Bytes  int64  `json:"bytes"`
}

// mountSample is one program's mount in one pass.
type mountSample struct {
	Pass       int          `json:"pass"`
	Tool       string       `json:"tool"`
	FirstByte  float64      `json:"first_byte_s"`
	Rows       []readSample `json:"rows"`
	Sequential float64      `json:"sequential_mb_s"`
	RSS        int64        `json:"max_rss"` // bytes
}

type readSample struct {
	Row  string  `json:"row"`
	P50  float64 `json:"p50_ms"`
	Mean float64 `json:"mean_ms"`
	P99  float64 `json:"p99_ms"`
	Rate float64 `json:"mb_s"`
}

func (r *results) writeJSON(path string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// describeHost says what the figures were measured on.
func describeHost(ctx context.Context) host {
	h := host{Cores: runtime.NumCPU(), CPU: field("/proc/cpuinfo", "model name"), Go: runtime.Version()}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	if out, err := command.Run(ctx, "uname", "-sr"); err == nil {
		h.Kernel = strings.TrimSpace(string(out))
	}
	h.System = strings.Trim(field("/etc/os-release", "PRETTY_NAME"), `"`)
	return h
}

// field finds "name: value" or "name=value" in a file; "" when there is none.
func field(file, name string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if rest = strings.TrimSpace(rest); ok && rest != "" && strings.ContainsRune(":=", rune(rest[0])) {
			return strings.TrimSpace(rest[1:])
		}
	}
	return ""
}

// loadAverage is the first three figures of proc(5)'s loadavg.
func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	f := strings.Fields(string(b))
	return strings.Join(f[:min(3, len(f))], " ")
}
