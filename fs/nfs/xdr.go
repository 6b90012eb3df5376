package nfs

import "encoding/binary"

var be = binary.BigEndian

// A decoder takes XDR (RFC 4506) apart. From the first thing that is not as it
// should be, bad is set and all that it gives is zero.
type decoder struct {
	p   []byte
	bad bool
}

// fixed gives the next n bytes and skips their padding (RFC 4506 §4.9). They are part of what is decoded.
func (d *decoder) fixed(n int) []byte {
	padded := (n + 3) &^ 3
	if d.bad || n < 0 || padded < n || padded > len(d.p) {
		d.bad = true
		return nil
	}
	v := d.p[:n:n]
	d.p = d.p[padded:]
	return v
}

func (d *decoder) u32() uint32 {
	if p := d.fixed(4); p != nil {
		return be.Uint32(p)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if p := d.fixed(8); p != nil {
		return be.Uint64(p)
	}
	return 0
}

func (d *decoder) boolean() bool {
	v := d.u32()
	d.bad = d.bad || v > 1
	return v == 1 && !d.bad
}

// opaque gives bytes with their length before them, at most most.
func (d *decoder) opaque(most int) []byte {
	n := d.u32()
	if uint64(n) > uint64(most) {
		d.bad = true
	}
	if d.bad {
		return nil
	}
	return d.fixed(int(n))
}

// An encoder puts XDR together.
type encoder struct {
	b []byte
}

func (w *encoder) u32(v uint32) { w.b = be.AppendUint32(w.b, v) }
func (w *encoder) u64(v uint64) { w.b = be.AppendUint64(w.b, v) }

func (w *encoder) boolean(v bool) {
	if v {
		w.u32(1)
	} else {
		w.u32(0)
	}
}

var padding [3]byte

func padLen(n int) int { return -n & 3 }

func (w *encoder) str(s string) {
	w.u32(uint32(len(s)))
	w.b = append(w.b, s...)
	w.b = append(w.b, padding[:padLen(len(s))]...)
}
