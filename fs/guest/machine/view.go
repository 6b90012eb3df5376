package machine

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Place is an inode of a volume.
type Place struct {
	Vol *Volume
	Ino guest.Ino
}

// View is a tree as the guest itself sees it: one file system at the root and others mounted below it. That of a Windows has a
// made-up root, of a volume that is not among the machine's, with a directory for each drive letter.
type View struct {
	Name     string // root, and root-2 … for further systems on the same disks
	Root     Place
	Mounts   map[Place]Place // directory => the root of what is mounted there
	Swap     []string        // paths of the files that the system swaps to, without the leading slash
	Warnings []string        // what of the guest's table could not be followed
}

// At gives what is mounted at p, or p.
func (v *View) At(p Place) Place {
	for range len(v.Mounts) + 1 {
		over, ok := v.Mounts[p]
		if !ok {
			break
		}
		p = over
	}
	return p
}

// Views gives the trees of the systems on the disks; none where no guest says how they belong together.
func (m *Machine) Views() []*View { return m.views() }

// Directories of a Btrfs that distributions put the root of the system in, besides the default subvolume.
var subvolumes = []string{"", "@", "root", "@rootfs", "@/.snapshots/1/snapshot"}

func (m *Machine) findViews() []*View {
	var views []*View
	seen := map[string]bool{} // Btrfs that have been looked at: each is on all its volumes
	for _, vol := range m.Volumes {
		if !vol.HasReader() {
			continue
		}
		f, err := vol.FS()
		if err != nil || seen[f.Info().UUID] {
			continue
		}
		if vol.Signature == "btrfs" {
			seen[f.Info().UUID] = true
		}
		v, err := m.view(vol, f)
		if err != nil {
			m.Warnings = append(m.Warnings, fmt.Sprintf("%s: whether a system is on it: %v", vol.Name, err))
		}
		if v == nil {
			continue
		}
		v.Name = "root"
		if len(views) > 0 {
			v.Name = fmt.Sprint("root-", len(views)+1)
		}
		views = append(views, v)
	}
	return views
}

// view makes the view of the system that is on a volume; nil when there is none.
func (m *Machine) view(vol *Volume, f guest.FS) (v *View, err error) {
	defer caught(&err)
	switch {
	case vol.Signature == "ntfs":
		return m.windows(vol, f)
	case isUnix(vol.Signature):
		return m.unix(vol, f)
	}
	return nil, nil
}

// unix makes the view of the system whose root is on a volume; nil when there is none.
func (m *Machine) unix(vol *Volume, f guest.FS) (*View, error) {
	for _, sub := range subvolumes {
		root, err := resolve(f, f.Root(), sub)
		if isAbsent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		v := &View{Root: Place{vol, root}, Mounts: map[Place]Place{}}
		table, err := v.readSmall("etc/fstab")
		if err == nil {
			v.Swap = swapFiles(string(table))
			m.mount(v, string(table))
			return v, nil
		}
		if !isAbsent(err) {
			return nil, err
		}
		if vol.Signature != "btrfs" {
			break
		}
	}
	return nil, nil
}

func isAbsent(err error) bool {
	return errors.Is(err, guest.ErrNotExist) || errors.Is(err, guest.ErrNotDir)
}

// isUnix reports whether a system that has a fstab may have its root there.
func isUnix(signature string) bool {
	return strings.HasPrefix(signature, "ext") || signature == "xfs" || signature == "btrfs"
}

// A mount is a line of fstab(5).
type mount struct {
	device, dir string
	options     []string
}

// mounts are the lines that mount a local file system below the root, outer ones first.
func mounts(table string) []mount {
	var list []mount
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 3 || strings.HasPrefix(f[0], "#") {
			continue
		}
		m := mount{device: unescape(f[0]), dir: strings.Trim(unescape(f[1]), "/")}
		if len(f) > 3 {
			m.options = strings.Split(f[3], ",")
		}
		bind := slices.Contains(m.options, "bind") || slices.Contains(m.options, "rbind")
		if m.dir == "" || !strings.HasPrefix(f[1], "/") || f[2] == "swap" || bind {
			continue
		}
		list = append(list, m)
	}
	slices.SortStableFunc(list, func(a, b mount) int { return strings.Count(a.dir, "/") - strings.Count(b.dir, "/") })
	return list
}

// swapFiles are the paths of files that fstab(5) swaps to.
func swapFiles(table string) []string {
	var list []string
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) > 2 && f[2] == "swap" && strings.HasPrefix(f[0], "/") && !strings.HasPrefix(f[0], "/dev/") {
			list = append(list, strings.Trim(unescape(f[0]), "/"))
		}
	}
	return list
}

// unescape undoes fstab(5)'s \040 for a space, and quotes around a value.
func unescape(s string) string {
	s = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
	return strings.ReplaceAll(s, `"`, "")
}

// mount follows the table as far as it names volumes that are there.
func (m *Machine) mount(v *View, table string) {
	for _, line := range mounts(table) {
		vol := m.named(line.device)
		if vol == nil {
			if strings.Contains(line.device, "=") || strings.HasPrefix(line.device, "/dev/") {
				v.Warnings = append(v.Warnings, fmt.Sprintf("/%s: %s is not among the volumes", line.dir, line.device))
			}
			continue
		}
		if err := v.add(vol, line); err != nil {
			v.Warnings = append(v.Warnings, fmt.Sprintf("/%s: %v", line.dir, err))
		}
	}
}

func (v *View) add(vol *Volume, line mount) error {
	f, err := vol.FS()
	if err != nil {
		return err
	}
	root, err := f.(guarded).Default()
	if err != nil {
		return err
	}
	for _, o := range line.options {
		if sub, ok := strings.CutPrefix(o, "subvol="); ok {
			if root, err = resolve(f, f.Root(), sub); err != nil {
				return fmt.Errorf("%s: subvolume %s: %w", vol.Name, sub, err)
			}
		}
	}
	at, err := v.Walk(line.dir)
	if err != nil {
		return err
	}
	v.Mounts[at] = Place{vol, root}
	return nil
}

// maxLinks is how many symbolic links a path may lead through, as in path_resolution(7).
const maxLinks = 40

// Walk finds a path from the root of the view, following symbolic links within it.
func (v *View) Walk(path string) (Place, error) {
	return walk(v.At(v.Root), v.At, path)
}

// walk finds a path from root. at gives what is mounted somewhere. Links lead no further up than root.
func walk(root Place, at func(Place) Place, path string) (Place, error) {
	trail := []Place{root} // from the root to here
	rest := strings.Split(path, "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		here := trail[len(trail)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			trail = trail[:max(1, len(trail)-1)]
			continue
		}
		f, err := here.Vol.FS()
		if err != nil {
			return Place{}, err
		}
		ino, err := f.Lookup(here.Ino, name)
		if err != nil {
			return Place{}, err
		}
		next := Place{here.Vol, ino}
		if over := at(next); over != next {
			trail = append(trail, over)
			continue
		}
		st, err := f.Stat(ino)
		if err != nil {
			return Place{}, err
		}
		if st.Mode&guest.ModeType != guest.ModeLink {
			trail = append(trail, next)
			continue
		}
		if links++; links > maxLinks {
			return Place{}, errors.New("too many symbolic links")
		}
		target, err := f.Readlink(ino)
		if err != nil {
			return Place{}, err
		}
		if strings.HasPrefix(target, "/") {
			trail = trail[:1]
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return trail[len(trail)-1], nil
}

// resolve finds a path in one file system, from dir on, without following links.
func resolve(f guest.FS, dir guest.Ino, path string) (guest.Ino, error) {
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		var err error
		if dir, err = f.Lookup(dir, name); err != nil {
			return 0, err
		}
	}
	return dir, nil
}

// smallFile is the most that is read of a guest's table, bytes.
const smallFile = 1 << 20

func (v *View) readSmall(path string) ([]byte, error) {
	p, err := v.Walk(path)
	if err != nil {
		return nil, err
	}
	f, err := p.Vol.FS()
	if err != nil {
		return nil, err
	}
	file, err := f.Open(p.Ino)
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(file.Size(), smallFile))
	if n, err := file.ReadAt(b, 0); n < len(b) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

// named gives the volume that a device of fstab names, nil for none.
func (m *Machine) named(device string) *Volume {
	device = strings.NewReplacer("/dev/disk/by-uuid/", "UUID=", "/dev/disk/by-label/", "LABEL=", "/dev/disk/by-partuuid/", "PARTUUID=", "/dev/disk/by-partlabel/", "PARTLABEL=").Replace(device)
	if key, value, ok := strings.Cut(device, "="); ok {
		return m.tagged(key, value)
	}
	name, ok := strings.CutPrefix(device, "/dev/")
	if !ok {
		return nil
	}
	if mapped, ok := strings.CutPrefix(name, "mapper/"); ok {
		return m.Volume(mapped)
	}
	if vg, lv, ok := strings.Cut(name, "/"); ok {
		double := strings.NewReplacer("-", "--")
		return m.Volume(double.Replace(vg) + "-" + double.Replace(lv))
	}
	if v := m.Volume(name); v != nil { // md0
		return v
	}
	return m.Volume(kernelName(name))
}

// tagged finds a volume by what identifies its content.
func (m *Machine) tagged(key, value string) *Volume {
	for _, v := range m.Volumes {
		if key == "PARTUUID" && v.PartUUID != "" && strings.EqualFold(v.PartUUID, value) || key == "PARTLABEL" && v.PartLabel != "" && v.PartLabel == value {
			return v
		}
		f, err := v.FS()
		if err != nil {
			continue
		}
		info := f.Info()
		if key == "UUID" && info.UUID != "" && strings.EqualFold(info.UUID, value) || key == "LABEL" && info.Label != "" && info.Label == value {
			return v
		}
	}
	return nil
}

// kernelName turns the kernel's name of a partition (sda1, vdb2, nvme0n1p3) into ours (disk0/p1): disks in order.
func kernelName(name string) string {
	if rest, ok := strings.CutPrefix(name, "nvme"); ok {
		disk, part, _ := strings.Cut(rest, "n1")
		return diskName(disk, strings.TrimPrefix(part, "p"))
	}
	for _, prefix := range []string{"sd", "vd", "xvd", "hd"} {
		rest, ok := strings.CutPrefix(name, prefix)
		if ok && rest != "" && rest[0] >= 'a' && rest[0] <= 'z' {
			return diskName(strconv.Itoa(int(rest[0]-'a')), rest[1:])
		}
	}
	return ""
}

func diskName(disk, part string) string {
	if part == "" {
		return "disk" + disk
	}
	return "disk" + disk + "/p" + part
}
