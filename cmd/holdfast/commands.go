package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// commands is the command table: the one place that says which commands there
// are, what they take and what runs them. Flags and argument counts are a stable
// contract.
func commands() []command {
	files := words{files: true}
	all := []command{
		{
			name: "init", usage: "REPO [--chunk-size 128K] [--no-encryption]",
			short: "make a repository",
			long:  "REPO is a directory that does not exist yet, or an empty one.",
			min:   1, max: 1, completes: files,
			flags: []cli.Flag{
				&cli.StringFlag{Name: "chunk-size", Value: "128K",
					Usage: "`SIZE` of a chunk, a power of two from 64K to 4M; for good"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "no-encryption", Usage: "store everything in the clear; for good"},
			},
			needs: needConfig,
			check: func(c *call) error { _, err := chunkSize(c.String("chunk-size")); return err },
			run:   runInit,
		},
		{
			name: "backup", usage: "DISK... [--vm NAME] [--tag T]... [--attach FILE]... [--full] [--exclude WHAT] [--lock-for DURATION] [--allow-outside-backing] [--token-file FILE] | --source NAME VM... [--vms-at-once N]",
			short: "back up disk image files, or VMs of a platform",
			long: "With --source the VMs of a platform that the config names: by name, path or id as 'vms' shows them, by pattern ('web*'), by\n" +
				"folder:/DC/vm/FOLDER, pool:NAME or tag:TAG. One that fails does not stop the others.\n" +
				"Without it the arguments are image files. With --vm the files are the disks of one VM; without it each is a VM, named after its file.\n" +
				"Files are raw, qcow2, VMDK, VHD or VHDX, told by their first bytes (a VHD by its last); one that ends in .raw\n" +
				"or -flat.vmdk is raw. Of a VMDK in several files give the descriptor; it is read with its extents and parents.\n" +
				"With -r tls://HOST:PORT the point is added to a repository on another host, by its 'holdfast serve'. The token\n" +
				"for it comes from --token-file, HOLDFAST_TOKEN_FILE, HOLDFAST_TOKEN or a prompt; no password is needed.\n" +
				"--exclude says what of the guest is stored as holes: swap (swap areas and files, pagefile.sys, hiberfil.sys), free\n" +
				"(blocks that its file systems do not use), swap,free or none. Only what is certain is left out; 'show' lists it.",
			min: 1, max: -1, completes: files,
			flags: []cli.Flag{
				&cli.StringFlag{Name: "source", Usage: "`NAME` of the platform in the config"},
				&cli.IntFlag{Name: "vms-at-once", DefaultText: "4", Usage: "back up so `MANY` VMs of the platform at once"},
				&cli.StringFlag{Name: "vm", Usage: "`NAME` of the VM that the disks belong to"},
				&cli.StringSliceFlag{Name: "tag", Usage: "`TEXT` to keep with the restore point; may be repeated"},
				&cli.StringFlag{Name: "exclude", Usage: "`WHAT` of the guest to leave out: swap, free, swap,free or none; swap unless the config says other"},
				&cli.StringFlag{Name: "lock-for", Usage: "let nobody forget the point for this `DURATION`, such as 30d, 36h, 1y6m; cannot be taken back"},
				&cli.StringSliceFlag{Name: "attach", TakesFile: true, Usage: "`FILE` about the VM to keep with its configuration, such as its .vmx or NVRAM; may be repeated"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "full", Usage: "read everything, whatever the last restore point says"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "allow-outside-backing",
					Usage: "follow names of backing files, parents and extents that are absolute or lead out of the image's directory"},
				&cli.StringFlag{Name: "token-file", EnvVars: []string{"HOLDFAST_TOKEN_FILE"}, TakesFile: true,
					Usage: "`FILE` with the token for a server"},
			},
			needs: needRepository, away: true, check: checkBackup, run: runBackup,
		},
		{
			name: "vms", usage: "--source NAME [VM...]",
			short: "list the VMs of a platform",
			long:  "The config names the platform below sources:. VM is a name, a pattern, folder:PATH, pool:NAME or tag:TAG, as for 'backup'.",
			max:   -1,
			flags: []cli.Flag{&cli.StringFlag{Name: "source", Usage: "`NAME` of the platform in the config"}},
			needs: needConfig,
			check: func(c *call) error {
				if c.String("source") == "" {
					return usagef("vms: name the platform with --source")
				}
				return nil
			},
			run: runVMs,
		},
		{
			name: "points", usage: "[VM]", short: "list restore points",
			max: 1, needs: needRepository, run: runPoints,
		},
		{
			name: "show", usage: "POINT [--proof DIR]", short: "show all about one restore point",
			long: pointHelp,
			min:  1, max: 1,
			flags: []cli.Flag{
				&cli.StringFlag{Name: "proof", TakesFile: true, Usage: "write what 'verify --boot' saw, screen and serial line, to files in `DIR`"},
			},
			needs: needRepository, run: runShow,
		},
		{
			name: "ls", usage: "[PATH] [-l]", short: "list what restore points hold",
			long: "PATH is VM/POINT/..., as a mount shows it; without it, the VMs. Below VM/POINT/files/ is what the file systems of\n" +
				"the guest hold, by disk and partition, and as the guest itself sees it. A link there is followed when PATH ends with a /.\n" +
				"A name with bytes that cannot be printed is shown as $'...', which a shell takes.",
			max: 1,
			flags: []cli.Flag{
				&cli.BoolFlag{DisableDefaultText: true, Name: "long", Aliases: []string{"l"}, Usage: "sizes and times, too; of a guest's files modes and owners"},
				guestKeyFlag(),
			},
			needs: needRepository, run: runLs,
		},
		{
			name: "cp", usage: "PATH... DEST | PATH... - (--tar | --zip)", short: "copy files out of restore points",
			long: "PATH is VM/POINT/..., as ls shows it; DEST is a file or a directory. Nothing that is there is overwritten.\n" +
				"What is below VM/POINT/files/ is copied with its owners, modes, times, links, holes, attributes and ACLs; as root,\n" +
				"or what takes root is left out and said. A file is there when it is complete, and the same command again goes on\n" +
				"where one was stopped. Directories that are there get the guest's owners and modes. What is damaged is left out (exit\n" +
				"code 4). Streams of files of Windows are copied when named, as FILE:STREAM. With a POINT, files/ is left out: its disks\n" +
				"hold it.\n" +
				"With - an archive is written to standard output. A tar has all that a copy has, but holes are zeros in it; a zip has no\n" +
				"attributes, devices or hard links.",
			min: 2, max: -1, completes: files,
			flags: []cli.Flag{
				&cli.BoolFlag{DisableDefaultText: true, Name: "tar", Usage: "write a tar to standard output; DEST is -"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "zip", Usage: "write a zip to standard output; DEST is -"},
				guestKeyFlag(),
			},
			needs: needRepository, check: checkCp, run: runCp,
		},
		{
			name:  "restore",
			usage: "POINT (--to DIR [--format raw|qcow2|vmdk|vmdk-stream|vhdx|vhd] [--disk disk0] | --onto FILE --disk disk0 | --to SOURCE: [--name NEW] [--datastore D] [--network N] | --to SOURCE: --in-place)",
			short: "write the disks of a restore point, or make a VM of it",
			long: pointHelp + "\nSOURCE: is a platform that the config names; a new VM is made there, switched off and not connected unless told otherwise. With\n" +
				"--in-place the VM that the point is of gets its disks back; it must be off and without snapshots.\n" +
				"Format vmdk-stream is a compressed VMDK (streamOptimized) for transport; vhd is dynamic, of at most 2040 GiB.",
			min: 1, max: 1,
			flags: append([]cli.Flag{
				&cli.StringFlag{Name: "to", TakesFile: true, Usage: "`DIR` for one new file per disk, or SOURCE: for a VM on a platform"},
				&cli.StringFlag{Name: "onto", TakesFile: true, Usage: "`FILE` or device to write onto, only where it differs"},
				newChoiceFlag("format", "`FORMAT` of the new files", "raw", "qcow2", "vmdk", formatStream, "vhdx", "vhd"),
				&cli.StringFlag{Name: "disk", Usage: "only this `DISK` of the point, such as disk0"},
			}, platformFlags()...),
			needs: needRepository, check: checkRestore, run: runRestore,
		},
		{
			name: "copy", usage: "[POINT|VM]... --to REPO [--to-password-file FILE]",
			short: "copy restore points to another repository",
			long: "Without POINT or VM, all of them. REPO is a repository, of any chunk size and password; only what it\n" +
				"lacks is sent. Points that it has are left out, so the same command again goes on where one was stopped.\n" +
				"A lock is copied, too. Its password comes from --to-password-file, HOLDFAST_TO_PASSWORD_FILE,\n" +
				"HOLDFAST_TO_PASSWORD or a prompt.\n" + pointHelp,
			max: -1,
			flags: []cli.Flag{
				&cli.StringFlag{Name: "to", TakesFile: true, Usage: "`REPO` that the points are copied to"},
				&cli.StringFlag{Name: "to-password-file", EnvVars: []string{"HOLDFAST_TO_PASSWORD_FILE"}, TakesFile: true,
					Usage: "`FILE` with its password"},
			},
			needs: needRepository, check: checkCopy, run: runCopy,
		},
		{
			name: "mount", usage: "DIR [--allow-other] [--background]",
			short: "show all restore points as files",
			long:  "It runs until umount, SIGINT or SIGTERM.",
			min:   1, max: 1, completes: files,
			flags: []cli.Flag{
				&cli.BoolFlag{DisableDefaultText: true, Name: "allow-other", Usage: "let other users read the mount"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "background", Usage: "return as soon as the mount can be used"},
				guestKeyFlag(),
			},
			needs: needRepository, run: runMount,
		},
		{
			name: "umount", usage: "DIR", short: "end a mount",
			min: 1, max: 1, completes: files, run: runUmount,
		},
		{
			name: "export", usage: "POINT [--nbd ADDRESS] [--nfs ADDRESS [--allow NETWORK]...] [--disk disk0] [--writable [--overlay DIR]] [--tls-cert FILE --tls-key FILE [--tls-ca FILE]]",
			short: "serve the disks of a restore point by NBD or NFS",
			long:  exportHelp,
			min:   1, max: 1,
			flags: exportFlags(),
			needs: needRepository, check: checkExport, run: runExport,
		},
		{
			name:  "boot",
			usage: "POINT --on qemu [--background] | ls | stop NAME [--keep] | resume NAME | commit NAME | migrate NAME --to FILE",
			short: "run the VM of a restore point",
			long:  bootHelp,
			min:   1, max: 2, completes: words{list: bootActions()},
			flags: bootFlags(),
			needs: needConfig, check: checkBoot, run: runBoot,
		},
		{
			name: "verify", usage: "[POINT...] [--read-data [--resume] | --read-data-subset 5%] [--limit-rate 50M] | POINT... --boot [--sign SIGN]",
			short: "look for damage",
			long:  verifyHelp,
			max:   -1,
			flags: verifyFlags(),
			needs: needRepository, check: checkVerify, run: runVerify,
		},
		{
			name: "forget",
			usage: "(POINT... [--force] | [VM...] [--keep-last N] [--keep-hourly N] [--keep-daily N] [--keep-weekly N] " +
				"[--keep-monthly N] [--keep-yearly N] [--keep-within DURATION] [--keep-tag T]... [--tag T]...) [--dry-run]",
			short: "drop restore points, by rules or by name",
			long:  forgetHelp,
			max:   -1, flags: forgetFlags(),
			needs: needRepository, check: checkForget, run: runForget,
		},
		{
			name: "gc", usage: "[--dry-run] [--repack-below 50%] [--ignore-missing]",
			short: "give back the space of forgotten restore points",
			long: "Runs beside backups, mounts and restores. What a backup at work may still need is kept, and\n" +
				"removed by the next gc.",
			flags: []cli.Flag{
				&cli.BoolFlag{DisableDefaultText: true, Name: "dry-run", Usage: "only say what would be done"},
				&cli.StringFlag{Name: "repack-below", Value: "50%", Usage: "rewrite packs of which less than `PERCENT` is in use"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "ignore-missing", Usage: "go on though restore points lack chunks"},
			},
			needs: needRepository, run: runGC,
			check: func(c *call) error { _, err := share(c.String("repack-below")); return err },
		},
		{
			name: "repair", usage: "index | packs [--dry-run] [--drop-unreadable] | --from REPO [--from-password-file FILE]",
			short: "make the index anew, save what damaged packs hold, or heal from a copy",
			long:  repairHelp,
			max:   1, completes: words{list: repairActions()},
			flags: repairFlags(),
			needs: needRepository, check: checkRepair, run: runRepair,
		},
		{
			name: "doctor", usage: "[--source NAME] [--clean]",
			short: "check whether platforms can be backed up",
			long: "It looks at the platforms of the config, or at one: connection, account and its privileges, datastores, VMs and disks\n" +
				"that backups leave out, and snapshots that an interrupted run left. It changes nothing, but with --clean.",
			flags: []cli.Flag{
				&cli.StringFlag{Name: "source", Usage: "`NAME` of the platform in the config"},
				&cli.BoolFlag{DisableDefaultText: true, Name: "clean", Usage: "remove the snapshots that interrupted runs of this host left"},
			},
			needs: needConfig, run: runDoctor,
		},
		{
			name: "stats", usage: "[VM] [--quick] [--by auto|day|week|month|year] [--metrics FILE]",
			short: "show what the repository holds and saves, and for whom",
			long: "UNIQUE is what forgetting a VM, or with VM one of its points, would free: what nobody else uses. To find\n" +
				"that, every page of every chunk map is read once. GROWTH is what the points that there are have added.",
			max: 1,
			flags: []cli.Flag{
				&cli.BoolFlag{DisableDefaultText: true, Name: "quick", Usage: "only what is known without reading chunk maps: neither unique nor ratios"},
				newChoiceFlag("by", "`PERIOD` that growth is counted by", "auto", "day", "week", "month", "year"),
				&cli.StringFlag{Name: "metrics", TakesFile: true, Usage: "write the figures to `FILE`, too, in Prometheus' text format"},
			},
			needs: needRepository, run: runStats,
			check: func(c *call) error {
				if c.Bool("quick") && len(c.args) > 0 {
					return usagef("stats: --quick says nothing of single points, so it takes no VM")
				}
				return nil
			},
		},
		{
			name: "key", usage: "list|add|remove ID|change|recovery [--label TEXT] [--new-password-file FILE]",
			short: "list and change the passwords that open the repository",
			long: "add      one more password; all of them open the repository\n" +
				"change   put a new password in the place of the one given\n" +
				"remove   end a password, other than the one given, or a recovery key\n" +
				"recovery print a random key that opens the repository when its password is lost, once\n" +
				"The new password comes from --new-password-file, HOLDFAST_NEW_PASSWORD or a prompt.",
			min: 1, max: -1, completes: words{list: keyActions()},
			flags: []cli.Flag{
				&cli.StringFlag{Name: "new-password-file", EnvVars: []string{"HOLDFAST_NEW_PASSWORD_FILE"}, TakesFile: true,
					Usage: "`FILE` with the password to add or change to"},
				&cli.StringFlag{Name: "label", Usage: "`TEXT` to tell the key from others"},
			},
			needs: needRepository, check: checkKey, run: runKey,
		},
		{
			name: "serve", usage: "--listen HOST:PORT",
			short: "let helpers on other hosts add restore points",
			long: "It runs until SIGINT or SIGTERM, beside all other commands. Helpers need a token: see agent-token.\n" +
				"They use it by: holdfast -r tls://HOST:PORT backup DISK... --token-file FILE",
			flags: []cli.Flag{
				&cli.StringFlag{Name: "listen", Usage: "`ADDRESS` to listen on, HOST:PORT or :PORT"},
			},
			needs: needRepository, check: checkServe, run: runServe,
		},
		{
			name: "agent-token", usage: "list|add|remove ID [--label TEXT] [--vm PATTERN]... [--expires DURATION]",
			short: "list and change the tokens with which helpers on other hosts add points",
			long: "add      print a token, once: with it a helper adds restore points, and can do nothing else\n" +
				"remove   end a token; a backup that uses it fails\n" +
				"PATTERN names VMs as a shell names files: web, db*. Without any, the helper may add to VMs that nobody else has\n" +
				"backed up. To give a helper another token, name its VMs: they have points of the old one.",
			min: 1, max: -1, completes: words{list: tokenActions()},
			flags: []cli.Flag{
				&cli.StringFlag{Name: "label", Usage: "`TEXT` to tell the token from others"},
				&cli.StringSliceFlag{Name: "vm", Usage: "`PATTERN` for the VMs that it may add to; may be repeated"},
				&cli.StringFlag{Name: "expires", Usage: "end it after this `DURATION`, such as 90d"},
			},
			needs: needRepository, check: checkToken, run: runToken,
		},
		{
			name: "completion", usage: "bash|zsh|fish", short: "write completion for a shell",
			long: "For example: source <(holdfast completion bash)",
			min:  1, max: 1, completes: words{list: shells()}, run: runCompletion,
		},
		{name: "version", short: "show the version", run: runVersion},
		{name: "help", usage: "[COMMAND]", short: "show help", max: 1, run: runHelp},
	}
	var names []string
	for _, c := range all {
		names = append(names, c.name)
	}
	all[len(all)-1].completes = words{list: names}
	return all
}

const pointHelp = "POINT is VM/TIME, VM/latest, VM/2026-11-20 (the last one that day), or an id of at least 6 digits."

// words is what a shell offers while a value is typed.
type words struct {
	files bool
	list  []string
}

// choiceFlag is a flag that takes one of a few words.
type choiceFlag struct {
	*cli.StringFlag
	choices []string // the first is the default
}

// newChoiceFlag makes a flag whose default is the first of choices.
func newChoiceFlag(name, usage string, choices ...string) *choiceFlag {
	return &choiceFlag{choices: choices, StringFlag: &cli.StringFlag{
		Name: name, Value: choices[0],
		Usage: usage + ": " + strings.Join(choices, ", "),
		Action: func(_ *cli.Context, value string) error {
			if slices.Contains(choices, value) {
				return nil
			}
			return withHint(usagef("--%s: unknown value %q", name, value), "choose one of %s", strings.Join(choices, ", "))
		},
	}}
}

// checkRestore refuses flags that contradict each other.
func checkRestore(c *call) error {
	to, onto := c.String("to") != "", c.String("onto") != ""
	switch {
	case to && onto:
		return usagef("restore: --to and --onto exclude each other")
	case !to && !onto:
		return usagef("restore: where to? --to or --onto is missing")
	case onto && c.String("disk") == "":
		return usagef("restore: --onto needs --disk")
	case onto && c.IsSet("format"):
		return usagef("restore: --onto writes raw bytes and takes no --format")
	}
	if _, platform := c.platformOf(c.String("to")); platform {
		return c.checkPlatform()
	}
	for _, f := range platformFlags() {
		if flag := f.Names()[0]; c.IsSet(flag) {
			return usagef("restore: --%s is about a VM on a platform: --to SOURCE:", flag)
		}
	}
	return nil
}
