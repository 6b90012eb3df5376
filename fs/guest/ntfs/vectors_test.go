package ntfs

import (
	"bytes"
	"encoding/hex"
	"testing"
)

func fromHex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	must(t, err)
	return b
}

// TestVectors decompresses the examples of [MS-XCA] §3.
func TestVectors(t *testing.T) {
	tune := []byte("F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# G F# E D E A F# F# G A A G F# E D D E F# E D D\x00")
	got := make([]byte, len(tune))
	must(t, lznt1(got, fromHex(t, "38b08846232000204720410010a24701a045204400084501507900c045200524138805b4024a44ef0358028c091601484500be009e000401189000")))
	if !bytes.Equal(got, tune) {
		t.Errorf("%q", got)
	}
	letters := []byte("abcdefghijklmnopqrstuvwxyz")
	table := make([]byte, xpressTable)
	copy(table[0x30:], fromHex(t, "505555555555555555555545440400"))
	table[0x80] = 4
	got = make([]byte, len(letters))
	must(t, xpress(got, append(table, fromHex(t, "d8523ed794115be9195ff9d67cdf8d0400000000")...)))
	if !bytes.Equal(got, letters) {
		t.Errorf("%q", got)
	}
}

// TestStoredLZX has a block that is not compressed, as wimlib makes none of so few bytes: its type and size in 20 bits, three distances, the bytes.
func TestStoredLZX(t *testing.T) {
	var src []byte
	bits := uint32(lzxStored)<<29 | 5<<12
	src = le.AppendUint16(src, uint16(bits>>16))
	src = le.AppendUint16(src, uint16(bits))
	for _, distance := range []uint32{1, 1, 1} {
		src = le.AppendUint32(src, distance)
	}
	src = append(src, "bytes\x00"...)
	got := make([]byte, 5)
	must(t, lzx(got, src))
	if string(got) != "bytes" {
		t.Errorf("%q", got)
	}
	if lzx(make([]byte, 6), src) == nil {
		t.Error("more bytes than there are")
	}
}
