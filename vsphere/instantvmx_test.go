package vsphere

import (
	"strings"
	"testing"
)

// A .vmx as ESXi writes it: three disks, one of them not in the point and called like one that is, a CD-ROM, a serial port, two cards.
const someVMX = `.encoding = "UTF-8"
config.version = "8"
displayName = "web |22one|22"
nvram = "web.nvram"
ctkEnabled = "TRUE"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web-000002.vmdk"
scsi0:0.ctkEnabled = "TRUE"
scsi0:0.redo = ""
scsi0:1.present = "TRUE"
scsi0:1.fileName = "disk1.vmdk"
scsi0:1.mode = "independent-persistent"
SCSI0:2.present = "TRUE"
scsi0:2.fileName = "/vmfs/volumes/5e/web/web_1.vmdk"
sata0.present = "TRUE"
sata0:0.present = "TRUE"
sata0:0.deviceType = "cdrom-image"
sata0:0.fileName = "/vmfs/volumes/iso/debian.iso"
serial0.present = "TRUE"
serial0.fileName = "x"
ethernet0.present = "TRUE"
ethernet0.networkName = "VM Network"
ethernet0.addressType = "vpx"
ethernet0.generatedAddress = "00:50:56:01:02:03"
ethernet1.present = "TRUE"
ethernet1.dvs.switchId = "50 1f"
ethernet1.dvs.portId = "12"
ethernet1.dvs.portgroupId = "dvportgroup-12"
ethernet1.dvs.connectionId = "99"
ethernet1.address = "00:11:22:33:44:55"
uuid.bios = "56 4d"
uuid.location = "56 4d"
vc.uuid = "50 2a"
sched.swap.derivedName = "/vmfs/volumes/5e/web/web.vswp"
guestinfo.note = "a = |22b|22"
`

const someMapping = `[{"disk":"disk0","controller":"pvscsi","bus":0,"unit":0},{"skipped":"is independent","controller":"pvscsi","bus":0,"unit":1},{"disk":"disk1","controller":"pvscsi","bus":0,"unit":2}]`

func TestInstantVMX(t *testing.T) {
	v := InstantVM{Name: `web "two"`, VMX: []byte(someVMX), Mapping: []byte(someMapping), Disks: []string{"disk0", "disk1"}}
	text, warnings, err := v.Text()
	if err != nil {
		t.Fatal(err)
	}
	got := string(text)
	for _, want := range []string{
		`displayName = "web |22two|22"`, `nvram = "vm.nvram"`, `scsi0:0.fileName = "disk0.vmdk"`, `scsi0:2.fileName = "disk1.vmdk"`,
		`guestinfo.note = "a = |22b|22"`, `ethernet0.startConnected = "FALSE"`, `ethernet1.startConnected = "FALSE"`, `ethernet0.networkName = "VM Network"`,
		`ethernet1.dvs.portgroupId = "dvportgroup-12"`, `uuid.action = "create"`, `sata0.present = "TRUE"`, `ethernet0.addressType = "generated"`,
	} {
		if strings.Count(got, want+"\n") != 1 {
			t.Errorf("there is not one line %s", want)
		}
	}
	for _, not := range []string{"ctkEnabled", "redo", "scsi0:1", "sata0:0", "serial0", "portId", "connectionId", "generatedAddress", "00:11:22", "uuid.bios", "vc.uuid", "swap", "vmfs"} {
		if strings.Contains(got, not) {
			t.Errorf("%s is still there", not)
		}
	}
	if len(warnings) != 3 || !strings.Contains(warnings[0], "scsi0:1 (disk1.vmdk)") || !strings.Contains(warnings[1], "debian.iso") || !strings.Contains(warnings[2], "serial0") {
		t.Errorf("warnings %q", warnings)
	}
	if t.Failed() {
		t.Log(got)
	}
	v.KeepIdentity, v.Connect, v.Network = true, true, "lab"
	if text, _, err = v.Text(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`uuid.bios = "56 4d"`, `uuid.action = "keep"`, `ethernet0.generatedAddress = "00:50:56:01:02:03"`, `ethernet1.address = "00:11:22:33:44:55"`,
		`ethernet0.startConnected = "TRUE"`, `ethernet0.networkName = "lab"`, `ethernet1.networkName = "lab"`} {
		if !strings.Contains(string(text), want+"\n") {
			t.Errorf("with its identity there is no line %s", want)
		}
	}
	if strings.Contains(string(text), "dvs") {
		t.Error("it is plugged into two networks")
	}
}

func TestInstantVMXRefused(t *testing.T) {
	for _, c := range []struct{ vmx, mapping, want string }{
		{someVMX + "encryption.keySafe = \"x\"\n", someMapping, "encrypted"},
		{someVMX, `[]`, "does not say what disk0 was"},
		{someVMX, strings.ReplaceAll(someMapping, `"unit":2`, `"unit":5`), "no scsi0:5"},
		{someVMX, `x`, "disks.json"},
	} {
		v := InstantVM{Name: "x", VMX: []byte(c.vmx), Mapping: []byte(c.mapping), Disks: []string{"disk0", "disk1"}}
		if _, _, err := v.Text(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// TestVMXQuoting: what is written is read back, and what is odd does no harm.
func TestVMXQuoting(t *testing.T) {
	x := parseVMX(nil)
	for _, v := range []string{"", `"`, "|", "|22", "a\nb\r\n", "ü|zz", "|2", "="} {
		x.set("Key", v)
		if got := parseVMX(x.text()).get("kEY"); got != v {
			t.Errorf("%q is read as %q", v, got)
		}
	}
	if x := parseVMX([]byte("a\nb = c\n# d = \"e\"\n= \"f\"\ng = \"\"\nh=\"i|\"\n")); len(x.keys) != 2 || x.get("h") != "i|" {
		t.Errorf("%+v", x)
	}
}
