package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// metrics collects figures in the text format of Prometheus, version 0.0.4: see
// "Exposition formats" in its documentation.
type metrics struct{ b bytes.Buffer }

// family begins the samples of one name.
func (m *metrics) family(name, help string) func(value float64, labels ...string) {
	fmt.Fprintf(&m.b, "# HELP %s %s\n# TYPE %s gauge\n", name, help, name)
	return func(value float64, labels ...string) {
		m.b.WriteString(name)
		for i := 0; i < len(labels); i += 2 {
			sep := byte(',')
			if i == 0 {
				sep = '{'
			}
			m.b.WriteByte(sep)
			fmt.Fprintf(&m.b, `%s="%s"`, labels[i], labelEscape.Replace(strings.ToValidUTF8(labels[i+1], "\uFFFD")))
		}
		if len(labels) > 0 {
			m.b.WriteByte('}')
		}
		m.b.WriteString(" " + strconv.FormatFloat(value, 'f', -1, 64) + "\n")
	}
}

var labelEscape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// statsMetrics are the figures of `stats`.
func statsMetrics(res *statsResult, vms []store.VMUsage, now time.Time) []byte {
	var m metrics
	one := func(name, help string, value float64) { m.family(name, help)(value) }
	m.family("holdfast_repository_info", "The repository that the other figures are of.")(1, "id", res.ID, "encrypted", strconv.FormatBool(res.Encrypted))
	one("holdfast_metrics_timestamp_seconds", "When these figures were taken.", float64(now.Unix()))
	one("holdfast_points", "Restore points.", float64(res.RepoStats.Points))
	one("holdfast_vms", "VMs that have restore points.", float64(res.RepoStats.VMs))
	one("holdfast_packs", "Packs.", float64(res.Packs))
	one("holdfast_logical_bytes", "Size of the disks of all restore points together.", float64(res.Total))
	one("holdfast_stored_bytes", "Size of all packs.", float64(res.Stored))
	if u := res.Usage; u != nil {
		one("holdfast_data_bytes", "What of holdfast_logical_bytes is no hole.", float64(u.Data))
		one("holdfast_unique_bytes", "The different chunks that restore points use, before compression.", float64(u.Plain))
		one("holdfast_unique_packed_bytes", "The same chunks as they are stored.", float64(u.Packed))
		one("holdfast_live_bytes", "What of holdfast_stored_bytes restore points use.", float64(u.Live))
		one("holdfast_shared_bytes", "What of holdfast_live_bytes several VMs use.", float64(u.Shared))
		one("holdfast_missing_chunks", "Chunks and pages that restore points use and that are not there.", float64(u.Missing))
		one("holdfast_damaged_points", "Restore points whose manifest cannot be read.", float64(u.Damaged))
	}
	for _, f := range []struct {
		name, help string
		deep       bool // known with usage only
		value      func(*store.VMUsage) float64
	}{
		{"holdfast_vm_points", "Restore points of the VM.", false, func(v *store.VMUsage) float64 { return float64(v.Points) }},
		{"holdfast_vm_first_point_timestamp_seconds", "Time of its oldest restore point.", false, func(v *store.VMUsage) float64 { return float64(v.First.Unix()) }},
		{"holdfast_vm_last_point_timestamp_seconds", "Time of its newest restore point.", false, func(v *store.VMUsage) float64 { return float64(v.Last.Unix()) }},
		{"holdfast_vm_size_bytes", "Size of the disks of its newest restore point.", false, func(v *store.VMUsage) float64 { return float64(v.Size) }},
		{"holdfast_vm_stored_bytes", "What its restore points stored when they were made.", false, func(v *store.VMUsage) float64 { return float64(v.Stored) }},
		{"holdfast_vm_data_bytes", "What of the disks of all its restore points is no hole.", true, func(v *store.VMUsage) float64 { return float64(v.Data) }},
		{"holdfast_vm_unique_bytes", "What forgetting all its restore points would free.", true, func(v *store.VMUsage) float64 { return float64(v.Unique) }},
	} {
		if f.deep && res.Usage == nil {
			continue
		}
		sample := m.family(f.name, f.help)
		for i := range vms {
			sample(f.value(&vms[i]), "vm", vms[i].VM)
		}
	}
	return m.b.Bytes()
}

// writeMetrics replaces file in one step, since a collector may read it at any moment. It
// is readable by everybody, as collectors run as another user.
func writeMetrics(file string, res *statsResult, vms []store.VMUsage, now time.Time) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(statsMetrics(res, vms, now))
	if err == nil {
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
