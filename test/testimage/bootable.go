//go:build linux

package testimage

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast-backup/holdfast/test/command"
)

// BootableSize is room for Debian with a kernel. bytes
const BootableSize = 2 << 30

// Prompt is what the shell on the first serial line of a bootable disk shows when it is ready: root is
// logged in there.
const Prompt = "holdfast-test# "

// bootPackages make a system that boots out of Debian's base: an init, and a kernel with drivers for
// the disks of virtual machines (AHCI is not among them).
var bootPackages = []string{"systemd-sysv", "udev", "linux-image-cloud-amd64", "initramfs-tools", "dbus", "qemu-guest-agent"}

// MakeBootable builds the demonstration disk with a kernel and two boot loaders, so that it boots by
// BIOS and by UEFI. Needs root, GRUB's images for both (grub-pc-bin, grub-efi-amd64-bin) and mtools.
func MakeBootable(ctx context.Context, path, cache string) (Disk, error) {
	d := demoDisk(path, BootableSize)
	tarball, err := debianTarball(ctx, cache, bootPackages...)
	if err != nil {
		return d, fmt.Errorf("debian: %w", err)
	}
	if err := emptyFile(path, d.Size); err != nil {
		return d, err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"partition table", func() error { return d.partition(ctx) }},
		{"root partition", func() error { return d.fillRoot(ctx, tarball) }},
		{"swap partition", func() error { return d.makeSwap(ctx) }},
		{"settings", func() error { return d.makeBoot(ctx) }},
		{"BIOS boot loader", func() error { return d.bootByBIOS(ctx) }},
		{"UEFI boot loader", func() error { return d.bootByUEFI(ctx) }},
	} {
		if err := step.do(); err != nil {
			return d, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return d, syncFile(path)
}

const grubConfig = `serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
linux /vmlinuz root=LABEL=root ro console=ttyS0 quiet net.ifnames=0
initrd /initrd.img
boot
`

const gettyConfig = `[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200 %I vt220
`

// makeBoot writes what the system needs to boot to a shell on its serial line.
func (d Disk) makeBoot(ctx context.Context) error {
	return InMount(ctx, d.Root, "ext4", d.Path+".mnt", func(root string) error {
		for name, content := range map[string]string{
			"etc/fstab":          "LABEL=root / ext4 defaults 0 1\n",
			"etc/machine-id":     "0123456789abcdef0123456789abcdef\n",
			"etc/profile.d/z.sh": "PS1='" + Prompt + "'\n",
			"root/.bashrc":       "PS1='" + Prompt + "'\nbind 'set enable-bracketed-paste off' 2>/dev/null\n",
			"etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf": gettyConfig,
			"boot/grub/grub.cfg": grubConfig,
		} {
			file := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

// earlyConfig is built into both boot loaders.
const earlyConfig = "search.fs_label root root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"

// grubImage makes a core image of GRUB with modules built in.
func (d Disk) grubImage(ctx context.Context, target, out string, modules ...string) error {
	early := d.Path + ".early"
	if err := os.WriteFile(early, []byte(earlyConfig), 0o600); err != nil {
		return err
	}
	defer os.Remove(early)
	args := []string{"grub-mkimage", "-O", target, "-o", out, "-p", "/boot/grub", "-c", early,
		"part_gpt", "ext2", "normal", "configfile", "linux", "search", "search_label", "serial", "terminal", "boot", "echo"}
	_, err := command.Run(ctx, append(args, modules...)...)
	return err
}

// bootByBIOS writes GRUB's boot sector and, into the BIOS boot partition, its core image. GRUB's own
// installer wants a mounted disk; what it would write is told by the sources of its two boot
// sectors: where the sector after each lies.
func (d Disk) bootByBIOS(ctx context.Context) error {
	core := d.Path + ".core"
	defer os.Remove(core)
	if err := d.grubImage(ctx, "i386-pc", core, "biosdisk"); err != nil {
		return err
	}
	image, err := os.ReadFile(core)
	if err != nil {
		return err
	}
	sector, err := os.ReadFile("/usr/lib/grub/i386-pc/boot.img")
	if err != nil {
		return err
	}
	const at = mib / 512 // of the BIOS boot partition
	if len(image) > demoBIOS || len(sector) < 440 {
		return fmt.Errorf("GRUB's core image has %d bytes", len(image))
	}
	binary.LittleEndian.PutUint64(sector[0x5c:], at)
	binary.LittleEndian.PutUint64(image[0x1f4:], at+1)
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(image, at*512); err != nil {
		return err
	}
	if _, err := f.WriteAt(sector[:440], 0); err != nil { // the rest is the partition table
		return err
	}
	return f.Close()
}

// bootByUEFI puts GRUB where firmware looks by itself.
func (d Disk) bootByUEFI(ctx context.Context) error {
	efi, esp := d.Path+".efi", d.Path+".esp"
	defer os.Remove(efi)
	defer os.Remove(esp)
	if err := d.grubImage(ctx, "x86_64-efi", efi, "fat"); err != nil {
		return err
	}
	if err := emptyFile(esp, d.ESP.Len); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"mkfs.vfat", "-F", "32", "-n", "ESP", esp},
		{"mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"},
		{"mcopy", "-i", esp, efi, "::/EFI/BOOT/BOOTX64.EFI"},
	} {
		if _, err := command.Run(ctx, args...); err != nil {
			return err
		}
	}
	return writeInto(d.Path, d.ESP.Off, esp)
}
