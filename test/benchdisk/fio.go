//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

// work is a row: what fio does.
type work struct {
	kind  string // of fio
	block string
	jobs  int
}

func (w work) name() string { return fmt.Sprintf("%s %s × %d", w.kind, w.block, w.jobs) }

func (w work) writes() bool { return w.kind == "randwrite" || w.kind == "write" }

func works() []work {
	var all []work
	for _, kind := range []string{"randread", "randwrite"} {
		for _, block := range []string{"4k", "128k"} {
			for _, jobs := range []int{1, 4, 16} {
				all = append(all, work{kind, block, jobs})
			}
		}
	}
	for _, kind := range []string{"read", "write"} {
		for _, jobs := range []int{1, 4, 16} {
			all = append(all, work{kind, "1m", jobs})
		}
	}
	return all
}

// target is a column: a way to the disk.
type target struct {
	name     string
	writable bool
	// start makes it ready; end lets it go.
	start func(ctx context.Context) (where string, end func() error, err error)
}

// fio measures all targets.
func (b *bench) fio(ctx context.Context) error {
	pair, err := testimage.MakeBench(ctx, b.dir, int64(b.size))
	if err != nil {
		return err
	}
	if err := b.backup(ctx, pair.V1); err != nil {
		return err
	}
	targets := b.targets(pair.V1)
	got := map[string][]float64{} // row and column => MB/s
	for pass := range b.passes {
		for _, w := range works() {
			for _, t := range targets {
				if w.writes() && !t.writable {
					continue
				}
				rate, err := b.once(ctx, t, w, pair.V1)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", t.name, w.name(), err)
				}
				key := w.name() + "\x00" + t.name
				got[key] = append(got[key], rate)
				fmt.Fprintf(os.Stderr, "%s  pass %d: %s: %s: %.0f MB/s\n", time.Now().Format("15:04:05"), pass+1, t.name, w.name(), rate)
			}
		}
	}
	head := []string{"MB/s"}
	for _, t := range targets {
		head = append(head, t.name)
	}
	head = append(head, "NBD / nbdkit")
	var rows [][]string
	for _, w := range works() {
		row := []string{w.name()}
		medians := map[string]float64{}
		for _, t := range targets {
			list := got[w.name()+"\x00"+t.name]
			if len(list) == 0 {
				row = append(row, "")
				continue
			}
			medians[t.name] = median(list)
			row = append(row, fmt.Sprintf("%.0f", medians[t.name]))
		}
		rows = append(rows, append(row, fmt.Sprintf("%.2f", medians["NBD"]/medians["nbdkit"])))
	}
	table(head, rows)
	return nil
}

func (b *bench) targets(image string) []target {
	sock := filepath.Join(b.dir, "s")
	uri := "nbd+unix:///?socket=" + sock
	server := func(words ...string) func(ctx context.Context) (string, func() error, error) {
		return func(ctx context.Context) (string, func() error, error) {
			os.Remove(sock)
			p, err := b.start(ctx, words...)
			if err != nil {
				return "", nil, err
			}
			return uri, func() error { p.Stop(); return nil }, ready(ctx, p, sock)
		}
	}
	mnt := filepath.Join(b.dir, "mnt")
	return []target{
		{name: "NBD", writable: true, start: server(b.holdfast, "--no-progress", "export", "vm/latest", "--nbd", "unix:"+sock, "--writable")},
		{name: "nbdkit", writable: true, start: server("nbdkit", "-f", "-U", sock, "--filter=cow", "file", image)},
		{name: "mount", start: func(ctx context.Context) (string, func() error, error) {
			if err := os.MkdirAll(mnt, 0o700); err != nil {
				return "", nil, err
			}
			if _, err := b.run(ctx, "mount", mnt, "--background"); err != nil {
				return "", nil, err
			}
			return filepath.Join(mnt, "vm/latest/disk0.raw"), func() error { _, err := b.run(ctx, "umount", mnt); return err }, nil
		}},
	}
}

// ready waits for a socket.
func ready(ctx context.Context, p *command.Process, sock string) error {
	for range 1000 {
		if _, err := os.Stat(sock); err == nil {
			return nil
		}
		if ended, err := p.Ended(); ended {
			return errors.Join(errors.New("the server ended"), err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return errors.New("the server does not listen")
}

// once gives one figure, MB/s.
func (b *bench) once(ctx context.Context, t target, w work, image string) (rate float64, err error) {
	if err := cool(); err != nil {
		return 0, err
	}
	where, end, err := t.start(ctx)
	if end != nil {
		defer func() { err = errors.Join(err, end()) }()
	}
	if err != nil {
		return 0, err
	}
	st, err := os.Stat(image)
	if err != nil {
		return 0, err
	}
	args := []string{"fio", "--name=x", "--output-format=json", "--rw=" + w.kind, "--bs=" + w.block, "--numjobs=" + strconv.Itoa(w.jobs), "--group_reporting",
		"--time_based", "--runtime=" + strconv.Itoa(b.seconds), "--size=" + strconv.FormatInt(st.Size(), 10), "--randrepeat=0", "--norandommap", "--allow_file_create=0"}
	if t.name == "mount" {
		args = append(args, "--filename="+where, "--readonly", "--ioengine=psync", "--invalidate=0")
	} else {
		args = append(args, "--ioengine=nbd", "--uri="+where)
	}
	out, err := command.Run(ctx, args...)
	if err != nil {
		return 0, err
	}
	var res struct {
		Jobs []struct {
			Read, Write struct {
				Bytes   float64 `json:"io_bytes"`
				Runtime float64 `json:"runtime"` // ms
			}
			Error int
		}
	}
	// Its NBD engine says on stdout that it is connected.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &res); err != nil || len(res.Jobs) != 1 || res.Jobs[0].Error != 0 {
		return 0, fmt.Errorf("fio: %w: %.300s", err, out)
	}
	r := res.Jobs[0].Read
	if w.writes() {
		r = res.Jobs[0].Write
	}
	return r.Bytes / r.Runtime / 1000, nil
}
