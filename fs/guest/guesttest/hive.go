package guesttest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// HiveValue is a value of a Windows registry hive, or only a key when Type is KeyOnly.
type HiveValue struct {
	Key  string // names with backslashes between them
	Name string
	Type uint32
	Data []byte
}

// KeyOnly is no type: the key has no value of that name.
const KeyOnly = ^uint32(0)

// Hive makes a hive by hivex, a file in a directory of the test. It skips the test when hivex is not there.
func Hive(t testing.TB, values []HiveValue) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "hive")
	if err := os.WriteFile(image, emptyHive(), 0o644); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	hivex(t, string(text), `
import base64, hivex, json, sys
h = hivex.Hivex(sys.argv[1], write=True)
nodes, values = {"": h.root()}, {}
def node(path):
    if path not in nodes:
        above, _, name = path.rpartition("\\")
        nodes[path] = h.node_add_child(node(above), name)
    return nodes[path]
for v in json.load(sys.stdin):
    list = values.setdefault(node(v["Key"]), [])
    if v["Type"] != 0xffffffff:
        list.append({"key": v["Name"], "t": v["Type"], "value": base64.b64decode(v["Data"] or "")})
for n, list in values.items():
    h.node_set_values(n, list)
h.commit(None)
`, image)
	return image
}

// HiveDump gives what hivex reads in a hive: for each key, and each value, a line of JSON that begins with the path as a list.
func HiveDump(t testing.TB, image string) string {
	t.Helper()
	return hivex(t, "", `
import hashlib, hivex, json, sys
h = hivex.Hivex(sys.argv[1])
def text(f, of):
    try:
        return f(of)
    except UnicodeDecodeError:
        return "?"
def dump(node, path):
    print(json.dumps([path, h.node_timestamp(node)]))
    for v in h.node_values(node):
        t, data = h.value_value(v)
        print(json.dumps([path, h.value_key(v), t, len(data), hashlib.sha256(data).hexdigest()]))
    for c in h.node_children(node):
        dump(c, path + [h.node_name(c)])
sys.setrecursionlimit(5000)
dump(h.root(), [])
`, image)
}

func hivex(t testing.TB, input, script, image string) string {
	t.Helper()
	const python = "/usr/bin/python3" // Debian's, which has its packages
	if err := exec.Command(python, "-c", "import hivex").Run(); err != nil {
		if os.Getenv("HOLDFAST_TEST_ALL") != "" {
			t.Fatal("needs python3-hivex")
		}
		t.Skip("needs python3-hivex")
	}
	cmd := exec.Command(python, "-c", script, image)
	cmd.Stdin = bytes.NewReader([]byte(input))
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("hivex: %v\n%s", err, said.Bytes())
	}
	return string(out)
}

// emptyHive is a hive with a root key and a security descriptor, as hivex wants one to begin with.
func emptyHive() []byte {
	le := binary.LittleEndian
	b := make([]byte, 8192)
	bins := b[4096:]
	const root, security, free = 0x20, 0x78, 0xa8
	copy(bins, "hbin")
	le.PutUint32(bins[8:], 4096)
	for at, size := range map[int]int32{root: root - security, security: security - free, free: 4096 - free} {
		le.PutUint32(bins[at:], uint32(size))
	}
	nk := bins[root+4:]
	copy(nk, "nk\x2c\x00")
	for _, at := range []int{28, 32, 40, 48} { // lists, class: none
		le.PutUint32(nk[at:], 0xffffffff)
	}
	le.PutUint32(nk[44:], security)
	nk[72] = byte(copy(nk[76:], "root"))
	sk := bins[security+4:]
	copy(sk, "sk")
	le.PutUint32(sk[4:], security)
	le.PutUint32(sk[8:], security)
	le.PutUint32(sk[12:], 1)
	le.PutUint32(sk[16:], 20)
	copy(sk[20:], "\x01\x00\x00\x80") // a descriptor that has nothing in it
	SealHive(b, 5, root, 4096)
	return b
}

// SealHive writes the base block of a hive of the format 1.minor.
func SealHive(b []byte, minor, root, bins uint32) {
	le := binary.LittleEndian
	copy(b, "regf")
	for at, v := range map[int]uint32{4: 1, 8: 1, 20: 1, 24: minor, 32: 1, 36: root, 40: bins, 44: 1} {
		le.PutUint32(b[at:], v)
	}
	SumHive(b)
}

// SumHive puts the checksum of a base block right.
func SumHive(b []byte) {
	var sum uint32
	for i := 0; i < 508; i += 4 {
		sum ^= binary.LittleEndian.Uint32(b[i:])
	}
	binary.LittleEndian.PutUint32(b[508:], sum)
}
