package volume

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// partition is an entry of a partition table.
type partition struct {
	number   int
	off, n   int64 // bytes
	kind     string
	detail   string
	uuid     string // PARTUUID, as blkid(8) writes it
	label    string // PARTLABEL
	reserved bool   // holds nothing that a file system could be in
}

// The types of MBR partitions that matter here (UEFI 2.10 §5.2.2; the list of sfdisk -T).
const (
	mbrEmpty      = 0x00
	mbrDynamic    = 0x42
	mbrProtective = 0xee
)

// maxLogical is how many logical partitions are followed; Linux itself stops at 256 minors.
const maxLogical = 255

// mbrEntry is one of the four entries of an MBR, or of the two that an EBR uses.
type mbrEntry struct {
	kind         byte
	start, count int64 // sectors
}

// mbrEntries reads the table of a boot sector. It says no when this is not one: the mark at the end is missing, or a
// status is neither 0 nor 0x80, as in the code of a boot sector that has no table.
//
//	446  4 × 16  status 1 | first CHS 3 | type 1 | last CHS 3 | first LBA 4 | sectors 4   (little-endian)
//	510  2       55 aa
func mbrEntries(b []byte) (entries [4]mbrEntry, ok bool) {
	if len(b) < 512 || b[510] != 0x55 || b[511] != 0xaa {
		return entries, false
	}
	for i := range entries {
		e := b[446+16*i:]
		if e[0]&0x7f != 0 {
			return entries, false
		}
		entries[i] = mbrEntry{e[4], int64(binary.LittleEndian.Uint32(e[8:])), int64(binary.LittleEndian.Uint32(e[12:]))}
	}
	return entries, true
}

func (e mbrEntry) extended() bool { return e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85 }
func (e mbrEntry) used() bool     { return e.kind != mbrEmpty && e.count > 0 }

// protective reports whether a table says that a GPT is to be used.
func protective(entries [4]mbrEntry) bool {
	for _, e := range entries {
		if e.kind == mbrProtective {
			return true
		}
	}
	return false
}

// bestMBR reads the partitions of an MBR, which does not tell the size of a sector: 512 bytes, unless only with 4096 there is
// something where the table says.
func bestMBR(dev device) ([]partition, []string, error) {
	parts, warnings, err := mbr(dev, 512)
	if err != nil || parts == nil && warnings == nil {
		return nil, nil, err
	}
	large, w, err := mbr(dev, 4096)
	if err == nil && sense(dev, large) > sense(dev, parts) {
		return large, w, nil
	}
	return parts, warnings, nil
}

// sense counts what speaks for a reading of a table: logical partitions, whose chain was found, and what is known by its signature.
func sense(dev device, parts []partition) (n int) {
	for _, p := range parts {
		if p.off >= dev.Size() || p.n > dev.Size()-p.off {
			return 0
		}
		if p.number > 4 {
			n++
		}
		if p.carries(dev) {
			n++
		}
	}
	return n
}

// carries reports whether something is known to be in a partition.
func (p partition) carries(disk device) bool {
	dev, err := p.device(disk)
	if err != nil {
		return false
	}
	sign, err := signature(dev)
	return err == nil && sign != ""
}

// mbr reads the partitions of an MBR; nil when there is none, or none of its entries is within the disk. Sectors are of
// unit bytes.
func mbr(dev device, unit int64) ([]partition, []string, error) {
	b := make([]byte, 512)
	if dev.Size() < 512 {
		return nil, nil, nil
	}
	if err := guest.ReadFull(dev, b, 0); err != nil {
		return nil, nil, err
	}
	entries, ok := mbrEntries(b)
	if !ok {
		return nil, nil, nil
	}
	var parts []partition
	var warnings []string
	plausible, extended := false, false
	for i, e := range entries {
		if !e.used() || e.kind == mbrProtective {
			continue
		}
		plausible = plausible || e.start > 0 && e.start < dev.Size()/unit
		switch {
		case !e.extended():
			parts = append(parts, mbrPartition(i+1, e, unit))
		case !extended: // Linux follows every one; no tool makes a second
			extended = true
			logical, w := logicals(dev, e, unit)
			parts, warnings = append(parts, logical...), append(warnings, w...)
		}
	}
	if !plausible {
		return nil, nil, nil
	}
	if id := binary.LittleEndian.Uint32(b[440:]); id != 0 { // the disk's signature
		for i := range parts {
			parts[i].uuid = fmt.Sprintf("%08x-%02x", id, parts[i].number)
		}
	}
	return parts, warnings, nil
}

func mbrPartition(number int, e mbrEntry, unit int64) partition {
	return partition{number: number, off: e.start * unit, n: e.count * unit, kind: fmt.Sprintf("%02x", e.kind), detail: mbrName(e.kind)}
}

// logicals follows the chain of EBRs of an extended partition. Each describes one logical partition, which starts
// relative to the EBR, and points to the next EBR, relative to the extended partition.
func logicals(dev device, ext mbrEntry, unit int64) (parts []partition, warnings []string) {
	b := make([]byte, 512)
	seen := map[int64]bool{}
	at := ext.start
	for len(parts) < maxLogical {
		if seen[at] {
			return parts, append(warnings, fmt.Sprintf("the chain of logical partitions comes back to sector %d", at))
		}
		seen[at] = true
		if at*unit > dev.Size()-512 || guest.ReadFull(dev, b, at*unit) != nil {
			return parts, append(warnings, fmt.Sprintf("the chain of logical partitions ends at sector %d, which cannot be read", at))
		}
		entries, ok := mbrEntries(b)
		if !ok {
			return parts, append(warnings, fmt.Sprintf("the chain of logical partitions ends at sector %d, which is no EBR", at))
		}
		next := int64(-1)
		for _, e := range entries {
			switch {
			case !e.used():
			case e.extended():
				if next < 0 {
					next = ext.start + e.start
				}
			case len(parts) < maxLogical:
				e.start += at
				parts = append(parts, mbrPartition(5+len(parts), e, unit))
			}
		}
		if next < 0 {
			return parts, warnings
		}
		at = next
	}
	return parts, append(warnings, fmt.Sprintf("more than %d logical partitions", maxLogical))
}

// mbrName says what a partition type is for, for people.
func mbrName(kind byte) string {
	switch kind {
	case 0x01, 0x04, 0x06, 0x0b, 0x0c, 0x0e:
		return "FAT"
	case 0x07:
		return "NTFS or exFAT"
	case 0x11, 0x14, 0x16, 0x1b, 0x1c, 0x1e, 0x17:
		return "hidden Windows partition"
	case 0x27:
		return "Windows recovery"
	case mbrDynamic:
		return "Windows dynamic disk"
	case 0x82:
		return "Linux swap"
	case 0x83:
		return "Linux"
	case 0x8e:
		return "Linux LVM"
	case 0xa5:
		return "FreeBSD"
	case 0xa6:
		return "OpenBSD"
	case 0xaf:
		return "HFS+"
	case 0xbf:
		return "Solaris"
	case 0xef:
		return "EFI system"
	case 0xfb:
		return "VMFS"
	case 0xfd:
		return "Linux RAID"
	}
	return fmt.Sprintf("type %02x", kind)
}
