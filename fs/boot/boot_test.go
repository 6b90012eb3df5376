package boot

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"
	"time"
)

func TestParseVMX(t *testing.T) {
	h := ParseVMX([]byte(`.encoding = "UTF-8"
firmware = "efi"
memsize = "8192"
numvcpus = "6"
uuid.bios = "56 4d aa bb cc dd ee ff-00 11 22 33 44 55 66 77"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.fileName = "web.vmdk"
scsi0:0.present = "TRUE"
sata0:0.deviceType = "cdrom-image"
sata0:0.fileName = "/iso/debian.iso"
nvme0:1.fileName = "/vmfs/volumes/x/data.vmdk"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.generatedAddress = "00:0c:29:11:22:33"
ethernet1.present = "FALSE"
`))
	if h.Firmware != UEFI || h.Memory != 8<<30 || h.CPUs != 6 || h.UUID != "564daabb-ccdd-eeff-0011-223344556677" {
		t.Errorf("%+v", h)
	}
	for key, want := range map[string]Bus{"web.vmdk": PVSCSI, "data.vmdk": NVMe, `C:\x\data.vmdk`: NVMe, "unknown": PVSCSI} {
		if got := h.Bus(key); got != want {
			t.Errorf("%s is on %q, want %q", key, got, want)
		}
	}
	if want := []NIC{{Model: "vmxnet3", MAC: "00:0c:29:11:22:33", Network: "none"}}; !reflect.DeepEqual(h.NICs, want) {
		t.Errorf("cards: %+v", h.NICs)
	}
	if h := ParseVMX([]byte("not a vmx")); h.Firmware != "" || h.Bus("x") != "" {
		t.Errorf("of nothing: %+v", h)
	}
}

// TestDetectFirmware looks at disks as installers make them.
func TestDetectFirmware(t *testing.T) {
	mbr := func(code bool, kinds ...byte) []byte {
		b := make([]byte, 64<<10)
		if code {
			b[0] = 0xeb
		}
		for i, k := range kinds {
			b[446+16*i+4] = k
		}
		b[510], b[511] = 0x55, 0xaa
		return b
	}
	gpt := func(code bool, sector int, types ...[16]byte) []byte {
		b := mbr(code, 0xee)
		h := b[sector:]
		copy(h, "EFI PART")
		binary.LittleEndian.PutUint64(h[72:], 2)
		binary.LittleEndian.PutUint32(h[80:], 128)
		binary.LittleEndian.PutUint32(h[84:], 128)
		for i, g := range types {
			copy(b[2*sector+128*i:], g[:])
		}
		return b
	}
	linux := [16]byte{0xaf, 0x3d}
	for name, c := range map[string]struct {
		disk []byte
		want Firmware
	}{
		"nothing":                           {nil, BIOS},
		"zeros":                             {make([]byte, 4096), BIOS},
		"MBR":                               {mbr(true, 0x83), BIOS},
		"MBR with an ESP, no code":          {mbr(false, 0xef, 0x83), UEFI},
		"MBR with an ESP and code":          {mbr(true, 0xef, 0x83), BIOS},
		"GPT, UEFI alone":                   {gpt(false, 512, espGUID, linux), UEFI},
		"GPT, UEFI, code that is no loader": {gpt(true, 512, espGUID, linux), UEFI},
		"GPT, both":                         {gpt(true, 512, biosGUID, espGUID, linux), BIOS},
		"GPT, BIOS alone":                   {gpt(true, 512, biosGUID, linux), BIOS},
		"GPT, sectors of 4096":              {gpt(false, 4096, linux, espGUID), UEFI},
		"GPT without an ESP":                {gpt(false, 512, linux), BIOS},
	} {
		if got, err := DetectFirmware(bytes.NewReader(c.disk)); err != nil || got != c.want {
			t.Errorf("%s: %v, %v; want %v", name, got, err, c.want)
		}
	}
	// A table that points anywhere is no reason to panic.
	for _, at := range []uint64{0, 1 << 20, 1 << 63, ^uint64(0)} {
		b := gpt(false, 512, espGUID)
		binary.LittleEndian.PutUint64(b[512+72:], at)
		if _, err := DetectFirmware(bytes.NewReader(b)); err != nil {
			t.Errorf("entries at %d: %v", at, err)
		}
	}
}

func TestTouched(t *testing.T) {
	list := []touched{{0, 5}, {0, 6}, {1, 1 << 40}, {0, 0}}
	got, chunk, err := decodeTouched(encodeTouched(list, 128<<10))
	if err != nil || chunk != 128<<10 || !reflect.DeepEqual(got, list) {
		t.Errorf("%v %d %v", got, chunk, err)
	}
	r := &recorder{until: time.Now().Add(time.Hour), seen: map[touched]bool{}}
	r.touch(0, 3, 5)
	r.touch(0, 4, 6)
	if want := []touched{{0, 3}, {0, 4}, {0, 5}, {0, 6}}; !reflect.DeepEqual(r.touches(), want) {
		t.Errorf("recorded %v", r.touches())
	}
}

func FuzzTouched(f *testing.F) {
	f.Add(encodeTouched([]touched{{0, 5}, {3, 1}}, 4096))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, chunk, err := decodeTouched(b)
		if err != nil {
			return
		}
		again, c, err := decodeTouched(encodeTouched(list, chunk))
		if err != nil || c != chunk || !reflect.DeepEqual(again, list) {
			t.Errorf("%v became %v, %v", list, again, err)
		}
	})
}

func TestParseSign(t *testing.T) {
	for text, ok := range map[string]bool{"": true, "auto": true, "agent": true, "serial:login:": true, "serial:(": false,
		"serial:": false, "screen": true, "screen:5s": true, "screen:5": false, "screen:1ms": false, "ping": false} {
		if _, err := ParseSign(text); (err == nil) != ok {
			t.Errorf("%q: %v", text, err)
		}
	}
	if s := DefaultSign(); !s.Serial.MatchString("debian login: ") || !s.Agent || s.Still != 0 {
		t.Errorf("%+v", s)
	}
}
