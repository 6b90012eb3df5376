package guesttest

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode/utf16"

	"golang.org/x/sys/unix"
)

// The disks that Windows makes: one with an MBR and one with a GPT, partitions at these MiB.
const (
	WindowsSignature                  = 0xdeadbeef
	reservedAt, reservedLen           = 1, 16
	WindowsSystemAt, WindowsSystemLen = 17, 48
	WindowsLogicalAt, logicalLen      = 70, 24
	dataAt, dataLen                   = 1, 32
	folderAt, folderLen               = 33, 24
	WindowsDataGUID                   = "01234567-89AB-CDEF-0123-456789ABCDEF"
	WindowsFolderGUID                 = "11111111-2222-3333-4444-555555555555"
	WindowsGoneGUID                   = "77777777-2222-3333-4444-555555555555"
	volumeGUID                        = "{aaaaaaaa-0000-11ee-8000-00155d010203}"
	otherGUID                         = "{bbbbbbbb-0000-11ee-8000-00155d010203}"
)

func utf(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// MBRDevice is what MountedDevices has of a partition that begins there.
func MBRDevice(signature uint32, mib int64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint32(nil, signature), uint64(mib<<20))
}

// GPTDevice writes a GUID as Windows does: the first three fields little-endian.
func GPTDevice(t *testing.T, guid string) []byte {
	t.Helper()
	var a uint32
	var b, c uint16
	var d, e []byte
	if _, err := fmt.Sscanf(guid, "%8x-%4x-%4x-%4x-%12x", &a, &b, &c, &d, &e); err != nil {
		t.Fatal(err)
	}
	out := binary.LittleEndian.AppendUint32([]byte("DMIO:ID:"), a)
	out = binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(out, b), c)
	return append(append(out, d...), e...)
}

// MakeDrive makes an NTFS at a place of a disk, filled by ntfs-3g: name => content, "junction " and a target for a mount point.
func MakeDrive(t *testing.T, disk string, at, size int64, files map[string]string) {
	t.Helper()
	image := Sparse(t, size<<20)
	Run(t, "mkntfs", "-q", "-F", image)
	dir, unmount := MountNTFS(t, image, "")
	for name, content := range files {
		target, junction := strings.CutPrefix(content, "junction ")
		p := dir + "/" + name
		above := p
		if !junction {
			above = p[:strings.LastIndexByte(p, '/')]
		}
		err := os.MkdirAll(above, 0o755)
		switch {
		case err != nil:
		case junction:
			err = unix.Lsetxattr(p, "system.ntfs_reparse_data", junctionData(target), 0)
		default:
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	unmount()
	Run(t, "dd", "if="+image, "of="+disk, "bs=1M", fmt.Sprint("seek=", at), "conv=notrunc,sparse", "status=none")
}

// junctionData is a mount point ([MS-FSCC] §2.1.2.5).
func junctionData(target string) []byte {
	le := binary.LittleEndian
	name := utf(target)
	n := uint16(len(name))
	b := le.AppendUint16(le.AppendUint32(nil, 0xa0000003), n+12)
	for _, v := range []uint16{0, 0, n, n + 2, 0} {
		b = le.AppendUint16(b, v)
	}
	return append(append(b, name...), 0, 0, 0, 0)
}

// Windows makes the disks of a machine with Windows. The names of its folders are written as config says.
func Windows(t *testing.T, config string, devices []HiveValue) (first, second string) {
	t.Helper()
	Needs(t, "mkntfs", "ntfs-3g", "sfdisk", "sgdisk", "dd")
	for i := range devices {
		devices[i].Key, devices[i].Type = "MountedDevices", 3
	}
	hive, err := os.ReadFile(Hive(t, append(devices, HiveValue{Key: `Select`, Name: "Current", Type: 4, Data: []byte{1, 0, 0, 0}})))
	if err != nil {
		t.Fatal(err)
	}
	a, b := Sparse(t, 100<<20), Sparse(t, 64<<20)
	Input(t, fmt.Sprintf("label: dos\nlabel-id: %#x\nstart=%dMiB, size=%dMiB, type=7\nstart=%dMiB, size=%dMiB, type=7\nstart=%dMiB, size=30MiB, type=5\nstart=%dMiB, size=%dMiB, type=7\n",
		WindowsSignature, reservedAt, reservedLen, WindowsSystemAt, WindowsSystemLen, WindowsLogicalAt-1, WindowsLogicalAt, logicalLen), "sfdisk", "-q", a)
	Run(t, "sgdisk", "-a1", fmt.Sprintf("-n1:%dM:+%dM", dataAt, dataLen), "-t1:0700", "-u1:"+WindowsDataGUID,
		fmt.Sprintf("-n2:%dM:+%dM", folderAt, folderLen), "-t2:0700", "-u2:"+WindowsFolderGUID, b)
	MakeDrive(t, a, reservedAt, reservedLen, map[string]string{"bootmgr": "boot"})
	MakeDrive(t, a, WindowsSystemAt, WindowsSystemLen, map[string]string{
		config: string(hive), "Users/me/file": "on C", "mnt/folder": `junction \??\Volume` + otherGUID + `\`,
		"mnt/gone": `junction \??\Volume{cccccccc-0000-11ee-8000-00155d010203}\`, "Documents and Settings": `junction \??\C:\Users`,
	})
	MakeDrive(t, a, WindowsLogicalAt, logicalLen, map[string]string{"logical": "on L"})
	MakeDrive(t, b, dataAt, dataLen, map[string]string{"data/file": "on D", "self": `junction \??\Volume` + volumeGUID + `\`})
	MakeDrive(t, b, folderAt, folderLen, map[string]string{"deep/file": "in a folder", "back": `junction \??\Volume` + volumeGUID + `\`,
		"data": `junction \??\Volume{dddddddd-0000-11ee-8000-00155d010203}\`})
	return a, b
}

// WindowsDevices are what MountedDevices says of these disks.
func WindowsDevices(t *testing.T) []HiveValue {
	return []HiveValue{
		{Name: `\DosDevices\C:`, Data: MBRDevice(WindowsSignature, WindowsSystemAt)},
		{Name: `\DosDevices\L:`, Data: MBRDevice(WindowsSignature, WindowsLogicalAt)},
		{Name: `\DosDevices\D:`, Data: GPTDevice(t, WindowsDataGUID)},
		{Name: `\DosDevices\E:`, Data: utf(`\??\SCSI#CdRom&Ven_QEMU&Prod_QEMU_DVD-ROM#4&0#{53f5630d-b6bf-11d0-94f2-00a0c91efb8b}`)},
		{Name: `\DosDevices\F:`, Data: utf(`_??_USBSTOR#Disk&Ven_Generic#{53f56307-b6bf-11d0-94f2-00a0c91efb8b}`)},
		{Name: `\DosDevices\G:`, Data: MBRDevice(0x11223344, 1)},
		{Name: `\DosDevices\H:`, Data: GPTDevice(t, WindowsGoneGUID)},
		{Name: `\DosDevices\I:`, Data: []byte("something new")},
		{Name: `\??\Volume{dddddddd-0000-11ee-8000-00155d010203}`, Data: GPTDevice(t, WindowsDataGUID)},
		{Name: `\??\Volume` + volumeGUID, Data: MBRDevice(WindowsSignature, WindowsSystemAt)},
		{Name: `\??\Volume` + strings.ToUpper(otherGUID), Data: GPTDevice(t, WindowsFolderGUID)},
	}
}
