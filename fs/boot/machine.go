package boot

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/store"
)

// Defaults of a machine of which nothing is known.
const (
	defaultMemory = 2 << 30 // bytes
	defaultCPUs   = 2
	maxCPUs       = 64
)

// Hints is what the configuration of a point says of its VM; zero where it says nothing.
type Hints struct {
	Firmware Firmware
	Memory   int64 // bytes
	CPUs     int
	UUID     string
	NICs     []NIC
	buses    map[string]Bus // base name of a disk's file => its bus
	bus      Bus            // of the first controller
}

// Bus is that of a disk by its key, the name of its file at the source; empty when unknown.
func (h *Hints) Bus(key string) Bus {
	if b, ok := h.buses[baseName(key)]; ok {
		return b
	}
	return h.bus
}

func baseName(path string) string { return path[strings.LastIndexAny(path, `/\`)+1:] }

// ParseVMX reads a VMware configuration file: lines of key = "value", of which the last one counts.
func ParseVMX(text []byte) Hints {
	v := map[string]string{}
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		key, value, ok := strings.Cut(s.Text(), "=")
		if ok && !strings.HasPrefix(strings.TrimSpace(key), "#") {
			v[strings.ToLower(strings.TrimSpace(key))] = strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	h := Hints{Firmware: BIOS, buses: map[string]Bus{}}
	if len(v) == 0 {
		return Hints{}
	}
	if v["firmware"] == "efi" {
		h.Firmware = UEFI
	}
	if n, err := strconv.ParseInt(v["memsize"], 10, 64); err == nil && n > 0 && n <= 1<<24 {
		h.Memory = n << 20
	}
	if n, err := strconv.Atoi(v["numvcpus"]); err == nil && n > 0 {
		h.CPUs = min(n, maxCPUs)
	}
	h.UUID = vmxUUID(v["uuid.bios"])
	for _, kind := range []string{"scsi", "sata", "nvme", "ide"} {
		for controller := range 4 {
			name := kind + strconv.Itoa(controller)
			bus := vmxBus(kind, v[name+".virtualdev"])
			for unit := range 64 {
				at := fmt.Sprintf("%s:%d.", name, unit)
				if file := v[at+"filename"]; file != "" && !strings.EqualFold(v[at+"present"], "false") && !strings.Contains(v[at+"devicetype"], "cdrom") {
					h.buses[baseName(file)] = bus
					if h.bus == "" {
						h.bus = bus
					}
				}
			}
		}
	}
	for i := range 10 {
		at := fmt.Sprintf("ethernet%d.", i)
		if !strings.EqualFold(v[at+"present"], "true") {
			continue
		}
		n := NIC{Model: "e1000", MAC: v[at+"address"], Network: "none"}
		if n.MAC == "" {
			n.MAC = v[at+"generatedaddress"]
		}
		if dev := v[at+"virtualdev"]; dev == "vmxnet3" || dev == "e1000e" {
			n.Model = dev
		}
		h.NICs = append(h.NICs, n)
	}
	return h
}

// vmxBus is what comes nearest to a controller of VMware. Parallel SCSI has no likeness
// that guests have a driver for: their disks are shown as SATA.
func vmxBus(kind, device string) Bus {
	switch {
	case kind == "nvme":
		return NVMe
	case kind == "ide":
		return IDE
	case kind == "scsi" && device == "pvscsi":
		return PVSCSI
	case kind == "scsi" && device == "lsisas1068":
		return LSISAS
	}
	return SATA
}

// vmxUUID turns "56 4d … -… 01" into the usual form; empty when it is none.
func vmxUUID(s string) string {
	hex := strings.NewReplacer(" ", "", "-", "").Replace(s)
	if len(hex) != 32 || strings.Trim(strings.ToLower(hex), "0123456789abcdef") != "" {
		return ""
	}
	return hex[:8] + "-" + hex[8:12] + "-" + hex[12:16] + "-" + hex[16:20] + "-" + hex[20:]
}

// NewMachine makes a machine of what is known of a point's VM: its configuration, and its first disk where that
// says nothing. It has no disks yet.
func NewMachine(p *store.Point, h Hints, first io.ReaderAt) (Machine, error) {
	m := Machine{Name: p.VM.Name, UUID: h.UUID, Firmware: h.Firmware, Memory: h.Memory, CPUs: h.CPUs, NICs: h.NICs}
	if m.Memory == 0 {
		m.Memory = defaultMemory
	}
	if m.CPUs == 0 {
		m.CPUs = defaultCPUs
	}
	if m.UUID == "" {
		m.UUID = uuidOf(p.VM)
	}
	if m.Firmware == "" {
		kind, err := DetectFirmware(first)
		if err != nil {
			return m, err
		}
		m.Firmware = kind
	}
	return m, nil
}

// uuidOf is the same for one VM at every boot: licences hang on it.
func uuidOf(vm store.VM) string {
	if len(vm.UUID) == 36 {
		return vm.UUID
	}
	b := sha256.Sum256([]byte("holdfast boot\x00" + vm.Source + "\x00" + vm.Name))
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80 // RFC 9562 §5.8
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// Types of partitions.
var (
	espGUID  = [16]byte{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b} // UEFI 2.10 §5.3.3
	biosGUID = [16]byte{0x48, 0x61, 0x68, 0x21, 0x49, 0x64, 0x6f, 0x6e, 0x74, 0x4e, 0x65, 0x65, 0x64, 0x45, 0x46, 0x49} // GRUB's BIOS boot partition
)

// DetectFirmware looks at the beginning of a disk: UEFI when it has an EFI system partition and nothing
// that a BIOS could start, else BIOS.
func DetectFirmware(disk io.ReaderAt) (Firmware, error) {
	b := make([]byte, 64<<10)
	n, err := disk.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	b = b[:n]
	if n < 512 || b[510] != 0x55 || b[511] != 0xaa {
		return BIOS, nil
	}
	code := len(bytes.Trim(b[:440], "\x00")) > 0 // of the master boot record
	esp, bios := false, code
	for i := range 4 {
		switch b[446+16*i+4] {
		case 0xef:
			esp = true
		case 0xee: // protects a GPT
			gptESP, gptBIOS := gptTypes(b)
			esp, bios = esp || gptESP, code && gptBIOS
		}
	}
	if esp && !bios {
		return UEFI, nil
	}
	return BIOS, nil
}

// gptTypes looks for partitions in a GPT, with sectors of 512 or 4096 bytes.
func gptTypes(b []byte) (esp, bios bool) {
	for _, sector := range []int{512, 4096} {
		if len(b) < 2*sector || string(b[sector:sector+8]) != "EFI PART" {
			continue
		}
		h := b[sector:]
		at := binary.LittleEndian.Uint64(h[72:]) * uint64(sector)
		count, size := binary.LittleEndian.Uint32(h[80:]), binary.LittleEndian.Uint32(h[84:])
		if size < 128 || size > 4096 {
			return false, false
		}
		for i := uint64(0); i < uint64(min(count, 1024)) && at <= uint64(len(b)) && at+i*uint64(size)+16 <= uint64(len(b)); i++ {
			switch [16]byte(b[at+i*uint64(size):]) {
			case espGUID:
				esp = true
			case biosGUID:
				bios = true
			}
		}
		return esp, bios
	}
	return false, false
}
