//go:build linux

package testimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/test/command"
)

// Layout of the demonstration disk, in bytes. It is a GPT disk as Debian's
// installer makes them, but for the boot loader and kernel, which it has not.
const (
	demoBIOS = 1 * mib // p1: BIOS boot
	demoESP  = 64 * mib
	demoSwap = 128 * mib
	demoRoot = demoESP + demoBIOS + mib // offset of p3

	// MinDemoSize leaves the root partition some room beside Debian.
	MinDemoSize = 1 << 30
)

// Disk is the demonstration disk and where its partitions are.
type Disk struct {
	Path string
	Size int64 // bytes
	ESP  Part  // p2: VFAT
	Root Part  // p3: ext4 with a Debian minbase system
	Swap Part  // p4
}

func demoDisk(path string, size int64) Disk {
	// The last MiB is for the backup GPT.
	swap := size - mib - demoSwap
	return Disk{
		Path: path,
		Size: size,
		ESP:  Part{Image: path, Off: mib + demoBIOS, Len: demoESP},
		Root: Part{Image: path, Off: demoRoot, Len: swap - demoRoot},
		Swap: Part{Image: path, Off: swap, Len: demoSwap},
	}
}

// On returns the same disk in another file: a copy, or a mounted restore point.
func (d Disk) On(path string) Disk { return demoDisk(path, d.Size) }

// MakeDemo builds the disk: BIOS boot, an EFI system partition filled with
// mtools (the kernel need not know VFAT), a root partition with Debian, swap.
// The Debian tree is kept as a tarball in cache, which is made if need be; only
// the first call needs the network. Needs root.
func MakeDemo(ctx context.Context, path, cache string, size int64) (Disk, error) {
	d := demoDisk(path, size)
	if size < MinDemoSize || size%mib != 0 {
		return d, fmt.Errorf("disk size %d: want whole MiB, at least %d bytes", size, MinDemoSize)
	}
	tarball, err := debianTarball(ctx, cache)
	if err != nil {
		return d, fmt.Errorf("debian: %w", err)
	}
	if err := emptyFile(path, size); err != nil {
		return d, err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"partition table", func() error { return d.partition(ctx) }},
		{"EFI system partition", func() error { return d.fillESP(ctx) }},
		{"root partition", func() error { return d.fillRoot(ctx, tarball) }},
		{"swap partition", func() error { return d.makeSwap(ctx) }},
	} {
		if err := step.do(); err != nil {
			return d, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return d, syncFile(path)
}

func (d Disk) partition(ctx context.Context) error {
	part := func(n int, off, length int64, kind, name string) []string {
		return []string{
			fmt.Sprintf("--new=%d:%d:%d", n, off/512, (off+length)/512-1),
			fmt.Sprintf("--typecode=%d:%s", n, kind), fmt.Sprintf("--change-name=%d:%s", n, name),
		}
	}
	args := []string{"sgdisk", "--set-alignment=2048"}
	args = append(args, part(1, mib, demoBIOS, "ef02", "bios")...)
	args = append(args, part(2, d.ESP.Off, d.ESP.Len, "ef00", "esp")...)
	args = append(args, part(3, d.Root.Off, d.Root.Len, "8300", "root")...)
	args = append(args, part(4, d.Swap.Off, d.Swap.Len, "8200", "swap")...)
	_, err := command.Run(ctx, append(args, d.Path)...)
	return err
}

// fillESP makes the file system in a file of its own, since old mkfs.vfat knows
// no offset, and writes it into place.
func (d Disk) fillESP(ctx context.Context) error {
	esp := d.Path + ".esp"
	defer os.Remove(esp)
	if err := emptyFile(esp, d.ESP.Len); err != nil {
		return err
	}
	if _, err := command.Run(ctx, "mkfs.vfat", "-F", "32", "-n", "ESP", esp); err != nil {
		return err
	}
	if _, err := command.Run(ctx, "mmd", "-i", esp, "::/EFI", "::/EFI/debian"); err != nil {
		return err
	}
	for name, content := range d.ESPFiles() {
		cp := command.Command{Args: []string{"mcopy", "-i", esp, "-", "::" + name}, In: strings.NewReader(content)}
		if _, err := cp.Run(ctx); err != nil {
			return err
		}
	}
	return writeInto(d.Path, d.ESP.Off, esp)
}

// ESPFiles is what the EFI system partition holds: path => content.
func (d Disk) ESPFiles() map[string]string {
	return map[string]string{
		"/EFI/debian/grub.cfg": "search --label root --set root\nconfigfile /boot/grub/grub.cfg\n",
		"/a long file name with spaces, which VFAT stores apart.txt": strings.Repeat("Holdfast demonstration disk\n", 3000),
	}
}

// writeInto writes the content of file src into dst at off.
func writeInto(dst string, off int64, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(io.NewOffsetWriter(out, off), in); err != nil {
		return err
	}
	return out.Close()
}

func (d Disk) fillRoot(ctx context.Context, tarball string) error {
	dev, detach, err := Attach(ctx, d.Root)
	if err != nil {
		return err
	}
	_, err = command.Run(ctx, "mkfs.ext4", "-q", "-L", "root", "-E", "lazy_itable_init=0,lazy_journal_init=0", dev)
	if err := errors.Join(err, detach()); err != nil {
		return err
	}
	return InMount(ctx, d.Root, "ext4", d.Path+".mnt", func(root string) error {
		if _, err := command.Run(ctx, "tar", "-C", root, "--numeric-owner", "-xf", tarball); err != nil {
			return err
		}
		return d.configure(root)
	})
}

func (d Disk) configure(root string) error {
	fstab := "LABEL=root / ext4 defaults 0 1\nLABEL=ESP /boot/efi vfat umask=0077 0 1\nLABEL=swap none swap sw 0 0\n"
	for name, content := range map[string]string{"etc/fstab": fstab, "etc/hostname": "demo\n"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(root, "boot/efi"), 0o755)
}

func (d Disk) makeSwap(ctx context.Context) error {
	dev, detach, err := Attach(ctx, d.Swap)
	if err != nil {
		return err
	}
	_, err = command.Run(ctx, "mkswap", "-L", "swap", dev)
	return errors.Join(err, detach())
}

// DefaultCache is holdfast-test in the user's cache folder.
func DefaultCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "holdfast-test")
}

// debianTarball returns a minimal Debian tree of the host's release, made by
// debootstrap from the mirror that the host's apt uses, with further packages.
func debianTarball(ctx context.Context, cache string, packages ...string) (string, error) {
	m, err := findMirror("/etc")
	if err != nil {
		return "", err
	}
	kind := "minbase"
	if len(packages) > 0 {
		kind = "boot"
	}
	tarball := filepath.Join(cache, fmt.Sprintf("%s-%s-%s.tar", m.suite, kind, runtime.GOARCH))
	if _, err := os.Stat(tarball); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return tarball, err
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	// A mirror may stop to answer in the middle, which debootstrap waits for without end.
	for try := 0; ; try++ {
		if err = tryTarball(ctx, m, cache, tarball, packages); err == nil || try == 2 || ctx.Err() != nil {
			return tarball, err
		}
	}
}

// mirrorLimit is how long debootstrap may take; it takes a minute or two.
const mirrorLimit = 8 * time.Minute

func tryTarball(ctx context.Context, m mirror, cache, tarball string, packages []string) error {
	ctx, cancel := context.WithTimeout(ctx, mirrorLimit)
	defer cancel()
	work, err := os.MkdirTemp(cache, "debootstrap-")
	if err != nil {
		return err
	}
	err = makeTarball(ctx, m, work, tarball, packages)
	// debootstrap mounts /proc in its tree, and when stopped leaves it there.
	return errors.Join(err, Clean(work))
}

func makeTarball(ctx context.Context, m mirror, work, tarball string, packages []string) error {
	tree, tmp := filepath.Join(work, "tree"), filepath.Join(work, "tree.tar")
	args := []string{"debootstrap", "--variant=minbase"}
	if m.keyring != "" {
		args = append(args, "--keyring="+m.keyring)
	}
	if len(packages) > 0 {
		args = append(args, "--include="+strings.Join(packages, ","))
	}
	if _, err := command.Run(ctx, append(args, m.suite, tree, m.uri)...); err != nil {
		return err
	}
	// Packages and lists that apt has already used are no part of a system.
	for _, pattern := range []string{"var/cache/apt/archives/*.deb", "var/lib/apt/lists/*_*"} {
		files, err := filepath.Glob(filepath.Join(tree, pattern))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := os.Remove(f); err != nil {
				return err
			}
		}
	}
	if _, err := command.Run(ctx, "tar", "-C", tree, "--one-file-system", "--numeric-owner", "-cf", tmp, "."); err != nil {
		return err
	}
	return os.Rename(tmp, tarball)
}

// ChangeDemo changes the root partition as a day's work would: files edited,
// deleted, added, and overwritten in place.
func ChangeDemo(ctx context.Context, d Disk) error {
	return InMount(ctx, d.Root, "ext4", d.Path+".mnt", func(root string) error {
		return changeDebian(root)
	})
}

func changeDebian(root string) error {
	if err := os.WriteFile(filepath.Join(root, "etc/hostname"), []byte("demo-after-change\n"), 0o644); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(root, "usr/share/doc/apt")); err != nil {
		return err
	}
	var log []byte
	for i := range 20_000 {
		log = append(log, "2026-11-21T06:30:00 demo app: line "+strconv.Itoa(i)+"\n"...)
	}
	if err := os.WriteFile(filepath.Join(root, "var/log/app.log"), log, 0o640); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "root/new.bin"), randomBytes(seeded(4), 8*mib), 0o600); err != nil {
		return err
	}
	libs, err := filepath.Glob(filepath.Join(root, "usr/lib/*-linux-gnu/libc.so.6"))
	if err != nil || len(libs) == 0 {
		return errors.Join(errors.New("no C library in the image"), err)
	}
	return overwriteBlocks(libs[0], seeded(5))
}
