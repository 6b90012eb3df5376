package volume

import (
	"errors"
	"fmt"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// The bounds of a scan.
const (
	maxDepth   = 8    // of containers in containers
	maxVolumes = 8192 // of all kinds
)

// Scan finds the volumes of a machine's disks. What is wrong with one of them is in its Err; warnings are about what is between
// them: a backup table in use, an array with members missing.
func Scan(disks []Disk, opt Options) ([]Volume, []string) {
	s := &scan{opt: opt, names: map[string]bool{}, said: map[string]bool{}}
	for i, d := range disks {
		s.look(found{name: d.Name, kind: KindDisk, dev: whole{d.Device, i}})
	}
	// Arrays may be made of logical volumes and the other way round. A group with something missing waits until nothing
	// else turns up.
	for range maxDepth {
		if s.arrays() || s.groups(false) || s.groups(true) {
			continue
		}
		break
	}
	s.left()
	return s.volumes, s.warnings
}

type scan struct {
	opt      Options
	volumes  []Volume
	warnings []string
	names    map[string]bool // in use
	said     map[string]bool // warnings
	pvs      []*physical     // of groups not yet assembled
	members  []*member       // of arrays not yet assembled
}

// found is something to look into.
type found struct {
	name, kind, detail string
	dev                device
	depth              int
	encryption, uuid   string // that it was hidden by
	// Of a partition, from its table.
	partUUID, partLabel string
	partStart           int64
}

func (s *scan) warn(name, format string, args ...any) {
	w := name + ": " + fmt.Sprintf(format, args...)
	if len(s.warnings) < maxVolumes && !s.said[w] {
		s.said[w] = true
		s.warnings = append(s.warnings, w)
	}
}

// add puts a volume into the list, under a name of its own.
func (s *scan) add(v Volume) {
	if len(s.volumes) >= maxVolumes {
		return
	}
	name := v.Name
	for i := 2; s.names[v.Name]; i++ {
		v.Name = fmt.Sprintf("%s~%d", name, i)
	}
	if v.Name != name {
		s.warn(name, "a second volume of this name is called %s", v.Name)
	}
	s.names[v.Name] = true
	if v.dev != nil {
		v.Device = v.dev
	}
	s.volumes = append(s.volumes, v)
}

// look finds out what a device holds, and goes into it.
func (s *scan) look(f found) {
	if len(s.volumes) >= maxVolumes {
		s.warn("all disks", "more than %d volumes", maxVolumes)
		return
	}
	v := Volume{Name: f.name, Kind: f.kind, Detail: f.detail, dev: f.dev, Encryption: f.encryption, UUID: f.uuid, PartUUID: f.partUUID, PartLabel: f.partLabel, PartStart: f.partStart}
	if f.depth > maxDepth {
		v.dev, v.Err = nil, guest.Unsupported("more than %d containers in each other", maxDepth)
		s.add(v)
		return
	}
	if s.member(f, &v) {
		s.add(v)
		return
	}
	if v.Signature, v.Err = signature(f.dev); v.Err != nil {
		v.dev = nil
		s.add(v)
		return
	}
	if f.kind != KindPartition && s.table(f, v.Signature) {
		return
	}
	switch v.Signature {
	case "LVM2_member":
		s.physical(f)
	case "crypto_LUKS":
		if s.luks(f, &v) {
			return
		}
	case "BitLocker":
		if s.bitLocker(f, &v) {
			return
		}
	}
	s.add(v)
}

// member looks for the superblock of an array.
func (s *scan) member(f found, v *Volume) bool {
	switch name := firmwareRAID(f.dev); {
	case name != "" && f.kind == KindDisk:
		v.Signature, v.dev, v.Err = name, nil, guest.Unsupported("a member of an array that the firmware made")
		return true
	}
	m, err := readMember(f.dev)
	if err != nil {
		if err != guest.ErrUnknown {
			s.warn(f.name, "%v", err)
		}
		return false
	}
	if m.minor < 0 && f.kind == KindDisk && lastPartitionHas(f.dev) {
		return false
	}
	m.name, m.kind, m.depth = f.name, f.kind, f.depth
	s.members = append(s.members, m)
	v.Signature = "linux_raid_member"
	return true
}

// lastPartitionHas reports whether the superblock 0.90 at the end of a disk is that of a partition which ends there.
func lastPartitionHas(disk device) bool {
	for _, p := range partitionsOf(disk) {
		dev, err := p.device(disk)
		if err == nil && p.off+md0Place(dev.Size()) == md0Place(disk.Size()) {
			return true
		}
	}
	return false
}

// partitionsOf gives the entries of the table that a device has, if any.
func partitionsOf(disk device) []partition {
	if t, err := gpt(disk); err == nil {
		return t.parts
	}
	parts, _, _ := bestMBR(disk)
	return parts
}

// firmwareRAID recognises the metadata of Intel's and the SNIA's formats at the end of a disk, by blkid's names (mdadm(8), imsm and
// ddf).
func firmwareRAID(dev device) string {
	b := make([]byte, 1024)
	if dev.Size() < 1024 || guest.ReadFull(dev, b, dev.Size()-1024) != nil {
		return ""
	}
	switch {
	case strings.HasPrefix(string(b), "Intel Raid ISM Cfg Sig. "):
		return "isw_raid_member"
	case string(b[512:516]) == "\xde\x11\xde\x11", string(b[512:516]) == "\x11\xde\x11\xde":
		return "ddf_raid_member"
	}
	return ""
}

// luks opens an encrypted volume and looks into it, under the same name. It says no when it stays closed.
func (s *scan) luks(f found, v *Volume) bool {
	v.dev, v.Encryption = nil, "LUKS"
	h, err := readLUKS(f.dev)
	if err != nil {
		v.Err = err
		return false
	}
	v.Encryption, v.UUID = fmt.Sprintf("LUKS%d %s", h.version, h.cipher), h.uuid
	if h.damaged {
		s.warn(f.name, "the first LUKS header is damaged; the second is used")
	}
	v.Err = ErrLocked
	if h.refused != nil {
		v.Err = h.refused
		return false
	}
	if s.opt.Unlock == nil {
		return false
	}
	memory := s.opt.KeyMemory
	if memory == 0 {
		memory = 1 << 30
	}
	keys := s.opt.Unlock(Locked{Name: f.name, Type: "crypto_LUKS", UUID: h.uuid, Label: h.label})
	dev, err := h.open(f.dev, keys, memory)
	if err != nil {
		v.Err = err
		return false
	}
	f.dev, f.encryption, f.uuid, f.depth = dev, v.Encryption, v.UUID, f.depth+1
	s.look(f)
	return true
}

// table looks for a partition table and goes into its partitions. It says no when the device holds something as a whole.
func (s *scan) table(f found, sign string) bool {
	t, err := gpt(f.dev)
	parts, warnings, merr := bestMBR(f.dev)
	switch {
	case err != nil && !errors.Is(err, guest.ErrUnknown) && !errors.Is(err, guest.ErrDamaged):
		s.add(Volume{Name: f.name, Kind: f.kind, Detail: f.detail, Err: err})
		return true
	case err == nil && s.wholeInstead(f, t.parts, sign, true):
		return false
	case err == nil:
		for _, w := range t.warnings {
			s.warn(f.name, "%s", w)
		}
		s.partitions(f, "gpt", t.parts)
		return true
	case merr != nil:
		s.add(Volume{Name: f.name, Kind: f.kind, Detail: f.detail, Err: merr})
		return true
	case len(parts) == 0 || s.wholeInstead(f, parts, sign, false):
		if errors.Is(err, guest.ErrDamaged) && sign == "" {
			s.add(Volume{Name: f.name, Kind: f.kind, Err: err})
			return true
		}
		return false
	}
	if errors.Is(err, guest.ErrDamaged) {
		s.warn(f.name, "%v; the MBR is used", err)
	}
	for _, w := range warnings {
		s.warn(f.name, "%s", w)
	}
	s.partitions(f, "dos", parts)
	return true
}

// wholeInstead decides for a device with both a partition table and a signature of its own. The boot sectors of FAT and
// Windows' file systems have the mark of an MBR, and an installation image is made to be both; elsewhere one of the two is what an earlier use
// left, and the one with something in it counts.
func (s *scan) wholeInstead(f found, parts []partition, sign string, gpt bool) bool {
	switch sign {
	case "":
		return false
	case "vfat", "ntfs", "exfat", "BitLocker", "ReFS":
		return !gpt
	case "iso9660", "udf":
		return true
	}
	for _, p := range parts {
		if p.carries(f.dev) {
			s.warn(f.name, "has a partition table and the signature of %s; its partitions are shown", sign)
			return false
		}
	}
	s.warn(f.name, "has a partition table with nothing known in it and the signature of %s; the table is left out", sign)
	return true
}

// device gives the bytes of a partition; what reaches past the end of the disk ends there, as Linux does it.
func (p partition) device(disk device) (device, error) {
	if p.off <= 0 || p.n <= 0 || p.off >= disk.Size() {
		return nil, guest.Damaged("a partition of %d bytes from %d on, outside its disk", p.n, p.off)
	}
	return section(disk, p.off, min(p.n, disk.Size()-p.off))
}

func (s *scan) partitions(f found, table string, parts []partition) {
	for _, p := range parts {
		part := found{name: fmt.Sprintf("%s/p%d", f.name, p.number), kind: KindPartition, detail: p.detail, depth: f.depth + 1, partUUID: p.uuid, partLabel: p.label, partStart: p.off}
		dev, err := p.device(f.dev)
		if err == nil {
			err = windowsPool(table, p.kind)
		}
		if err != nil {
			s.add(Volume{Name: part.name, Kind: part.kind, Detail: p.detail, Err: err})
			continue
		}
		if dev.Size() < p.n {
			s.warn(part.name, "reaches past the end of the disk, by %d bytes", p.n-dev.Size())
		}
		part.dev = dev
		s.look(part)
	}
}

// windowsPool refuses partitions that are parts of what Windows puts together.
func windowsPool(table, kind string) error {
	switch {
	case table == "dos" && kind == fmt.Sprintf("%02x", mbrDynamic), kind == gptLDMMeta, kind == gptLDMData:
		return guest.Unsupported("a dynamic disk of Windows")
	case kind == gptSpaces:
		return guest.Unsupported("Windows Storage Spaces")
	}
	return nil
}

// clean makes a name of the disk safe as part of a path.
func clean(name string) string {
	name = strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '_'
		}
		return r
	}, name)
	if name == "" || name == "." || name == ".." {
		return "_" + name
	}
	return name
}
