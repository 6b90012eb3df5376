package ntfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

var le = binary.LittleEndian

// geometry is what the boot sector says (NTFS doc, "$Boot"). Bytes, but where said.
type geometry struct {
	sector   int64
	cluster  int64
	record   int64 // of the MFT
	sectors  int64 // number
	clusters int64 // number
	mft      int64 // cluster
	mirror   int64 // cluster
	serial   uint64
}

const (
	bootSize   = 512
	maxCluster = 2 << 20
	maxRecord  = pieceSize
)

// readBoot reads the boot sector, or its copy in the last sector of the volume.
func readBoot(dev guest.Device) (geometry, string, error) {
	b := make([]byte, bootSize)
	if err := guest.ReadFull(dev, b, 0); err != nil {
		return geometry{}, "", fmt.Errorf("%w: %w", guest.ErrUnknown, err)
	}
	g, err := parseBoot(b)
	if err == nil {
		return g, "", nil
	}
	for _, sector := range []int64{512, 4096} {
		off := dev.Size() - sector
		if off < sector || guest.ReadFull(dev, b, off) != nil {
			continue
		}
		if g, copyErr := parseBoot(b); copyErr == nil && g.sectors*g.sector <= dev.Size() {
			return g, "the boot sector is damaged: its copy at the end of the volume is used", nil
		}
	}
	return geometry{}, "", err
}

func parseBoot(b []byte) (geometry, error) {
	var g geometry
	if !bytes.Equal(b[3:11], []byte("NTFS    ")) {
		return g, guest.ErrUnknown
	}
	g.sector = int64(le.Uint16(b[0x0b:]))
	g.cluster = sizeOf(b[0x0d], g.sector)
	g.sectors = int64(le.Uint64(b[0x28:]))
	g.mft, g.mirror = int64(le.Uint64(b[0x30:])), int64(le.Uint64(b[0x38:]))
	g.record = perCluster(b[0x40], g.cluster)
	g.serial = le.Uint64(b[0x48:])
	switch {
	case b[510] != 0x55 || b[511] != 0xaa:
		return g, guest.Damaged("boot sector: no signature")
	case !power(g.sector, 256, 4096):
		return g, guest.Damaged("boot sector: sectors of %d bytes", g.sector)
	case !power(g.cluster, g.sector, maxCluster):
		return g, guest.Damaged("boot sector: clusters of %d bytes", g.cluster)
	case !power(g.record, 512, maxRecord):
		return g, guest.Damaged("boot sector: records of %d bytes", g.record)
	case g.sectors <= 0 || g.sectors > 1<<62/g.sector:
		return g, guest.Damaged("boot sector: %d sectors", g.sectors)
	}
	g.clusters = g.sectors / (g.cluster / g.sector)
	if g.mft <= 0 || g.mft >= g.clusters {
		return g, guest.Damaged("boot sector: the MFT in cluster %d of %d", g.mft, g.clusters)
	}
	return g, nil
}

// sizeOf is the size of a cluster: n sectors or, for 64 KiB of sectors of 512 bytes and above, 2^-n of them (n signed).
func sizeOf(n byte, sector int64) int64 {
	if n <= 0x80 {
		return int64(n) * sector
	}
	return sector << min(-int8(n), 32)
}

// perCluster is the size of a record: n clusters or, when n is negative, 2^-n bytes.
func perCluster(n byte, cluster int64) int64 {
	if int8(n) < 0 {
		return 1 << min(-int(int8(n)), 32)
	}
	return int64(n) * cluster
}

func power(n, from, to int64) bool {
	return n >= from && n <= to && bits.OnesCount64(uint64(n)) == 1
}
