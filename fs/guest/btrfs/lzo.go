package btrfs

import "github.com/holdfast-backup/holdfast/fs/guest"

var errLZO = guest.Damaged("LZO data")

// unlzo fills the room of out, or less when the data ends before, from Btrfs's framing of LZO: the bytes of all, then a segment for each sector of the file, its bytes and its
// data. The four bytes of a length never cross the end of a sector of the disk.
//
//	+----------+---------+-----------+---------+-----------+----
//	| all (4)  | len (4) | LZO1X     | len (4) | LZO1X     | …
//	+----------+---------+-----------+---------+-----------+----
func unlzo(out, in []byte, sector int) ([]byte, error) {
	if len(in) < 8 {
		return nil, errLZO
	}
	all := int(le.Uint32(in))
	if all < 8 || all > len(in) {
		return nil, errLZO
	}
	in = in[:all]
	for at := 4; len(out) < cap(out); {
		if sector-at%sector < 4 {
			at += sector - at%sector
		}
		if at >= len(in) {
			break
		}
		if at+4 > len(in) {
			return nil, errLZO
		}
		n := int(le.Uint32(in[at:]))
		if at += 4; n > len(in)-at {
			return nil, errLZO
		}
		start := len(out)
		b, err := lzo1x(out[start:start:min(start+sector, cap(out))], in[at:at+n])
		if err != nil {
			return nil, err
		}
		out, at = out[:start+len(b)], at+n
		if len(b) < sector {
			break // the last
		}
	}
	return out, nil
}

// An lzoReader is the state of a decompression ("LZO stream format as understood by Linux's LZO decompressor").
type lzoReader struct {
	in  []byte
	at  int
	out []byte // its capacity is the bound
}

// lzo1x appends what in holds to out, up to its capacity.
func lzo1x(out, in []byte) ([]byte, error) {
	r := lzoReader{in: in, out: out}
	if len(in) == 0 {
		return nil, errLZO
	}
	state := 0
	if first := int(in[0]); first > 17 {
		r.at = 1
		if !r.literals(first - 17) {
			return nil, errLZO
		}
		state = min(first-17, 4)
	}
	for {
		var done, ok bool
		if state, done, ok = r.step(state); !ok {
			return nil, errLZO
		}
		if done {
			return r.out, nil
		}
	}
}

// step runs one instruction. state is how many literals the one before ended with, 4 for many.
func (r *lzoReader) step(state int) (next int, done, ok bool) {
	op, ok := r.byte()
	if !ok {
		return 0, false, false
	}
	var length, distance, literals int
	switch {
	case op < 16 && state == 0:
		if length, ok = r.length(op, 15); !ok || !r.literals(length+3) {
			return 0, false, false
		}
		return 4, false, true
	case op < 16 || op >= 64:
		h, more := r.byte()
		length, distance, literals = short(op, h, state)
		ok = more
	default:
		length, distance, literals, done, ok = r.long(op)
	}
	if !ok || done {
		return 0, done, ok
	}
	return literals, false, r.repeat(length, distance) && r.literals(literals)
}

// short gives the operands of an instruction of two bytes.
func short(op, h, state int) (length, distance, literals int) {
	switch {
	case op >= 128:
		return 5 + op>>5&3, h<<3 + op>>2&7 + 1, op & 3
	case op >= 64:
		return 3 + op>>5&1, h<<3 + op>>2&7 + 1, op & 3
	case state == 4:
		return 3, h<<2 + op>>2&3 + 2049, op & 3
	}
	return 2, h<<2 + op>>2&3 + 1, op & 3
}

// long gives the operands of an instruction whose distance has two bytes; done is the end of the stream.
func (r *lzoReader) long(op int) (length, distance, literals int, done, ok bool) {
	bits, base := 31, 1
	if op < 32 {
		bits, base = 7, 16384+op>>3&1<<14
	}
	if length, ok = r.length(op&bits, bits); !ok || len(r.in)-r.at < 2 {
		return 0, 0, 0, false, false
	}
	d := int(le.Uint16(r.in[r.at:]))
	r.at += 2
	distance = base + d>>2
	return length + 2, distance, d & 3, op < 32 && distance == 16384, true
}

func (r *lzoReader) byte() (int, bool) {
	if r.at >= len(r.in) {
		return 0, false
	}
	r.at++
	return int(r.in[r.at-1]), true
}

// length reads a length of which the instruction has n, and more when that is 0.
func (r *lzoReader) length(n, most int) (int, bool) {
	if n != 0 {
		return n, true
	}
	for n = most; ; n += 255 {
		b, ok := r.byte()
		if !ok || n > 1<<24 {
			return 0, false
		}
		if b != 0 {
			return n + b, true
		}
	}
}

func (r *lzoReader) literals(n int) bool {
	if n > len(r.in)-r.at || n > cap(r.out)-len(r.out) {
		return false
	}
	r.out = append(r.out, r.in[r.at:r.at+n]...)
	r.at += n
	return true
}

// repeat copies length bytes from distance before; what it copies may overlap what it makes.
func (r *lzoReader) repeat(length, distance int) bool {
	from := len(r.out) - distance
	if from < 0 || length > cap(r.out)-len(r.out) {
		return false
	}
	if distance >= length {
		r.out = append(r.out, r.out[from:from+length]...)
		return true
	}
	for range length {
		r.out = append(r.out, r.out[from])
		from++
	}
	return true
}
