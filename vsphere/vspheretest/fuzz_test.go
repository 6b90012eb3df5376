package vspheretest

import (
	"strings"
	"testing"
)

// A configuration file may say anything.
func FuzzParseVMX(f *testing.F) {
	f.Add("displayName = \"a\"\nscsi0.present = \"TRUE\"\nscsi0:0.fileName = \"x.vmdk\"\n")
	f.Add("displayName = \"|22|0A|7\"\nethernet9.present = \"TRUE\"\nuuid.bios = \"00 11\"\n")
	f.Add("sata99999999999999999999.present = \"TRUE\"\ndisplayName=\"x\"")
	dir := &directory{datastore: "ds", root: f.TempDir(), path: "vm"}
	f.Fuzz(func(t *testing.T, text string) {
		spec, err := dir.parseVMX(text)
		if err == nil && spec.Name == "" {
			t.Error("a VM without a name")
		}
	})
}

// A name with everything in it comes back from the file.
func FuzzEscapeVMX(f *testing.F) {
	f.Add("a \"b\" |c\r\n")
	f.Fuzz(func(t *testing.T, text string) {
		if strings.ContainsAny(text, "\x00") {
			return
		}
		kv := parseVMXText("displayName = \"" + escapeVMX(text) + "\"\n")
		if kv["displayname"] != text {
			t.Errorf("%q came back as %q", text, kv["displayname"])
		}
	})
}
