//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/test/command"
)

// packageOf is what the demo calls: program => Debian package that has it.
var packageOf = map[string]string{
	"cmp":         "diffutils",
	"debootstrap": "debootstrap",
	"e2fsck":      "e2fsprogs",
	"fusermount3": "fuse3",
	"losetup":     "mount",
	"mcopy":       "mtools",
	"mkfs.ext4":   "e2fsprogs",
	"mkfs.vfat":   "dosfstools",
	"mkswap":      "util-linux",
	"qemu-img":    "qemu-utils",
	"sgdisk":      "gdisk",
	"tar":         "tar",
}

// missingPackages are those whose programs cannot be found.
func missingPackages() []string {
	// The folders of administrators are not in everyone's PATH.
	_ = os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	found := map[string]bool{}
	for program, pkg := range packageOf {
		if _, err := exec.LookPath(program); err != nil {
			found[pkg] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// missing says which packages to install, or nil.
func missing() error {
	if pkgs := missingPackages(); len(pkgs) > 0 {
		return fmt.Errorf("missing packages: %s", strings.Join(pkgs, " "))
	}
	return nil
}

func (d *demo) install(ctx context.Context) (string, error) {
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return "", fmt.Errorf("no FUSE on this machine: %w", err)
	}
	pkgs := missingPackages()
	if len(pkgs) == 0 {
		return "nothing", nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", missing()
	}
	install := command.Command{
		Args: append([]string{"apt-get", "install", "--yes", "--quiet", "--no-install-recommends"}, pkgs...),
		Env:  []string{"DEBIAN_FRONTEND=noninteractive"},
	}
	_, err := install.Run(ctx)
	if err != nil {
		if _, e := command.Run(ctx, "apt-get", "update", "--quiet"); e != nil {
			return "", errors.Join(err, e)
		}
		_, err = install.Run(ctx)
	}
	return strings.Join(pkgs, " "), err
}
