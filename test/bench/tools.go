//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/holdfast-backup/holdfast/test/command"
)

// imageName is what the image is called in its folder, whatever it holds.
const imageName = "disk.img"

// tool is how to use one backup program. The functions return arguments after
// the program's name; they run in the folder of the image, restore in an empty
// folder. "archive" names the backup made last, for programs that want names.
type tool struct {
	name     string
	program  string
	version  []string
	env      func(home string) []string // home is an empty folder for caches and keys
	init     func(repo string) [][]string
	backup   func(repo, image, archive string) []string
	restore  func(repo, out, image, archive string) []string
	restored func(out, image string) string // where restore put the image
	mount    func(repo, mnt, image, archive string) []string
	mounted  func(mnt, image string) string // the image in the mount, as a glob pattern
}

// ask returns the first line of the program's version.
func (t tool) ask(ctx context.Context) (string, error) {
	out, err := command.Run(ctx, append([]string{t.program}, t.version...)...)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if line == "" {
		return "", fmt.Errorf("%s tells no version", t.name)
	}
	return line, nil
}

// allTools is every program that can be measured, cp as the baseline included.
func allTools(dir string) []tool {
	return []tool{
		holdfastTool(filepath.Join(dir, "holdfast")),
		resticTool(),
		borgTool("borg", "--compression", "zstd,3"),
		borgTool("borg-fixed", "--compression", "zstd,3", "--chunker-params", "fixed,1048576", "--sparse"),
		kopiaTool(),
		cpTool(),
	}
}

func holdfastTool(program string) tool {
	return tool{
		name: "holdfast", program: program, version: []string{"version"},
		env: func(home string) []string {
			return []string{"HOLDFAST_PASSWORD=" + password, "XDG_CONFIG_HOME=" + home, "XDG_CACHE_HOME=" + home}
		},
		init: func(repo string) [][]string { return [][]string{{"init", repo}} },
		backup: func(repo, image, _ string) []string {
			return []string{"backup", image, "--vm", "bench", "--repo", repo, "--no-progress", "--quiet"}
		},
		restore: func(repo, out, _, _ string) []string {
			return []string{"restore", "bench/latest", "--to", out, "--repo", repo, "--no-progress", "--quiet"}
		},
		restored: func(out, _ string) string { return filepath.Join(out, "disk0.raw") },
		mount:    func(repo, mnt, _, _ string) []string { return []string{"mount", mnt, "--repo", repo} },
		mounted:  func(mnt, _ string) string { return filepath.Join(mnt, "bench/latest/disk0.raw") },
	}
}

func resticTool() tool {
	var sparse []string // from restic 0.15 on
	if out, err := exec.Command("restic", "restore", "--help").Output(); err == nil && strings.Contains(string(out), "--sparse") {
		sparse = []string{"--sparse"}
	}
	return tool{
		name: "restic", program: "restic", version: []string{"version"},
		env: func(home string) []string {
			return []string{"RESTIC_PASSWORD=" + password, "RESTIC_CACHE_DIR=" + home}
		},
		init:   func(repo string) [][]string { return [][]string{{"-r", repo, "init"}} },
		backup: func(repo, image, _ string) []string { return []string{"-r", repo, "backup", "--quiet", image} },
		restore: func(repo, out, _, _ string) []string {
			return append([]string{"-r", repo, "restore", "latest", "--target", out}, sparse...)
		},
		restored: func(out, image string) string { return filepath.Join(out, image) },
		mount:    func(repo, mnt, _, _ string) []string { return []string{"-r", repo, "mount", mnt} },
		mounted:  func(mnt, image string) string { return filepath.Join(mnt, "snapshots/latest", image) },
	}
}

// borgTool stores the image under its bare name: borg restores into the working
// directory.
func borgTool(name string, create ...string) tool {
	return tool{
		name: name, program: "borg", version: []string{"--version"},
		env: func(home string) []string {
			return []string{"BORG_PASSPHRASE=" + password, "BORG_BASE_DIR=" + home}
		},
		init: func(repo string) [][]string { return [][]string{{"init", "--encryption", "repokey-blake2", repo}} },
		backup: func(repo, _, archive string) []string {
			return append(append([]string{"create"}, create...), repo+"::"+archive, imageName)
		},
		restore: func(repo, _, _, archive string) []string {
			return []string{"extract", "--sparse", repo + "::" + archive}
		},
		restored: func(out, _ string) string { return filepath.Join(out, imageName) },
		mount: func(repo, mnt, _, archive string) []string {
			return []string{"mount", "--foreground", repo + "::" + archive, mnt}
		},
		mounted: func(mnt, _ string) string { return filepath.Join(mnt, imageName) },
	}
}

// kopiaTool was written from kopia's manual and has not been run.
func kopiaTool() tool {
	return tool{
		name: "kopia", program: "kopia", version: []string{"--version"},
		env: func(home string) []string {
			return []string{
				"KOPIA_PASSWORD=" + password, "KOPIA_CHECK_FOR_UPDATES=false", "KOPIA_LOG_DIR=" + home,
				"KOPIA_CONFIG_PATH=" + filepath.Join(home, "repository.config"), "KOPIA_CACHE_DIRECTORY=" + filepath.Join(home, "cache"),
			}
		},
		init: func(repo string) [][]string {
			return [][]string{
				{"repository", "create", "filesystem", "--path", repo},
				{"policy", "set", "--global", "--compression=zstd-fastest"},
			}
		},
		backup: func(_, image, _ string) []string {
			return []string{"snapshot", "create", "--no-progress", filepath.Dir(image)}
		},
		restore: func(_, out, image, _ string) []string {
			return []string{"snapshot", "restore", "--no-progress", "--write-sparse-files", "--snapshot-time=latest", filepath.Dir(image), out}
		},
		restored: func(out, _ string) string { return filepath.Join(out, imageName) },
		mount:    func(_, mnt, _, _ string) []string { return []string{"mount", "all", mnt} },
		mounted:  func(mnt, _ string) string { return filepath.Join(mnt, "*/*/*", imageName) },
	}
}

// cpTool is the baseline of a restore: cp alone. It backs nothing up.
func cpTool() tool {
	return tool{
		name: "cp", program: "cp", version: []string{"--version"},
		env: func(string) []string { return nil },
		restore: func(_, out, image, _ string) []string {
			return []string{"--sparse=always", image, out}
		},
		restored: func(out, _ string) string { return filepath.Join(out, imageName) },
	}
}

// buildHoldfast puts the program to measure at path.
func buildHoldfast(ctx context.Context, path, given string) error {
	if given != "" {
		abs, err := filepath.Abs(given)
		return errors.Join(err, os.Symlink(abs, path))
	}
	_, err := command.Run(ctx, "go", "build", "-o", path, "github.com/holdfast-backup/holdfast/cmd/holdfast")
	return err
}
