package registry

import (
	"encoding/binary"
	"fmt"
	"iter"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Type says what a value's data is ("Data types"). Others than these exist.
type Type uint32

// The types that are text or numbers.
const (
	None     Type = 0
	String   Type = 1 // REG_SZ
	Expand   Type = 2 // REG_EXPAND_SZ: with variables in it
	Binary   Type = 3
	Dword    Type = 4
	DwordBig Type = 5
	Link     Type = 6 // the path of a key
	Strings  Type = 7 // REG_MULTI_SZ
	Qword    Type = 11
)

// Value is a value of a key. Name is "" for what the Registry Editor calls (Default).
type Value struct {
	Name string
	Type Type

	hive *Hive
	size uint32
	data uint32 // where it is, or itself
}

// Bounds of a value.
const (
	maxValue   = 64 << 20 // bytes
	maxValues  = maxCell / 4
	segment    = 16344   // bytes of a piece of big data
	inNode     = 1 << 31 // in the size: the data is where its place would be
	maxInNode  = 4       // bytes
	bigMinor   = 4       // the first format with big data
	bigDataLen = 8
)

// Values yields the values. An error ends them; what was yielded before it is good.
func (k *Key) Values() iter.Seq2[Value, error] {
	return func(yield func(Value, error) bool) {
		list, err := k.valueList()
		for ; err == nil && len(list) > 0; list = list[4:] {
			var v Value
			if v, err = k.hive.value(le.Uint32(list)); err == nil && !yield(v, nil) {
				return
			}
		}
		if err != nil {
			yield(Value{}, fmt.Errorf("registry: values of %q: %w", k.Name, err))
		}
	}
}

func (k *Key) valueList() ([]byte, error) {
	if k.values == 0 {
		return nil, nil
	}
	if k.values > maxValues {
		return nil, guest.Damaged("%d values", k.values)
	}
	n := int(k.values) * 4
	return k.hive.cell(k.valList, n, n)
}

// Value gives a value by its name, without regard to case. ErrNotExist.
func (k *Key) Value(name string) (Value, error) {
	for v, err := range k.Values() {
		if err != nil {
			return v, err
		}
		if upper(v.Name) == upper(name) {
			return v, nil
		}
	}
	return Value{}, fmt.Errorf("registry: value %q of %q: %w", name, k.Name, guest.ErrNotExist)
}

// value reads a value ("Key value"): "vk" | 2 bytes of the name 2 | 4 bytes of data 4 | 8 where they are 4 | 12 type 4 | 16 flags 2 | 18 … | 20 name.
func (h *Hive) value(off uint32) (Value, error) {
	b, err := h.cell(off, valueHead, valueHead+maxValueName)
	if err != nil {
		return Value{}, err
	}
	n := int(le.Uint16(b[2:]))
	if string(b[:2]) != "vk" || n > len(b)-valueHead {
		return Value{}, guest.Damaged("the value at %#x", off)
	}
	latin := le.Uint16(b[16:])&valueLatin != 0
	return Value{name(b[valueHead:valueHead+n], latin), Type(le.Uint32(b[12:])), h, le.Uint32(b[4:]), le.Uint32(b[8:])}, nil
}

// Bytes gives the data as it is.
func (v Value) Bytes() ([]byte, error) {
	b, err := v.bytes()
	if err != nil {
		return nil, fmt.Errorf("registry: value %q: %w", v.Name, err)
	}
	return b, nil
}

func (v Value) bytes() ([]byte, error) {
	switch {
	case v.size&inNode != 0:
		n := v.size &^ inNode
		if n > maxInNode {
			return nil, guest.Damaged("%d bytes in its own node", n)
		}
		return binary.LittleEndian.AppendUint32(nil, v.data)[:n], nil
	case v.size == 0 || v.data == none:
		return nil, nil
	case v.size > maxValue:
		return nil, guest.Unsupported("%d bytes", v.size)
	case v.size <= segment || v.hive.minor < bigMinor:
		return v.hive.cell(v.data, int(v.size), int(v.size))
	}
	b, err := v.hive.cell(v.data, bigDataLen, int(v.size))
	if err != nil || len(b) == int(v.size) { // not in pieces: a writer of an older format
		return b, err
	}
	return v.big(b)
}

// big collects the pieces of big data ("Big data"): "db" | 2 number of them 2 | 4 their list 4.
func (v Value) big(b []byte) ([]byte, error) {
	n := int(le.Uint16(b[2:]))
	if string(b[:2]) != "db" || n != int(v.size+segment-1)/segment {
		return nil, guest.Damaged("%d bytes in %d pieces", v.size, n)
	}
	list, err := v.hive.cell(le.Uint32(b[4:]), 4*n, 4*n)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, min(int64(v.size), v.hive.size))
	for ; len(list) > 0; list = list[4:] {
		want := min(int(v.size)-len(out), segment)
		piece, err := v.hive.cell(le.Uint32(list), want, want)
		if err != nil {
			return nil, err
		}
		out = append(out, piece...)
	}
	return out, nil
}

// Text gives the text of a String, Expand or Link, up to its first zero.
func (v Value) Text() (string, error) {
	if v.Type != String && v.Type != Expand && v.Type != Link {
		return "", fmt.Errorf("registry: value %q has the type %d, and is no text", v.Name, v.Type)
	}
	b, err := v.Bytes()
	s, _, _ := strings.Cut(text(b), "\x00")
	return s, err
}

// Texts gives the texts of Strings.
func (v Value) Texts() ([]string, error) {
	if v.Type != Strings {
		return nil, fmt.Errorf("registry: value %q has the type %d, and is no list", v.Name, v.Type)
	}
	b, err := v.Bytes()
	var list []string
	for s := range strings.SplitSeq(text(b), "\x00") {
		if s == "" {
			break
		}
		list = append(list, s)
	}
	return list, err
}

// Number gives a Dword, DwordBig or Qword.
func (v Value) Number() (uint64, error) {
	b, err := v.Bytes()
	switch {
	case err != nil:
		return 0, err
	case v.Type == Dword && len(b) == 4:
		return uint64(le.Uint32(b)), nil
	case v.Type == DwordBig && len(b) == 4:
		return uint64(binary.BigEndian.Uint32(b)), nil
	case v.Type == Qword && len(b) == 8:
		return le.Uint64(b), nil
	}
	return 0, fmt.Errorf("registry: value %q has the type %d and %d bytes, and is no number", v.Name, v.Type, len(b))
}

// Size is that of the data, bytes.
func (v Value) Size() int64 { return int64(v.size &^ inNode) }
