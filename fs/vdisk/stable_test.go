package vdisk

import (
	"crypto/sha256"
	"encoding/hex"
	"testing"
)

// Files of restore points that exist stay what they are: the sums were taken
// on 2026-11-21, before there were other layouts.
func TestStableBytes(t *testing.T) {
	disk := randomModel(77, 200*mib+512*3+1, 40, 600*kib)
	for _, c := range []struct{ name, sum string }{
		{"vhdx", "fdb158011400fa10e97e23908b45e782d4a10ca988c4fa15a2d73a4ffd83fe23"},
		{"vmdk", "a013459c6bfca498ce17cfd10e0aeae669622bf195fabf4d4199d2954feb981a"},
		{"qcow2", "b33da9d6ab446cf983219c574c23fee7a3f41f27ef8f71b2ed66b62001160c93"},
	} {
		var file File
		var err error
		switch c.name {
		case "vhdx":
			file, err = VHDX(disk, testID)
		case "vmdk":
			file, err = SparseVMDK(disk, testID, "disk.vmdk")
		case "qcow2":
			file, err = QCOW2(disk)
		}
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, file.Size())
		file.ReadAt(b, 0)
		if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != c.sum {
			t.Errorf("%s: %x", c.name, sum)
		}
	}
}
