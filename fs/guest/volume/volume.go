package volume

import (
	"errors"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// ErrLocked: encrypted, and no key that was given opens it.
var ErrLocked = errors.New("locked")

// Disk is a disk of the machine.
type Disk struct {
	Name string // "disk0"
	guest.Device
}

// Kinds of volumes.
const (
	KindDisk      = "disk"
	KindPartition = "partition"
	KindLogical   = "logical volume"
	KindArray     = "array"
)

// Volume is something that may carry a file system.
type Volume struct {
	// Name is the path of the volume: "disk0/p1" and "disk0/p5" as Linux numbers partitions, "disk0" for a disk without
	// partitions, "vg0-root" for a logical volume (dashes within a name doubled, as device-mapper does), "md127" or the
	// array's own name. Names are unique, and without "/" and NUL but for the one before a partition.
	Name string
	Kind string
	// Encryption is "" for none, else its name, and for BitLocker what opens it; Device is what it hides, once it is open.
	Encryption string
	UUID       string // of the encryption, "" for none: what Options.Unlock is asked for
	Detail     string // for people
	// PartUUID and PartLabel are what the partition table calls a partition, as blkid(8) writes them; "" for none.
	PartUUID, PartLabel string
	PartStart           int64 // where the partition begins on its disk, bytes
	// Device is nil when the volume cannot be read; Err says why.
	Device guest.Device
	Err    error // ErrLocked, guest.ErrUnsupported, guest.ErrDamaged, or that of reading the disk
	// Signature is what a look at the first bytes says, as blkid(8) names it: ext4, xfs, ntfs, vfat, LVM2_member,
	// crypto_LUKS …; "" for nothing known.
	Signature string

	dev device
}

// Piece is a range of a disk.
type Piece struct {
	Disk     int   // index into what Scan got
	Off, Len int64 // bytes
}

// ErrNotPlain: the bytes are not at one place each, or that place is not the volume's alone: mirrors, parity, thin pools,
// origins of snapshots.
var ErrNotPlain = errors.New("not a plain mapping")

// Map gives where n bytes from off on are on the disks, in their order. Those that are nowhere (they read as zeros) have
// no piece. Encryption keeps positions, so what it hides has a map, too. ErrNotPlain.
func (v *Volume) Map(off, n int64) ([]Piece, error) {
	if v.dev == nil {
		return nil, v.Err
	}
	if off < 0 || n < 0 || off > v.dev.Size()-n {
		return nil, guest.Damaged("bytes %d+%d of %s, past its end", off, n, v.Name)
	}
	return v.dev.locate(nil, off, n)
}

// Options say how to look. The zero value is the default.
type Options struct {
	// Unlock gives the passphrases or keys to try for an encrypted volume; for BitLocker, recovery passwords and the contents of .BEK files,
	// too. Nil for none.
	Unlock func(Locked) [][]byte
	// KeyMemory bounds what making a key out of a passphrase may take, bytes; 0 is 1 GiB, the most that cryptsetup(8)
	// makes by default.
	KeyMemory int64
	// Cache is how many bytes of the metadata of a group's thin pools are kept in memory; 0 is 16 MiB.
	Cache int64
}

// Locked is an encrypted volume that wants a key.
type Locked struct {
	Name  string // as Volume.Name
	Type  string // crypto_LUKS, BitLocker
	UUID  string
	Label string
}
