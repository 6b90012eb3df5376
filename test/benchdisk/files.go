//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
	"github.com/holdfast-backup/holdfast/test/testimage"
)

// guestDisk is how large the disk of many files is, bytes: a file server's.
const guestDisk = 1 << 40

// filesOfGuest measures a guest's files in a point, a disk of 1 TiB with many small ones: one file by `cp` from a cold start, and all of them
// through the mount, beside the kernel's own mount of the same disk by a loop device over the raw file in the same mount.
func (b *bench) filesOfGuest(ctx context.Context) error {
	image := filepath.Join(b.dir, "files.raw")
	paths, err := b.makeFiles(ctx, image)
	if err != nil {
		return err
	}
	if err := b.backup(ctx, image); err != nil {
		return err
	}
	var single, memory []float64
	var walks, sums [2][]float64 // the kernel's, ours
	for pass := range b.passes {
		if err := cool(); err != nil {
			return err
		}
		began := time.Now()
		if _, err := b.run(ctx, "cp", "vm/latest/files/disk0/"+paths[pass*7919%len(paths)], filepath.Join(b.dir, "one")); err != nil {
			return err
		}
		single = append(single, time.Since(began).Seconds())
		for i, root := range []func(string) (string, func() error, error){b.kernelMount(ctx), ownMount} {
			walk, sum, peak, err := b.walkAndHash(ctx, root)
			if err != nil {
				return err
			}
			walks[i], sums[i] = append(walks[i], walk), append(sums[i], sum)
			if i == 1 {
				memory = append(memory, peak)
			}
			fmt.Fprintf(os.Stderr, "pass %d: walked in %.1f s, %d files hashed in %.1f s, peak memory %.0f MiB\n", pass+1, walk, b.files/10, sum, peak)
		}
	}
	ratio := func(f [2][]float64) string { return fmt.Sprintf("%.2f", median(f[0])/median(f[1])) }
	seconds := func(f []float64) string { return fmt.Sprintf("%.2f s", median(f)) }
	fmt.Printf("\nFiles of a guest: %s, 1 TiB, %d files\n\n", b.fileSystem, b.files)
	table([]string{"", "kernel's mount of the raw file", "files/", "rate beside the kernel's"}, [][]string{
		{"one file by `cp`, cold", "", seconds(single), ""},
		{"all names and attributes", seconds(walks[0]), seconds(walks[1]), ratio(walks)},
		{fmt.Sprintf("contents of %d files", b.files/10), seconds(sums[0]), seconds(sums[1]), ratio(sums)},
		{"peak memory of the mount", "", fmt.Sprintf("%.0f MiB", median(memory)), ""},
	})
	return nil
}

// makeFiles makes the disk and gives the paths of the files.
func (b *bench) makeFiles(ctx context.Context, image string) (paths []string, err error) {
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, guestDisk); err != nil {
		return nil, err
	}
	if _, err := command.Run(ctx, "mkfs."+b.fileSystem, "-q", image); err != nil {
		return nil, err
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	noise := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(noise)
	err = testimage.InMount(ctx, testimage.Part{Image: image}, b.fileSystem, filepath.Join(b.dir, "fill"), func(root string) error {
		for i := range b.files {
			dir := fmt.Sprintf("share/%03d/%03d", i/10000, i/100%100)
			if i < b.files/10 {
				dir = "inbox"
			}
			path := fmt.Sprintf("%s/document %07d.txt", dir, i)
			if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
				return err
			}
			at, size := rnd.IntN(len(noise)-10000), 1+rnd.IntN(9000)
			if err := os.WriteFile(filepath.Join(root, path), noise[at:at+size], 0o644); err != nil {
				return err
			}
			paths = append(paths, path)
		}
		return nil
	})
	return paths, err
}

// ownMount is where the mount shows the files.
func ownMount(mnt string) (string, func() error, error) {
	return mnt + "/vm/latest/files/disk0", func() error { return nil }, nil
}

// kernelMount mounts the raw file that the mount shows.
func (b *bench) kernelMount(ctx context.Context) func(string) (string, func() error, error) {
	return func(mnt string) (string, func() error, error) {
		dir := filepath.Join(b.dir, "kernel")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", nil, err
		}
		if _, err := command.Run(ctx, "mount", "-o", "loop,ro,noatime", mnt+"/vm/latest/disk0.raw", dir); err != nil {
			return "", nil, err
		}
		return dir, func() error { return unix.Unmount(dir, 0) }, nil
	}
}

// walkAndHash takes all names and attributes, then what is in one large directory, from a cold start each. Times in seconds; peak memory of
// the mounting process in MiB.
func (b *bench) walkAndHash(ctx context.Context, root func(mnt string) (string, func() error, error)) (walk, sum, peak float64, err error) {
	walk, first, err := b.mounted(ctx, root, func(dir string) error { return b.walk(dir, b.files) })
	if err != nil {
		return 0, 0, 0, err
	}
	sum, second, err := b.mounted(ctx, root, func(dir string) error { return hashAll(dir + "/inbox") })
	return walk, sum, max(first, second), err
}

// mounted starts a mount, does the work in what root makes of it, and ends it.
func (b *bench) mounted(ctx context.Context, root func(mnt string) (string, func() error, error), work func(dir string) error) (took, peak float64, err error) {
	if err := cool(); err != nil {
		return 0, 0, err
	}
	mnt := filepath.Join(b.dir, "mnt")
	if err := os.MkdirAll(mnt, 0o755); err != nil {
		return 0, 0, err
	}
	p, err := b.start(ctx, b.holdfast, "mount", mnt)
	if err != nil {
		return 0, 0, err
	}
	defer p.Stop()
	for range 200 {
		if _, err = os.Stat(mnt + "/vm/latest/disk0.raw"); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	dir, unmount, err := root(mnt)
	if err != nil {
		return 0, 0, err
	}
	err = work(dir)
	took = time.Since(began).Seconds()
	peak, errPeak := peakMemory(p.PID)
	return took, peak, errors.Join(err, errPeak, unmount(), unix.Unmount(mnt, 0))
}

// walk asks for the attributes of all that is below dir.
func (b *bench) walk(dir string, want int) error {
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().IsRegular() {
			files++
		}
		return err
	})
	if err == nil && files != want {
		err = fmt.Errorf("%s has %d files, want %d", dir, files, want)
	}
	return err
}

// hashAll reads the files of a directory.
func hashAll(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	h := sha256.New()
	for _, e := range list {
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// peakMemory is VmHWM of proc(5) in MiB.
func peakMemory(pid int) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "VmHWM:"); ok {
			var kib float64
			_, err := fmt.Sscan(rest, &kib)
			return kib / 1024, err
		}
	}
	return 0, errors.New("no VmHWM")
}
