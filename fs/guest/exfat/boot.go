package exfat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/cluster"
)

var le = binary.LittleEndian

// geometry is what the boot sector says (§3.1). Bytes, but where said.
type geometry struct {
	sector   int64
	cluster  int64
	size     int64 // of the volume
	table    int64 // where the active one is
	heap     int64 // where cluster 2 is
	clusters int64 // number
	root     uint32
	second   bool // of two tables and bitmaps, the second is active
	flags    uint16
	serial   uint32
}

// VolumeFlags (§3.1.13).
const (
	flagActiveSecond = 0x1
	flagDirty        = 0x2
	flagFailure      = 0x4
)

const (
	bootSectors = 12       // of a boot region; the last has the checksum of the others
	maxCluster  = 32 << 20 // §3.1.15
	maxClusters = 1<<32 - 11
)

// readBoot reads the boot region, or its copy behind it.
func readBoot(dev guest.Device) (geometry, string, error) {
	g, err := readRegion(dev, 0, 0)
	if err == nil || errors.Is(err, guest.ErrUnsupported) {
		return g, "", err
	}
	for shift := 9; shift <= 12; shift++ {
		if c, copyErr := readRegion(dev, bootSectors<<shift, shift); copyErr == nil {
			return c, "the boot region is damaged: its copy is used", nil
		}
	}
	return geometry{}, "", err
}

// readRegion reads a boot region, of sectors of 1<<shift bytes when that is not 0.
func readRegion(dev guest.Device, off int64, shift int) (g geometry, err error) {
	b := make([]byte, 512)
	if err := guest.ReadFull(dev, b, off); err != nil {
		if errors.Is(err, guest.ErrDamaged) {
			err = fmt.Errorf("%w: %w", guest.ErrUnknown, err)
		}
		return g, err
	}
	if g, err = parseBoot(b); err != nil {
		return g, err
	}
	if shift != 0 && g.sector != 1<<shift {
		return g, guest.ErrUnknown
	}
	b = make([]byte, bootSectors*g.sector)
	if err := guest.ReadFull(dev, b, off); err != nil {
		return g, err
	}
	covered := b[:(bootSectors-1)*g.sector]
	// What changes while a volume is in use is not covered (§3.4).
	sum := checksum32(checksum32(checksum32(0, covered[:106]), covered[108:112]), covered[113:])
	for last := b[len(covered):]; len(last) > 0; last = last[4:] {
		if le.Uint32(last) != sum {
			return g, guest.Damaged("boot region: its checksum")
		}
	}
	return g, nil
}

// checksum32 goes on with a checksum of 32 bits (§3.4, §7.2.2).
func checksum32(sum uint32, b []byte) uint32 {
	for _, c := range b {
		sum = (sum>>1 | sum<<31) + uint32(c)
	}
	return sum
}

func parseBoot(b []byte) (geometry, error) {
	var g geometry
	if !bytes.Equal(b[3:11], []byte("EXFAT   ")) || b[510] != 0x55 || b[511] != 0xaa {
		return g, guest.ErrUnknown
	}
	shift, perCluster, tables := b[108], b[109], b[110]
	if shift < 9 || shift > 12 || int(perCluster) > 25-int(shift) || tables < 1 || tables > 2 {
		return g, guest.Damaged("boot sector: sectors of 1<<%d bytes, clusters of 1<<%d, %d tables", shift, perCluster, tables)
	}
	if revision := le.Uint16(b[104:]); revision>>8 != 1 {
		return g, guest.Unsupported("exFAT of revision %d.%02d", revision>>8, revision&0xff)
	}
	g.sector = 1 << shift
	g.cluster = g.sector << perCluster
	sectors := le.Uint64(b[72:])
	at := func(i int) int64 { return int64(le.Uint32(b[i:])) * g.sector }
	tableLen := at(84)
	g.table, g.heap, g.clusters = at(80), at(88), int64(le.Uint32(b[92:]))
	g.root, g.serial, g.flags = le.Uint32(b[96:]), le.Uint32(b[100:]), le.Uint16(b[106:])
	if g.second = tables == 2 && g.flags&flagActiveSecond != 0; g.second {
		g.table += tableLen
	}
	if sectors > 1<<62/uint64(g.sector) {
		return g, guest.Damaged("boot sector: %d sectors", sectors)
	}
	g.size = int64(sectors) * g.sector
	switch {
	case g.clusters <= 0 || g.clusters > maxClusters || (g.clusters+cluster.First)*4 > tableLen:
		return g, guest.Damaged("boot sector: %d clusters, a table of %d bytes", g.clusters, tableLen)
	case at(80) < 2*bootSectors*g.sector || at(80)+int64(tables)*tableLen > g.heap:
		return g, guest.Damaged("boot sector: tables from %d on, clusters from %d on", g.table, g.heap)
	case g.heap > g.size || g.clusters > (g.size-g.heap)/g.cluster:
		return g, guest.Damaged("boot sector: %d clusters on %d bytes", g.clusters, g.size)
	}
	return g, nil
}
