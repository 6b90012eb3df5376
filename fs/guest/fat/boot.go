package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var le = binary.LittleEndian

// geometry is what the boot sector says (fatgen, "Boot Sector and BPB Structure"). Bytes, but where said.
type geometry struct {
	bits     int // of a number in the table: 12, 16, 32
	sector   int64
	cluster  int64
	size     int64 // of the volume
	clusters int64 // number
	table    int64 // where the first is
	tableLen int64
	tables   int64 // number
	active   int64 // the one in use
	mirrored bool  // the others are copies of it
	rootAt   int64 // where the root directory of FAT12 and FAT16 is
	rootLen  int64
	root     uint32 // first cluster of that of FAT32
	data     int64  // where cluster 2 is
	copyAt   int64  // of the boot sector; 0 for none
	media    byte
	state    byte // bit 0: mounted, bit 1: look for bad sectors
	serial   uint32
	label    string // 11 bytes, "" for none
}

const bootSize = 512

// readBoot reads the boot sector, or the copy that FAT32 has in sector 6.
func readBoot(dev guest.Device) (geometry, string, error) {
	b := make([]byte, bootSize)
	if err := guest.ReadFull(dev, b, 0); err != nil {
		if errors.Is(err, guest.ErrDamaged) {
			return geometry{}, "", fmt.Errorf("%w: %w", guest.ErrUnknown, err)
		}
		return geometry{}, "", err
	}
	g, err := parseBoot(b)
	if err == nil {
		return g, "", nil
	}
	const copySector = 6 // fatgen, BPB_BkBootSec: "no value other than 6 is recommended"
	for sector := int64(512); sector <= 4096; sector *= 2 {
		if guest.ReadFull(dev, b, copySector*sector) != nil {
			break
		}
		if c, copyErr := parseBoot(b); copyErr == nil && c.bits == 32 && c.sector == sector && c.copyAt == copySector*sector {
			return c, "the boot sector is damaged: its copy is used", nil
		}
	}
	return geometry{}, "", err
}

func parseBoot(b []byte) (geometry, error) {
	var g geometry
	g.sector, g.media, g.tables = int64(le.Uint16(b[11:])), b[21], int64(b[16])
	perCluster, reserved := int64(b[13]), int64(le.Uint16(b[14:]))
	roots, sectors := int64(le.Uint16(b[17:])), int64(le.Uint16(b[19:]))
	if sectors == 0 {
		sectors = int64(le.Uint32(b[32:]))
	}
	g.tableLen = int64(le.Uint16(b[22:])) * g.sector
	ext := b[36:] // what is behind the BPB: elsewhere for FAT32
	wide := g.tableLen == 0
	if wide {
		g.tableLen, ext = int64(le.Uint32(b[36:]))*g.sector, b[64:]
	}
	switch {
	case b[510] != 0x55 || b[511] != 0xaa, bytes.Equal(b[3:11], []byte("NTFS    ")), bytes.Equal(b[3:11], []byte("EXFAT   ")):
		return g, guest.ErrUnknown
	case g.sector < 512 || g.sector > 4096 || bits.OnesCount64(uint64(g.sector)) != 1,
		perCluster == 0 || bits.OnesCount64(uint64(perCluster)) != 1, reserved == 0, g.tables == 0, g.media < 0xf8 && g.media != 0xf0:
		return g, guest.ErrUnknown
	case g.tableLen == 0 || sectors == 0:
		return g, guest.Damaged("boot sector: %d sectors, tables of %d bytes", sectors, g.tableLen)
	}
	g.cluster, g.size = perCluster*g.sector, sectors*g.sector
	g.table = reserved * g.sector
	g.rootAt = g.table + g.tables*g.tableLen
	g.rootLen = roots * 32
	g.data = g.rootAt + (g.rootLen+g.sector-1)/g.sector*g.sector
	if g.data >= g.size {
		return g, guest.Damaged("boot sector: %d bytes, of which files start at %d", g.size, g.data)
	}
	g.clusters = (g.size - g.data) / g.cluster
	g.state = ext[1]
	if ext[2] == 0x29 || ext[2] == 0x28 {
		g.serial = le.Uint32(ext[3:])
	}
	if ext[2] == 0x29 {
		g.label = string(ext[7:18])
	}
	g.mirrored = true
	if wide {
		return g, g.parseWide(b)
	}
	return g, g.narrow()
}

// narrow tells FAT12 from FAT16 (fatgen, "FAT Type Determination").
func (g *geometry) narrow() error {
	g.bits = 12
	if g.clusters >= 4085 {
		g.bits = 16
	}
	g.clusters = min(g.clusters, g.tableLen*8/int64(g.bits)-2)
	switch {
	case g.clusters > 65524:
		return guest.Damaged("boot sector: %d clusters of FAT16", g.clusters)
	case g.clusters <= 0 || g.rootLen == 0:
		return guest.Damaged("boot sector: %d clusters, %d bytes of root directory", g.clusters, g.rootLen)
	}
	return nil
}

// parseWide reads what only FAT32 has.
func (g *geometry) parseWide(b []byte) error {
	g.bits = 32
	g.clusters = min(g.clusters, g.tableLen/4-2)
	g.root = le.Uint32(b[44:])
	flags, copySector := le.Uint16(b[40:]), int64(le.Uint16(b[50:]))
	if flags&0x80 != 0 {
		g.active, g.mirrored = int64(flags&0xf), false
	}
	if copySector > 0 && copySector != 0xffff {
		g.copyAt = copySector * g.sector
	}
	switch {
	case le.Uint16(b[42:]) != 0:
		return guest.Unsupported("FAT32 of version %#x", le.Uint16(b[42:]))
	case g.active >= g.tables:
		return guest.Damaged("boot sector: table %d of %d is the active one", g.active, g.tables)
	case g.clusters <= 0 || g.clusters > 0x0ffffff5 || g.rootLen != 0:
		return guest.Damaged("boot sector: %d clusters, %d bytes of root directory", g.clusters, g.rootLen)
	}
	return nil
}
