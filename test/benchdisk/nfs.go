//go:build linux

package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

//go:embed testdata/nfsload.c
var loadSource []byte

// calls is a row: what the client asks for, so many calls at a time.
type calls struct {
	kind   string // of nfsload
	block  int64  // bytes
	depth  int
	random bool
	name   string
}

func (c calls) writes() bool { return c.kind != "read" }

// nfsCalls are the rows, or those with rows in their names.
func nfsCalls(rows string) []calls {
	return slices.DeleteFunc([]calls{
		{"read", 1 << 20, 4, false, "read 1 MiB, sequential × 4"},
		{"read", 64 << 10, 8, false, "read 64 KiB, sequential × 8"},
		{"read", 64 << 10, 8, true, "read 64 KiB, random × 8"},
		{"read", 4 << 10, 1, true, "read 4 KiB, random × 1"},
		{"read", 4 << 10, 16, true, "read 4 KiB, random × 16"},
		{"write", 4 << 10, 1, true, "write 4 KiB, random × 1"},
		{"write", 4 << 10, 16, true, "write 4 KiB, random × 16"},
		{"sync", 4 << 10, 1, true, "write 4 KiB, FILE_SYNC × 1"},
		{"sync", 4 << 10, 16, true, "write 4 KiB, FILE_SYNC × 16"},
		{"fsync", 4 << 10, 1, true, "write 4 KiB and COMMIT × 1"},
	}, func(c calls) bool { return !strings.Contains(c.name, rows) })
}

// wholeDisk is read to have it in the caches.
var wholeDisk = calls{"read", 1 << 20, 4, false, "whole disk"}

// figure is one measurement.
type figure struct {
	rate float64 // calls a second
	cpu  float64 // of the server, µs a call
	sum  string  // of what was read
}

// nfsServer is a column.
type nfsServer struct {
	name   string
	export string
	mount  int // port of MOUNT
	start  func(ctx context.Context) (*command.Process, error)
	end    func() error // after the process; nil for nothing
}

const (
	nfsPort   = 2049
	mountPort = 20048 // of nfs-ganesha
)

// nfs measures Holdfast's NFS server over a point, nfs-ganesha over the same bytes in a plain file, and Holdfast's over that file.
func (b *bench) nfs(ctx context.Context) error {
	pair, err := testimage.MakeBench(ctx, b.dir, int64(b.size))
	if err != nil {
		return err
	}
	if err := b.backup(ctx, pair.V1); err != nil {
		return err
	}
	// Where both others have it: below data/ in a folder.
	plain := filepath.Join(b.dir, "plain", "data", "disk0.raw")
	if err := os.MkdirAll(filepath.Dir(plain), 0o755); err != nil {
		return err
	}
	if err := os.Rename(pair.V1, plain); err != nil {
		return err
	}
	lists, err := b.offsets(plain)
	if err != nil {
		return err
	}
	load := filepath.Join(b.dir, "nfsload")
	if err := os.WriteFile(load+".c", loadSource, 0o600); err != nil {
		return err
	}
	if _, err := command.Run(ctx, "gcc", "-O2", "-Wall", "-D_FILE_OFFSET_BITS=64", "-o", load, load+".c", "-lnfs"); err != nil {
		return err
	}
	ganesha, err := b.ganesha(ctx, filepath.Dir(plain))
	if err != nil {
		return err
	}
	servers := []nfsServer{b.exported(), ganesha, b.folder()}
	got := map[string][2][]figure{} // row and column => cold, warm
	for pass := range b.passes {
		for _, w := range nfsCalls(b.rows) {
			for i := range servers {
				s := servers[(i+pass)%len(servers)]
				both, err := b.onceNFS(ctx, s, w, load, lists)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", s.name, w.name, err)
				}
				key := w.name + "\x00" + s.name
				list := got[key]
				for k := range both {
					list[k] = append(list[k], both[k])
				}
				got[key] = list
				fmt.Fprintf(os.Stderr, "%s  pass %d: %s: %s: cold %.0f/s, %.0f µs CPU; warm %.0f/s, %.0f µs CPU\n", time.Now().Format("15:04:05"), pass+1,
					s.name, w.name, both[0].rate, both[0].cpu, both[1].rate, both[1].cpu)
			}
			if err := sameSums(got, w, servers); err != nil {
				return err
			}
		}
	}
	for k, caches := range []string{"cold", "warm"} {
		fmt.Printf("\nNFS, caches %s, calls a second and µs of the server's CPU for one\n\n", caches)
		b.nfsTable(servers, func(w calls, s nfsServer) []figure { return got[w.name+"\x00"+s.name][k] })
	}
	return nil
}

// nfsTable prints the figures of all rows; the first two columns are compared.
func (b *bench) nfsTable(servers []nfsServer, of func(calls, nfsServer) []figure) {
	head := []string{""}
	for _, s := range servers {
		head = append(head, s.name)
	}
	head = append(head, servers[0].name+" / "+servers[1].name, "of single passes", servers[2].name+" / "+servers[1].name)
	for _, s := range servers {
		head = append(head, "CPU "+s.name)
	}
	var rows [][]string
	for _, w := range nfsCalls(b.rows) {
		var rates, cpus [3]float64
		for i, s := range servers {
			list := of(w, s)
			rates[i] = medianOf(list, func(f figure) float64 { return f.rate })
			cpus[i] = medianOf(list, func(f figure) float64 { return f.cpu })
		}
		ours, theirs := of(w, servers[0]), of(w, servers[1])
		low, high := ours[0].rate/theirs[0].rate, 0.0
		for i := range ours {
			r := ours[i].rate / theirs[i].rate
			low, high = min(low, r), max(high, r)
		}
		row := []string{w.name}
		for _, r := range rates {
			row = append(row, fmt.Sprintf("%.0f", r))
		}
		row = append(row, fmt.Sprintf("%.2f", rates[0]/rates[1]), fmt.Sprintf("%.2f–%.2f", low, high), fmt.Sprintf("%.2f", rates[2]/rates[1]))
		for _, c := range cpus {
			row = append(row, fmt.Sprintf("%.0f", c))
		}
		rows = append(rows, row)
	}
	table(head, rows)
}

func medianOf(list []figure, f func(figure) float64) float64 {
	var all []float64
	for _, x := range list {
		all = append(all, f(x))
	}
	return median(all)
}

// sameSums compares what the last pass read from the servers: before anything is written it must be the same.
func sameSums(got map[string][2][]figure, w calls, servers []nfsServer) error {
	if w.writes() || len(got[w.name+"\x00"+servers[0].name][0]) > 1 {
		return nil
	}
	for _, s := range servers[1:] {
		if a, b := got[w.name+"\x00"+servers[0].name][1][0].sum, got[w.name+"\x00"+s.name][1][0].sum; a != b {
			return fmt.Errorf("%s: %s and %s do not serve the same bytes: %s and %s", w.name, servers[0].name, s.name, a, b)
		}
	}
	return nil
}

// offsets lists where the image has data, in blocks of each size, in order and not: files for nfsload.
func (b *bench) offsets(image string) (map[string]string, error) {
	f, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	lists := map[string]string{}
	for _, w := range append(nfsCalls(b.rows), wholeDisk) {
		var list []int64
		for off := int64(0); off+w.block <= st.Size(); {
			at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				break
			}
			if err != nil {
				return nil, err
			}
			off = at - at%w.block
			if off+w.block <= st.Size() {
				list = append(list, off)
			}
			off += w.block
		}
		if w.random {
			rand.New(rand.NewPCG(1, 1)).Shuffle(len(list), func(i, k int) { list[i], list[k] = list[k], list[i] })
		}
		var buf bytes.Buffer
		binary.Write(&buf, binary.LittleEndian, list)
		name := filepath.Join(b.dir, fmt.Sprintf("offsets-%d-%t", w.block, w.random))
		if err := os.WriteFile(name, buf.Bytes(), 0o600); err != nil {
			return nil, err
		}
		lists[w.name] = name
	}
	return lists, nil
}

// onceNFS gives the figures of a server that was just started, caches of the kernel empty, and again when all has been read once.
func (b *bench) onceNFS(ctx context.Context, s nfsServer, w calls, load string, lists map[string]string) (both [2]figure, err error) {
	if err := cool(); err != nil {
		return both, err
	}
	if err := touch(2 * int64(b.size)); err != nil {
		return both, err
	}
	p, err := s.start(ctx)
	if err != nil {
		return both, err
	}
	defer func() {
		p.Stop()
		if s.end != nil {
			err = errors.Join(err, s.end())
		}
	}()
	if err := listens(ctx, p, nfsPort); err != nil {
		return both, err
	}
	run := func(kind string, w calls, seconds int) (f figure, err error) {
		before, err := cpuOf(p.PID)
		if err != nil {
			return f, err
		}
		out, err := command.Run(ctx, load, "127.0.0.1", strconv.Itoa(nfsPort), strconv.Itoa(s.mount), s.export, "disk0.raw", kind,
			strconv.FormatInt(w.block, 10), strconv.Itoa(w.depth), strconv.Itoa(seconds), lists[w.name])
		if err != nil {
			return f, err
		}
		after, err := cpuOf(p.PID)
		if err != nil {
			return f, err
		}
		var res struct {
			Ops     float64
			Seconds float64
			Sum     string
		}
		if err := json.Unmarshal(out, &res); err != nil {
			return f, fmt.Errorf("nfsload: %w: %.300s", err, out)
		}
		return figure{rate: res.Ops / res.Seconds, cpu: (after - before).Seconds() * 1e6 / res.Ops, sum: res.Sum}, nil
	}
	seconds := b.seconds
	if !w.random {
		seconds = 0 // once over the disk: then the caches are not cold any more
	}
	if both[0], err = run(w.kind, w, seconds); err != nil {
		return both, err
	}
	sum, err := run("check", wholeDisk, 0)
	if err != nil {
		return both, err
	}
	both[1], err = run(w.kind, w, b.seconds)
	both[1].sum = sum.sum
	return both, err
}

// touch has the machine get so many bytes of memory and lets them go. A virtual machine may have given back to its host what the caches had, and whoever
// is next would wait until it is there again.
func touch(n int64) error {
	p, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	return unix.Munmap(p)
}

// exported is `holdfast export`, with no switches but where.
func (b *bench) exported() nfsServer {
	dir := filepath.Join(b.dir, "overlay")
	return nfsServer{name: "Holdfast", export: "/vm", mount: nfsPort,
		start: func(ctx context.Context) (*command.Process, error) {
			return b.start(ctx, b.holdfast, "--no-progress", "export", "vm/latest", "--nfs", "127.0.0.1:"+strconv.Itoa(nfsPort), "--writable", "--overlay", dir)
		},
		end: func() error { return os.RemoveAll(dir) },
	}
}

// cpuOf is what a process took up to now, user and system: proc_pid_stat(5). Its children are not in it.
func cpuOf(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var sum int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100
	return time.Duration(sum) * tick, nil
}
