package machine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/registry"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
)

// Where Windows keeps its hives, since NT 4.0; Windows 2000 is in WINNT.
var windowsConfig = []string{"Windows/System32/config", "WINNT/System32/config"}

// windows makes the view of the Windows that is on a volume; nil when there is none.
func (m *Machine) windows(vol *Volume, f guest.FS) (*View, error) {
	for _, path := range windowsConfig {
		config, err := resolveFold(f, f.Root(), path)
		if err == nil {
			_, err = resolveFold(f, config, "SYSTEM")
		}
		if isAbsent(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		v := &View{Mounts: map[Place]Place{}}
		devices, err := m.devices(v, f, config)
		if err != nil {
			v.Warnings = append(v.Warnings, fmt.Sprintf("which drive letters the volumes have is not known: %v", err))
		}
		m.drives(v, vol, f, devices)
		m.folders(v, devices)
		return v, nil
	}
	return nil, nil
}

// resolveFold is resolve without regard to case.
func resolveFold(f guest.FS, dir guest.Ino, path string) (guest.Ino, error) {
	for name := range strings.SplitSeq(path, "/") {
		ino, err := f.Lookup(dir, name)
		if errors.Is(err, guest.ErrNotExist) {
			ino, err = lookupFold(f, dir, name)
		}
		if err != nil {
			return 0, err
		}
		dir = ino
	}
	return dir, nil
}

func lookupFold(f guest.FS, dir guest.Ino, name string) (guest.Ino, error) {
	for e, err := range f.ReadDir(dir, 0) {
		if err != nil {
			return 0, err
		}
		if strings.EqualFold(e.Name, name) {
			return e.Ino, nil
		}
	}
	return 0, guest.ErrNotExist
}

// mountedDevices is what the key MountedDevices says of volumes.
type mountedDevices struct {
	letters map[byte]string   // 'C' => what identifies its volume: bytes
	guids   map[string]string // of a volume, in upper case => the same
}

// devices reads the key of the hive SYSTEM.
func (m *Machine) devices(v *View, f guest.FS, config guest.Ino) (d mountedDevices, err error) {
	d = mountedDevices{map[byte]string{}, map[string]string{}}
	var files []guest.Device
	for _, name := range []string{"SYSTEM", "SYSTEM.LOG1", "SYSTEM.LOG2", "SYSTEM.LOG"} {
		ino, err := resolveFold(f, config, name)
		var file guest.File
		if err == nil {
			file, err = f.Open(ino)
		}
		switch {
		case err == nil:
			files = append(files, file)
		case len(files) == 0:
			return d, err
		}
	}
	hive, err := registry.Open(files[0], files[1:]...)
	if err != nil {
		return d, err
	}
	v.Warnings = append(v.Warnings, hive.Warnings...)
	key, err := hive.Key("MountedDevices")
	if errors.Is(err, guest.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return d, err
	}
	return d, d.read(key)
}

// maxDevice is what identifies a volume, bytes.
const maxDevice = 4 << 10

func (d mountedDevices) read(key *registry.Key) error {
	for value, err := range key.Values() {
		if err != nil {
			return err
		}
		letter, drive := strings.CutPrefix(value.Name, `\DosDevices\`)
		id, folder := strings.CutPrefix(value.Name, `\??\Volume`)
		drive = drive && len(letter) == 2 && letter[0] >= 'A' && letter[0] <= 'Z' && letter[1] == ':'
		if value.Type != registry.Binary || value.Size() > maxDevice || !drive && !folder {
			continue
		}
		b, err := value.Bytes()
		if err != nil {
			return err
		}
		if drive {
			d.letters[letter[0]] = string(b)
		} else {
			d.guids[strings.ToUpper(id)] = string(b)
		}
	}
	return nil
}

// What identifies a volume in MountedDevices (winreg-kb, "Mounted devices"): of a partition in an MBR the disk's signature (4) and where it
// begins (8, bytes); of one in a GPT "DMIO:ID:" and its GUID, and the same with another GUID of a volume on a dynamic disk; of what can be
// removed the name of its device in UTF-16.
const dmio = "DMIO:ID:"

// device gives the volume that is identified so, nil when it is not there. removable is whether it is not one of a disk.
func (m *Machine) device(id string) (vol *Volume, removable bool) {
	b := []byte(id)
	switch {
	case len(b) == 12:
		return m.byOffset(binary.LittleEndian.Uint32(b), int64(binary.LittleEndian.Uint64(b[4:]))), false
	case len(b) == len(dmio)+16 && strings.HasPrefix(id, dmio):
		return m.tagged("PARTUUID", volume.GUID(b[len(dmio):])), false
	}
	return nil, bytes.HasPrefix(b, []byte("\\\x00?\x00")) || bytes.HasPrefix(b, []byte("_\x00?\x00"))
}

// byOffset finds a partition by the signature of its disk's MBR and where it begins, bytes.
func (m *Machine) byOffset(signature uint32, off int64) *Volume {
	disk := fmt.Sprintf("%08x-", signature)
	for _, v := range m.Volumes {
		if strings.HasPrefix(v.PartUUID, disk) && v.PartStart == off {
			return v
		}
	}
	return nil
}

// identity says of what identifies a volume, for people.
func identity(id string) string {
	b := []byte(id)
	switch {
	case len(b) == 12:
		return fmt.Sprintf("the partition %d bytes from the start of the disk %08x", binary.LittleEndian.Uint64(b[4:]), binary.LittleEndian.Uint32(b))
	case len(b) == len(dmio)+16 && strings.HasPrefix(id, dmio):
		return fmt.Sprintf("the partition, or the volume of a dynamic disk, %s", strings.ToLower(volume.GUID(b[len(dmio):])))
	}
	return fmt.Sprintf("a volume that is identified by %d bytes of an unknown kind", len(id))
}

// drives gives the view its top, with a letter for each volume that has one and can be read. own is the volume that Windows is on: it is C when
// nothing is said of it.
func (m *Machine) drives(v *View, own *Volume, f guest.FS, d mountedDevices) {
	found := map[byte]Place{}
	var missing []byte
	named := false
	for _, letter := range slices.Sorted(maps.Keys(d.letters)) {
		vol, removable := m.device(d.letters[letter])
		if vol == nil {
			if !removable {
				missing = append(missing, letter)
			}
			continue
		}
		named = named || vol == own
		v.found(found, letter, vol)
	}
	switch _, taken := found['C']; {
	case named:
	case taken:
		v.Warnings = append(v.Warnings, fmt.Sprintf("%s, which Windows is on, has no drive letter", own.Name))
	default:
		v.found(found, 'C', own)
	}
	for _, letter := range missing {
		if _, ok := found[letter]; !ok {
			v.Warnings = append(v.Warnings, fmt.Sprintf("%c: %s is not among the volumes", letter, identity(d.letters[letter])))
		}
	}
	top := &letters{list: string(slices.Sorted(maps.Keys(found)))}
	top.stat = guest.Stat{Mode: guest.ModeDir | 0o755}
	if st, err := f.Stat(f.Root()); err == nil {
		top.stat.Mtime, top.stat.Atime, top.stat.Ctime, top.stat.Btime = st.Mtime, st.Atime, st.Ctime, st.Btime
	}
	made := &Volume{machine: m, fs: guarded{top}}
	made.Name, made.Kind = "drive letters", KindView
	v.Root = Place{made, lettersRoot}
	for i := range top.list {
		v.Mounts[Place{made, top.ino(i)}] = found[top.list[i]]
	}
}

// KindView is the kind of a volume that only a view has, made up to hold others.
const KindView = "view"

// found takes a volume as a drive, when it can be read.
func (v *View) found(drives map[byte]Place, letter byte, vol *Volume) {
	f, err := vol.FS()
	if err != nil {
		v.Warnings = append(v.Warnings, fmt.Sprintf("%c: %v", letter, err))
		return
	}
	drives[letter] = Place{vol, f.Root()}
}

// maxFolders is how many mount points of a volume are looked at: most are junctions.
const maxFolders = 1 << 14

// folders mounts what is mounted at folders, of the drives and of what is mounted there.
func (m *Machine) folders(v *View, d mountedDevices) {
	below := map[*Volume][]*Volume{} // volume => those mounted in it
	var queue []*Volume
	for i := range v.Mounts {
		queue = append(queue, v.Mounts[i].Vol)
	}
	slices.SortFunc(queue, func(a, b *Volume) int { return strings.Compare(a.Name, b.Name) })
	done := map[*Volume]bool{}
	for ; len(queue) > 0; queue = queue[1:] {
		vol := queue[0]
		if done[vol] {
			continue
		}
		done[vol] = true
		for _, p := range v.mountPoints(vol) {
			on, err := m.folder(d, p.guid)
			switch {
			case err == nil && (on == vol || reaches(below, on, vol)):
				err = errors.New("a volume that is mounted in itself")
			case err == nil:
				below[vol] = append(below[vol], on)
				queue = append(queue, on)
				f, _ := on.FS()
				v.Mounts[Place{vol, p.at}] = Place{on, f.Root()}
			}
			if err != nil {
				v.Warnings = append(v.Warnings, fmt.Sprintf("a folder of %s: %v", vol.Name, err))
			}
		}
	}
}

// reaches reports whether to is mounted somewhere below from.
func reaches(below map[*Volume][]*Volume, from, to *Volume) bool {
	return slices.ContainsFunc(below[from], func(v *Volume) bool { return v == to || reaches(below, v, to) })
}

// folder gives the volume that a mount point leads to, opened.
func (m *Machine) folder(d mountedDevices, guid string) (*Volume, error) {
	id, ok := d.guids[guid]
	if !ok {
		return nil, fmt.Errorf("the volume %s is not known", strings.ToLower(guid))
	}
	vol, _ := m.device(id)
	if vol == nil {
		return nil, fmt.Errorf("%s is not among the volumes", identity(id))
	}
	_, err := vol.FS()
	return vol, err
}

// A mountPoint is a folder that a volume is mounted at.
type mountPoint struct {
	at   guest.Ino
	guid string // with its braces, in upper case
}

// mountPoints gives those of a volume.
func (v *View) mountPoints(vol *Volume) (found []mountPoint) {
	f, err := vol.FS()
	if err != nil {
		return nil
	}
	n := 0
	for ino, err := range f.(guarded).mountPoints() {
		if n++; err == nil && n > maxFolders {
			err = guest.Unsupported("more than %d mount points", maxFolders)
		}
		if err != nil {
			v.Warnings = append(v.Warnings, fmt.Sprintf("%s: mount points: %v", vol.Name, err))
			break
		}
		target, err := f.Readlink(ino)
		if err != nil {
			continue // whoever looks at it will see
		}
		if guid, ok := strings.CutPrefix(strings.TrimSuffix(target, "/"), "Volume{"); ok {
			found = append(found, mountPoint{ino, "{" + strings.ToUpper(guid)})
		}
	}
	return found
}
