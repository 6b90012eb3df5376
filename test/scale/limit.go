//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// memoryGroup is a control group whose processes may use so much memory together, with the
// page cache and mapped files that they bring in; the kernel takes these back at the limit
// and kills a process that needs more than that.
type memoryGroup struct{ dir string }

// newMemoryGroup makes one of either version of cgroups(7); an error where that is not allowed.
func newMemoryGroup(limit int64) (*memoryGroup, error) {
	name := fmt.Sprintf("holdfast-scale-%d", os.Getpid())
	var last error
	for _, v := range []struct{ parent, file string }{
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes"}, // version 1
		{"/sys/fs/cgroup", "memory.max"},
	} {
		dir := filepath.Join(v.parent, name)
		if last = os.Mkdir(dir, 0o755); last != nil {
			continue
		}
		if last = os.WriteFile(filepath.Join(dir, v.file), []byte(strconv.FormatInt(limit, 10)), 0); last == nil {
			return &memoryGroup{dir}, nil
		}
		os.Remove(dir)
	}
	return nil, last
}

// command makes a command run in the group.
func (g *memoryGroup) command(args []string) []string {
	if g == nil {
		return args
	}
	return append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(g.dir, "cgroup.procs")}, args...)
}

// close removes the group; its processes have ended.
func (g *memoryGroup) close() {
	if g != nil {
		os.Remove(g.dir)
	}
}
