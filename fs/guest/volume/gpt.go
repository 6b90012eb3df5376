package volume

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf16"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// The bounds of what a GPT may say. Usual are 128 entries of 128 bytes.
const (
	maxEntries    = 4096
	maxEntrySize  = 4096
	maxEntryTable = 1 << 20
)

// gptHeader is a GPT header, UEFI 2.10 §5.3.2, little-endian:
//
//	0 "EFI PART" | 8 revision 4 | 12 header size 4 | 16 CRC-32 of the header with this field zero 4 | 20 zero 4 | 24 own LBA 8
//	32 the other header's LBA 8 | 40 first usable 8 | 48 last usable 8 | 56 disk GUID 16 | 72 LBA of the entries 8
//	80 number of entries 4 | 84 bytes of an entry 4 | 88 CRC-32 of the entries 4
type gptHeader struct {
	other, entries int64 // LBA
	count, size    int64
	crc            uint32
}

// parseGPT checks a header that stands at sector lba.
func parseGPT(b []byte, lba int64) (h gptHeader, err error) {
	le := binary.LittleEndian
	if len(b) < 512 || string(b[:8]) != "EFI PART" {
		return h, guest.ErrUnknown
	}
	h.other = int64(le.Uint64(b[32:]) & (1<<62 - 1))
	size := le.Uint32(b[12:])
	if size < 92 || int(size) > len(b) {
		return h, guest.Damaged("GPT: a header of %d bytes", size)
	}
	sum := crc32.ChecksumIEEE(b[:16])
	sum = crc32.Update(sum, crc32.IEEETable, make([]byte, 4))
	if crc32.Update(sum, crc32.IEEETable, b[20:size]) != le.Uint32(b[16:]) {
		return h, guest.Damaged("GPT: the header's checksum")
	}
	if own := le.Uint64(b[24:]); own != uint64(lba) {
		return h, guest.Damaged("GPT: the header of sector %d at sector %d", own, lba)
	}
	entries := le.Uint64(b[72:])
	h.count, h.size, h.crc = int64(le.Uint32(b[80:])), int64(le.Uint32(b[84:])), le.Uint32(b[88:])
	if entries > 1<<52 || h.count > maxEntries || h.size < 128 || h.size > maxEntrySize || h.count*h.size > maxEntryTable {
		return h, guest.Damaged("GPT: %d entries of %d bytes", h.count, h.size)
	}
	h.entries = int64(entries)
	return h, nil
}

// gptTable is a GPT that was found.
type gptTable struct {
	parts    []partition
	warnings []string
}

// gpt looks for a GPT, with each sector size that disks have. The backup is used when the first header or its entries are
// damaged; it is at the end of the disk, and where the disk ended before somebody made it larger: the protective MBR and what is left of
// the first header say where that was. ErrUnknown when there is none.
func gpt(dev device) (*gptTable, error) {
	damage := error(guest.ErrUnknown)
	for _, unit := range []int64{512, 4096, 2048, 1024} {
		if dev.Size() < 6*unit {
			continue
		}
		t, hint, err := gptAt(dev, unit, 1)
		if err == nil {
			return t, nil
		}
		for _, lba := range backups(dev, unit, hint) {
			t, _, berr := gptAt(dev, unit, lba)
			if berr == nil {
				t.warnings = append(t.warnings, fmt.Sprintf("the first partition table is damaged (%v); the backup at sector %d is used", err, lba))
				return t, nil
			}
			if err == guest.ErrUnknown {
				err = berr
			}
		}
		if damage == guest.ErrUnknown {
			damage = err
		}
	}
	return nil, damage
}

// backups are the sectors where a backup header may be. hint is what the first header says, 0 for nothing.
func backups(dev device, unit, hint int64) (lbas []int64) {
	lbas = append(lbas, dev.Size()/unit-1)
	if hint > 1 && hint < lbas[0] {
		lbas = append(lbas, hint)
	}
	b := make([]byte, 512)
	if guest.ReadFull(dev, b, 0) != nil {
		return lbas
	}
	entries, ok := mbrEntries(b)
	for _, e := range entries {
		if last := e.start + e.count - 1; ok && e.kind == mbrProtective && last > 1 && last < lbas[0] && last != hint {
			lbas = append(lbas, last)
		}
	}
	return lbas
}

// gptAt reads the GPT whose header is at sector lba.
func gptAt(dev device, unit, lba int64) (t *gptTable, hint int64, err error) {
	b := make([]byte, unit)
	if err := guest.ReadFull(dev, b, lba*unit); err != nil {
		return nil, 0, err
	}
	h, err := parseGPT(b, lba)
	if err != nil {
		return nil, h.other, err
	}
	if h.entries > dev.Size()/unit {
		return nil, h.other, guest.Damaged("GPT: entries at sector %d", h.entries)
	}
	table := make([]byte, h.count*h.size)
	if err := guest.ReadFull(dev, table, h.entries*unit); err != nil {
		return nil, h.other, err
	}
	if crc32.ChecksumIEEE(table) != h.crc {
		return nil, h.other, guest.Damaged("GPT: the entries' checksum")
	}
	t = &gptTable{}
	for i := range h.count {
		p, ok := gptEntry(table[i*h.size:], int(i)+1, unit)
		if ok {
			t.parts = append(t.parts, p)
		}
	}
	return t, h.other, nil
}

// gptEntry reads an entry, UEFI 2.10 §5.3.3: type GUID 16 | own GUID 16 | first LBA 8 | last LBA 8 | attributes 8 | name 72, UTF-16LE.
func gptEntry(b []byte, number int, unit int64) (p partition, used bool) {
	le := binary.LittleEndian
	kind := GUID(b[:16])
	if kind == "00000000-0000-0000-0000-000000000000" {
		return p, false
	}
	p = partition{number: number, kind: kind, detail: gptName(kind), off: -1, uuid: strings.ToLower(GUID(b[16:32]))}
	first, last := le.Uint64(b[32:]), le.Uint64(b[40:])
	if last >= first && last < 1<<50 {
		p.off, p.n = int64(first)*unit, int64(last-first+1)*unit
	}
	if p.label = utf16Text(b[56:128]); p.label != "" {
		p.detail += fmt.Sprintf(" %q", p.label)
	}
	p.reserved = kind == gptReserved || kind == gptBIOS
	return p, true
}

// utf16Text is a text in UTF-16LE that ends with a zero.
func utf16Text(b []byte) string {
	var u []uint16
	for ; len(b) >= 2 && (b[0] != 0 || b[1] != 0); b = b[2:] {
		u = append(u, binary.LittleEndian.Uint16(b))
	}
	return string(utf16.Decode(u))
}

// GUID writes a GUID as Windows and UEFI store it, its first three fields little-endian.
func GUID(b []byte) string {
	le := binary.LittleEndian
	return strings.ToUpper(fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16]))
}

const (
	gptReserved = "E3C9E316-0B5C-4DB8-817D-F92DF00215AE"
	gptBIOS     = "21686148-6449-6E6F-744E-656564454649"
	gptSpaces   = "E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D"
	gptLDMMeta  = "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3"
	gptLDMData  = "AF9B60A0-1431-4F62-BC68-3311714A69AD"
)

// gptName says what a partition type is for, for people. The GUIDs: UEFI 2.10 §5.3.3, Microsoft's PARTITION_INFORMATION_GPT, the Discoverable
// Partitions Specification.
func gptName(kind string) string {
	switch kind {
	case "C12A7328-F81F-11D2-BA4B-00A0C93EC93B":
		return "EFI system"
	case gptBIOS:
		return "BIOS boot"
	case gptReserved:
		return "Microsoft reserved"
	case "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7":
		return "Microsoft basic data"
	case "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC":
		return "Windows recovery"
	case gptSpaces:
		return "Windows Storage Spaces"
	case gptLDMMeta:
		return "Windows dynamic disk metadata"
	case gptLDMData:
		return "Windows dynamic disk"
	case "0FC63DAF-8483-4772-8E79-3D69D8477DE4":
		return "Linux filesystem"
	case "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F":
		return "Linux swap"
	case "E6D6D379-F507-44C2-A23C-238F2A3DF928":
		return "Linux LVM"
	case "A19D880F-05FC-4D3B-A006-743F0F84911E":
		return "Linux RAID"
	case "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709":
		return "Linux root (x86-64)"
	case "933AC7E1-2EB4-4F13-B844-0E14E2AEF915":
		return "Linux home"
	case "BC13C2FF-59E6-4262-A352-B275FD6F7172":
		return "Linux extended boot"
	case "CA7D7CCB-63ED-4C53-861C-1742536059CC":
		return "Linux LUKS"
	case "48465300-0000-11AA-AA11-00306543ECAC":
		return "Apple HFS+"
	case "7C3457EF-0000-11AA-AA11-00306543ECAC":
		return "Apple APFS"
	case "516E7CBA-6ECF-11D6-8FF8-00022D09712B":
		return "FreeBSD ZFS"
	case "6A898CC3-1DD2-11B2-99A6-080020736631":
		return "ZFS"
	case "AA31E02A-400F-11DB-9590-000C2911D1B8":
		return "VMware VMFS"
	}
	return "type " + kind
}
