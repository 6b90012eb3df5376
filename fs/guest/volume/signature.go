package volume

import (
	"bytes"
	"encoding/binary"
	"math/bits"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// magic is a string at a place that tells what a device holds.
type magic struct {
	off  int64
	text string
	name string // as blkid(8) names it
}

// magics are those that need no further look, the containers first.
var magics = []magic{
	{0, "LUKS\xba\xbe", "crypto_LUKS"},
	{3, "-FVE-FS-", "BitLocker"},
	{0, "integrt\x00", "DM_integrity"},
	{0, "verity\x00\x00", "DM_verity_hash"},
	{0, "dmvdo001", "vdo"},
	{4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"},
	{4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "bcachefs"},
	{3, "NTFS    ", "ntfs"},
	{3, "EXFAT   ", "exfat"},
	{3, "ReFS\x00\x00\x00\x00", "ReFS"},
	{0, "XFSB", "xfs"},
	{65536 + 64, "_BHRfS_M", "btrfs"},
	{32, "NXSB", "apfs"},
	{0, "hsqs", "squashfs"},
	{1024, "\xe2\xe1\xf5\xe0", "erofs"},
	{1024, "\x10\x20\xf5\xf2", "f2fs"},
	{1024, "H+", "hfsplus"},
	{1024, "HX", "hfsplus"},
	{1024, "BD", "hfs"},
	{1024 + 6, "\x34\x34", "nilfs2"},
	{65536 + 52, "ReIsErFs", "reiserfs"},
	{65536 + 52, "ReIsEr2Fs", "reiserfs"},
	{65536 + 52, "ReIsEr3Fs", "reiserfs"},
	{32768, "JFS1", "jfs"},
	{65536, "\x01\x16\x19\x70", "gfs2"},
	{8192 + 1372, "\x19\x54\x01\x19", "ufs"},
	{65536 + 1372, "\x19\x54\x01\x19", "ufs"},
	{2048, "OCFSV2", "ocfs2"},
	{4096, "OCFSV2", "ocfs2"},
	{1 << 20, "\x0d\xd0\x01\xc0", "VMFS_volume_member"},
	{2 << 20, "\x5e\xf1\xab\x2f", "VMFS"},
	{4096 - 10, "SWAPSPACE2", "swap"},
	{8192 - 10, "SWAPSPACE2", "swap"},
	{16384 - 10, "SWAPSPACE2", "swap"},
	{65536 - 10, "SWAPSPACE2", "swap"},
	{4096 - 10, "SWAP-SPACE", "swap"},
	{4096 - 10, "S1SUSPEND\x00", "swsuspend"},
	{4096 - 10, "S2SUSPEND\x00", "swsuspend"},
	{32768 + 1, "CD001", "iso9660"},
	{32768 + 1, "BEA01", "udf"},
}

// head is how much of a device a look reads at once, bytes.
const head = 68 << 10

// signature says what a device holds, "" for what is not known. The error is that of reading its start.
func signature(dev guest.Device) (string, error) {
	b := make([]byte, min(head, max(0, dev.Size())))
	if err := guest.ReadFull(dev, b, 0); err != nil {
		return "", err
	}
	return known(dev, b), nil
}

// known says what a device holds that starts with b.
func known(dev guest.Device, b []byte) string {
	if _, _, err := findLabel(b); err == nil {
		return "LVM2_member"
	}
	if isToGo(b) {
		return "BitLocker"
	}
	for _, m := range magics {
		if hasMagic(dev, b, m) {
			return m.name
		}
	}
	switch {
	case isFAT(b, dev.Size()):
		return "vfat"
	case isZFS(dev):
		return "zfs_member"
	}
	if name := extName(b); name != "" {
		return name
	}
	for _, at := range luks2Second { // the first header is gone
		if hasMagic(dev, b, magic{at, luksSecond, ""}) {
			return "crypto_LUKS"
		}
	}
	return ""
}

func hasMagic(dev guest.Device, b []byte, m magic) bool {
	end := m.off + int64(len(m.text))
	if end <= int64(len(b)) {
		return string(b[m.off:end]) == m.text
	}
	if end > dev.Size() {
		return false
	}
	far := make([]byte, len(m.text))
	return guest.ReadFull(dev, far, m.off) == nil && string(far) == m.text
}

// extName tells ext2, ext3 and ext4 apart by the features that only the later ones have, as blkid does.
func extName(b []byte) string {
	const super, hasJournal, journalDev = 1024, 4, 8
	if len(b) < super+256 || b[super+56] != 0x53 || b[super+57] != 0xef {
		return ""
	}
	le := binary.LittleEndian
	compat, incompat, ro := le.Uint32(b[super+92:]), le.Uint32(b[super+96:]), le.Uint32(b[super+100:])
	const (
		incompat2, incompat3 = 0x2 | 0x10, 0x2 | 0x4 | 0x10 // filetype, meta_bg; recover
		ro3                  = 0x1 | 0x2 | 0x4              // sparse_super, large_file, btree_dir
	)
	switch {
	case incompat&journalDev != 0:
		return "jbd"
	case incompat&^incompat3 != 0 || ro&^ro3 != 0:
		return "ext4"
	case compat&hasJournal != 0:
		return "ext3"
	case incompat&^incompat2 == 0:
		return "ext2"
	}
	return "ext4"
}

// isFAT reports whether a boot sector is that of a FAT file system: Microsoft's "FAT32 File System Specification" (fatgen103), "Boot
// Sector and BPB". Boot code of an MBR that happens to look like one does not have all of these.
func isFAT(b []byte, size int64) bool {
	if len(b) < 512 || b[510] != 0x55 || b[511] != 0xaa || b[0] != 0xeb && b[0] != 0xe9 {
		return false
	}
	le := binary.LittleEndian
	sector, cluster := int64(le.Uint16(b[11:])), b[13]
	reserved, fats, media := le.Uint16(b[14:]), b[16], b[21]
	if sector < 512 || sector > 4096 || bits.OnesCount16(uint16(sector)) != 1 || bits.OnesCount8(cluster) != 1 ||
		reserved == 0 || fats == 0 || fats > 2 || media < 0xf8 && media != 0xf0 {
		return false
	}
	total, fat := int64(le.Uint16(b[19:])), int64(le.Uint16(b[22:]))
	if total == 0 {
		total = int64(le.Uint32(b[32:]))
	}
	if fat == 0 {
		fat = int64(le.Uint32(b[36:]))
	}
	roots := int64(le.Uint16(b[17:])) * 32
	return total > 0 && fat > 0 && int64(reserved)+int64(fats)*fat+roots/sector < total && size > 0
}

// isZFS looks for an uberblock in the first label: 128 of 1 KiB from 128 KiB on ("ZFS On-Disk Specification" §1.3).
func isZFS(dev guest.Device) bool {
	const from, to = 128 << 10, 256 << 10
	if dev.Size() < to {
		return false
	}
	b := make([]byte, to-from)
	if guest.ReadFull(dev, b, from) != nil {
		return false
	}
	little, big := []byte("\x0c\xb1\xba\x00\x00\x00\x00\x00"), []byte("\x00\x00\x00\x00\x00\xba\xb1\x0c")
	for ; len(b) > 0; b = b[1024:] {
		if bytes.HasPrefix(b, little) || bytes.HasPrefix(b, big) {
			return true
		}
	}
	return false
}
