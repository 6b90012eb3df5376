//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

// delay is what a slow repository adds to every read of a pack.
const delay = 20 * time.Millisecond

// boots measures the time from the command to a shell on the serial line: of the plain file, of a point, and of a point
// in a slow repository for the first time and again.
func (b *bench) boots(ctx context.Context) error {
	image := filepath.Join(b.dir, "debian.raw")
	if _, err := testimage.MakeBootable(ctx, image, testimage.DefaultCache()); err != nil {
		return err
	}
	if err := b.backup(ctx, image); err != nil {
		return err
	}
	repo := filepath.Join(b.dir, "repo")
	notes := func() error { return os.RemoveAll(filepath.Join(repo, "notes")) }
	kinds := []struct {
		name  string
		first func() error
		boot  func() (float64, error)
	}{
		{"plain file", nil, func() (float64, error) { return b.bootFile(ctx, image) }},
		{"point, never booted before", notes, func() (float64, error) { return b.bootPoint(ctx) }},
		{"point, booted before", nil, func() (float64, error) { return b.bootPoint(ctx) }},
		{"slow repository, never booted before", notes, func() (float64, error) { return b.slowly(func() (float64, error) { return b.bootPoint(ctx) }) }},
		{"slow repository, booted before", nil, func() (float64, error) { return b.slowly(func() (float64, error) { return b.bootPoint(ctx) }) }},
	}
	got := make([][]float64, len(kinds))
	for pass := range b.passes {
		for i, k := range kinds {
			if k.first != nil {
				if err := k.first(); err != nil {
					return err
				}
			}
			if err := cool(); err != nil {
				return err
			}
			s, err := k.boot()
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			got[i] = append(got[i], s)
			fmt.Fprintf(os.Stderr, "%s  pass %d: %s: %.1f s\n", time.Now().Format("15:04:05"), pass+1, k.name, s)
		}
	}
	var rows [][]string
	plain := 0.0
	for i, k := range kinds {
		m := median(got[i])
		if i == 0 {
			plain = m
		}
		rows = append(rows, []string{k.name, fmt.Sprintf("%.1f", m), fmt.Sprintf("%.2f", m/plain)})
	}
	fmt.Printf("Debian under TCG, from the command to a shell; a slow repository adds %v to every read of a pack.\n\n", delay)
	table([]string{"", "s", "/ plain file"}, rows)
	return nil
}

// bootFile boots the plain file as `holdfast boot` would boot a point.
func (b *bench) bootFile(ctx context.Context, image string) (took float64, err error) {
	// A copy, since it is written to.
	if err := testimage.CopySparse(ctx, image, image+".copy"); err != nil {
		return 0, err
	}
	if err := cool(); err != nil {
		return 0, err
	}
	serial := filepath.Join(b.dir, "serial.sock")
	os.Remove(serial)
	began := time.Now()
	p, err := b.start(ctx, "qemu-system-x86_64", "-nodefaults", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "512",
		"-rtc", "base=utc", "-display", "none", "-vga", "std", "-device", "qemu-xhci", "-device", "usb-tablet", "-device", "usb-kbd",
		"-serial", "unix:"+serial+",server=on,wait=off", "-device", "virtio-serial-pci",
		"-blockdev", `{"driver":"raw","node-name":"disk0","read-only":false,"file":{"driver":"file","filename":"`+image+`.copy"}}`,
		"-device", "virtio-blk-pci,drive=disk0,bootindex=1")
	if err != nil {
		return 0, err
	}
	defer p.Stop()
	return shell(ctx, serial, began)
}

// bootPoint boots the point, and ends it.
func (b *bench) bootPoint(ctx context.Context) (took float64, err error) {
	began := time.Now()
	r, err := b.run(ctx, "boot", "vm/latest", "--on", "qemu", "--bus", "virtio", "--memory", "512M", "--background", "--json")
	if err != nil {
		return 0, err
	}
	var s struct{ Name, Serial string }
	if err := json.Unmarshal(r.Out, &s); err != nil {
		return 0, err
	}
	defer func() {
		_, serr := b.run(ctx, "boot", "stop", s.Name, "--patience", "0s")
		err = errors.Join(err, serr)
	}()
	return shell(ctx, strings.TrimPrefix(s.Serial, "unix:"), began)
}

// shell waits for the shell and gives the seconds since began.
func shell(ctx context.Context, socket string, began time.Time) (float64, error) {
	var conn net.Conn
	for {
		var err error
		if conn, err = net.Dial("unix", socket); err == nil {
			break
		}
		if time.Since(began) > 30*time.Second {
			return 0, err
		}
		time.Sleep(5 * time.Millisecond)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	conn.SetReadDeadline(began.Add(10 * time.Minute))
	var said []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(said, []byte(testimage.Prompt)) {
		n, err := conn.Read(buf)
		if err != nil {
			return 0, fmt.Errorf("no shell: %w: %.500s", err, said)
		}
		said = append(said, buf[:n]...)
	}
	return time.Since(began).Seconds(), nil
}

// slowly runs fn while the packs of the repository are read slowly.
func (b *bench) slowly(fn func() (float64, error)) (took float64, err error) {
	packs := filepath.Join(b.dir, "repo", "packs")
	fast := packs + ".fast"
	if err := os.Rename(packs, fast); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.Remove(packs), os.Rename(fast, packs)) }()
	if err := os.Mkdir(packs, 0o700); err != nil {
		return 0, err
	}
	unmount, err := mountSlow(fast, packs, delay)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	return fn()
}
