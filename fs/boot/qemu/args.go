package qemu

import (
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/boot"
)

// arguments is QEMU's command line.
func (h *Host) arguments(s *boot.State) ([]string, error) {
	m := &s.Machine
	accel := h.accel()
	a := []string{
		"-nodefaults", "-no-user-config",
		"-name", "guest=" + comma(m.Name) + ",process=holdfast-boot",
		"-uuid", m.UUID,
		"-machine", "q35,accel=" + accel,
		"-smp", strconv.Itoa(m.CPUs), "-m", strconv.FormatInt(m.Memory>>20, 10),
		"-rtc", "base=utc",
		"-qmp", "unix:" + comma(s.File(MonitorSocket)) + ",server=on,wait=off",
		"-chardev", "socket,id=serial0,server=on,wait=off,path=" + comma(s.File(SerialSocket)) + ",logappend=on,logfile=" + comma(s.File(boot.SerialLog)),
		"-serial", "chardev:serial0",
		"-chardev", "socket,id=agent0,server=on,wait=off,path=" + comma(s.File(AgentSocket)),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent0,name=org.qemu.guest_agent.0",
		"-display", "none", "-vga", "std",
		"-device", "qemu-xhci", "-device", "usb-tablet", "-device", "usb-kbd",
	}
	if accel == "kvm" {
		a = append(a, "-cpu", "host")
	} else {
		a = append(a, "-cpu", "max")
	}
	screen, err := vnc(s)
	if err != nil {
		return nil, err
	}
	a = append(a, "-vnc", screen)
	if m.Firmware == boot.UEFI {
		code, err := h.code()
		if err != nil {
			return nil, err
		}
		a = append(a, "-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+comma(code),
			"-drive", "if=pflash,unit=1,format=raw,file="+comma(s.File(boot.NVRAMFile)))
	}
	disks, err := diskArguments(s)
	if err != nil {
		return nil, err
	}
	a = append(a, disks...)
	nics, err := nicArguments(m.NICs)
	if err != nil {
		return nil, err
	}
	return append(append(a, nics...), h.Extra...), nil
}

// comma quotes a value inside an option: qemu(1), commas are doubled.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// vnc is where the screen is shown.
func vnc(s *boot.State) (string, error) {
	if s.Machine.VNC == "" {
		return "unix:" + comma(s.File(ScreenSocket)), nil
	}
	host, port, err := net.SplitHostPort(s.Machine.VNC)
	n, nerr := strconv.Atoi(port)
	if err != nil || nerr != nil || n < 5900 || n > 65535 {
		return "", fmt.Errorf("VNC address %q: want HOST:PORT with a port from 5900 on", s.Machine.VNC)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return fmt.Sprintf("%s:%d", host, n-5900), nil
}

// object is a JSON object for -blockdev and -device.
type object map[string]any

func (o object) text() string {
	b, _ := json.Marshal(o)
	return string(b)
}

func diskArguments(s *boot.State) ([]string, error) {
	var a []string
	controllers := map[boot.Bus]int{} // units taken
	for i, d := range s.Machine.Disks {
		a = append(a, "-blockdev", blockdev(s, d).text())
		unit := controllers[d.Bus]
		controllers[d.Bus]++
		dev := object{"drive": d.Name, "id": "dev-" + d.Name, "bootindex": i + 1, "serial": fmt.Sprintf("HF%s%d", s.ID, i)}
		add := func(kind string, more object) {
			dev["driver"] = kind
			for k, v := range more {
				dev[k] = v
			}
		}
		scsi := func(controller string) {
			id := fmt.Sprintf("%s%d", controller, unit/7) // a parallel bus has seven
			if unit%7 == 0 {
				a = append(a, "-device", object{"driver": controller, "id": id}.text())
			}
			add("scsi-hd", object{"bus": id + ".0", "scsi-id": unit % 7})
		}
		switch d.Bus {
		case boot.SATA: // q35 has one controller of six
			id := "ide"
			if unit >= 6 {
				id = fmt.Sprintf("ahci%d", unit/6)
				if unit%6 == 0 {
					a = append(a, "-device", object{"driver": "ahci", "id": id}.text())
				}
			}
			add("ide-hd", object{"bus": fmt.Sprintf("%s.%d", id, unit%6)})
		case boot.IDE:
			if unit == 0 {
				a = append(a, "-device", object{"driver": "piix3-ide", "id": "pata"}.text())
			}
			if unit > 3 {
				return nil, fmt.Errorf("an IDE controller has four disks, not %d", unit+1)
			}
			add("ide-hd", object{"bus": fmt.Sprintf("pata.%d", unit/2), "unit": unit % 2})
		case boot.NVMe:
			add("nvme", nil)
		case boot.VirtIO:
			add("virtio-blk-pci", nil)
		case boot.VirtIOSCSI:
			scsi("virtio-scsi-pci")
		case boot.PVSCSI:
			scsi("pvscsi")
		case boot.LSISAS:
			scsi("mptsas1068")
		default:
			return nil, fmt.Errorf("bus %q is not known", d.Bus)
		}
		a = append(a, "-device", dev.text())
	}
	return a, nil
}

// blockdev is where a disk is.
func blockdev(s *boot.State, d boot.Disk) object {
	file := object{
		"driver": "nbd", "export": d.Name, "reconnect-delay": reconnect,
		"server": object{"type": "unix", "path": s.File(boot.NBDSocket)},
	}
	if d.File != "" {
		file = object{"driver": "file", "filename": d.File, "discard": "unmap"}
	}
	return object{"driver": "raw", "node-name": d.Name, "discard": "unmap", "detect-zeroes": "unmap", "file": file}
}

func nicArguments(nics []boot.NIC) ([]string, error) {
	models := map[string]string{"": "virtio-net-pci", "virtio": "virtio-net-pci", "e1000": "e1000", "e1000e": "e1000e", "vmxnet3": "vmxnet3"}
	var a []string
	for i, n := range nics {
		model, ok := models[n.Model]
		if !ok {
			return nil, fmt.Errorf("network card %q is not known", n.Model)
		}
		dev := object{"driver": model, "id": fmt.Sprintf("nic%d", i)}
		if n.MAC != "" {
			dev["mac"] = n.MAC
		}
		id := fmt.Sprintf("net%d", i)
		switch kind, name, _ := strings.Cut(n.Network, ":"); {
		case n.Network == "none" || n.Network == "":
			// A card whose cable is not plugged in.
			a = append(a, "-netdev", object{"type": "hubport", "id": id, "hubid": i}.text())
		case n.Network == "user":
			a = append(a, "-netdev", object{"type": "user", "id": id}.text())
		case kind == "bridge" && name != "":
			a = append(a, "-netdev", object{"type": "bridge", "id": id, "br": name}.text())
		default:
			return nil, fmt.Errorf("network %q: want none, user or bridge:NAME", n.Network)
		}
		dev["netdev"] = id
		a = append(a, "-device", dev.text())
	}
	return a, nil
}
