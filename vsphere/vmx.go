package vsphere

import (
	"fmt"
	"strconv"
	"strings"
)

// vmx is a .vmx file: lines of key = "value". Keys know no upper case; a " in a value, and what ends a line, is | with two hexadecimal digits.
type vmx struct {
	keys   []string // as they stand in the file, in its order
	values map[string]string
}

func parseVMX(text []byte) *vmx {
	x := &vmx{values: map[string]string{}}
	for line := range strings.Lines(string(text)) {
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || key == "" || key[0] == '#' || len(value) < 2 || value[0] != '"' || value[len(value)-1] != '"' {
			continue
		}
		x.set(key, unquoteVMX(value[1:len(value)-1]))
	}
	return x
}

func unquoteVMX(s string) string {
	var b strings.Builder
	for {
		before, after, ok := strings.Cut(s, "|")
		b.WriteString(before)
		if !ok {
			return b.String()
		}
		if len(after) < 2 {
			return b.String() + "|" + after
		}
		if n, err := strconv.ParseUint(after[:2], 16, 8); err == nil {
			b.WriteByte(byte(n))
			after = after[2:]
		} else {
			b.WriteByte('|')
		}
		s = after
	}
}

var vmxQuoting = strings.NewReplacer("|", "|7C", `"`, "|22", "\n", "|0A", "\r", "|0D")

// get gives a value, empty when there is none.
func (x *vmx) get(key string) string { return x.values[strings.ToLower(key)] }

// is reports whether a value is TRUE.
func (x *vmx) is(key string) bool { return strings.EqualFold(x.get(key), "true") }

func (x *vmx) set(key, value string) {
	low := strings.ToLower(key)
	if _, ok := x.values[low]; !ok {
		x.keys = append(x.keys, key)
	}
	x.values[low] = value
}

// drop removes what match says, of keys in small letters.
func (x *vmx) drop(match func(key string) bool) {
	kept := x.keys[:0]
	for _, k := range x.keys {
		if low := strings.ToLower(k); match(low) {
			delete(x.values, low)
		} else {
			kept = append(kept, k)
		}
	}
	x.keys = kept
}

// dropDevice removes a device and all that is said of it.
func (x *vmx) dropDevice(name string) {
	name = strings.ToLower(name) + "."
	x.drop(func(key string) bool { return strings.HasPrefix(key, name) })
}

func (x *vmx) text() []byte {
	var b strings.Builder
	for _, k := range x.keys {
		fmt.Fprintf(&b, "%s = \"%s\"\n", k, vmxQuoting.Replace(x.get(k)))
	}
	return []byte(b.String())
}

// devices are the names of what is present of a kind: "ethernet0" of "ethernet", "scsi0:1" of "scsi".
func (x *vmx) devices(kind string) []string {
	var out []string
	for _, k := range x.keys {
		low := strings.ToLower(k)
		name, ok := strings.CutSuffix(low, ".present")
		if ok && strings.HasPrefix(name, kind) && name != kind && name[len(kind)] >= '0' && name[len(kind)] <= '9' && x.is(k) {
			out = append(out, name)
		}
	}
	return out
}
