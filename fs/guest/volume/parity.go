package volume

import (
	"crypto/subtle"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// The layouts of RAID 5 and 6, by md's numbers (md(4), RAID4/RAID5/RAID6; mdadm(8) --layout).
const (
	leftAsymmetric  = 0
	rightAsymmetric = 1
	leftSymmetric   = 2
	rightSymmetric  = 3
	parityFirst     = 4
	parityLast      = 5
	ddfZeroRestart  = 8  // of DDF, and of LVM2's raid6_zr
	ddfNRestart     = 9  // raid6_nr
	ddfNContinue    = 10 // raid6_nc
	qLast           = 16 // added to one of the first six: those of RAID 5, and Q on a further member
)

// parity is RAID 5 or 6.
type parity struct {
	legs      []leg
	chunk     int64 // bytes
	size      int64
	data      int // members that hold data in a row
	q         bool
	algorithm int
}

// newParity makes RAID 5 or 6 over members of size bytes.
func newParity(legs []leg, size, chunk int64, level, algorithm int) (device, error) {
	p := &parity{legs: legs, chunk: chunk, q: level == 6, algorithm: algorithm, data: len(legs) - 1}
	lost := 1
	if p.q {
		p.data--
		lost++
	}
	switch {
	case chunk <= 0 || chunk > 1<<30 || p.data < 1 || p.q && len(legs) > 255:
		return nil, guest.Damaged("RAID %d of %d members in chunks of %d bytes", level, len(legs), chunk)
	case algorithm < 0, algorithm > parityLast && !p.q, p.q && algorithm > parityLast && algorithm < ddfZeroRestart,
		algorithm > ddfNContinue && algorithm < qLast, algorithm > qLast+parityFirst:
		return nil, guest.Unsupported("RAID %d in layout %d", level, algorithm)
	}
	for _, l := range legs {
		if l.dev == nil || l.good == 0 {
			lost--
		}
	}
	if lost < 0 {
		return nil, guest.Damaged("RAID %d with too many members missing", level)
	}
	p.size = roundDown(size, chunk) * int64(p.data)
	return p, nil
}

// Size implements guest.Device.
func (p *parity) Size() int64 { return p.size }

func (p *parity) locate([]Piece, int64, int64) ([]Piece, error) { return nil, ErrNotPlain }

// ReadAt implements io.ReaderAt.
func (p *parity) ReadAt(b []byte, off int64) (int, error) {
	return readRuns(b, off, p.size, func(b []byte, off int64) (int, error) {
		nr, in := off/p.chunk, off%p.chunk
		b = b[:min(int64(len(b)), p.chunk-in)]
		row := p.row(nr / int64(p.data))
		at := nr/int64(p.data)*p.chunk + in
		return len(b), p.read(b, row, int(nr%int64(p.data)), at)
	})
}

// row is where things are in a row of chunks.
type row struct {
	p, q int // members with parity; q is -1 in RAID 5
	// at gives the member of each data chunk.
	at []int
	// power is the power of the generator that a member's data has in Q.
	power func(member int) int
}

// row places row n, the number of a stripe.
func (p *parity) row(n int64) row {
	count := len(p.legs)
	r := row{q: -1, at: make([]int, p.data)}
	alg := p.algorithm
	if alg >= qLast {
		count--
		r.q = count
		alg -= qLast
	}
	turn := int(n % int64(count))
	switch alg {
	case leftAsymmetric, leftSymmetric, ddfNContinue:
		r.p = count - 1 - turn
	case rightAsymmetric, rightSymmetric, ddfZeroRestart:
		r.p = turn
	case ddfNRestart:
		r.p = count - 1 - int((n+1)%int64(count))
	case parityFirst:
		r.p = 0
	case parityLast:
		r.p = p.data
	}
	if p.q && r.q < 0 {
		r.q = (r.p + 1) % count
		if alg == ddfNContinue {
			r.q = (r.p + count - 1) % count
		}
	}
	p.placeData(&r, alg, count)
	p.powers(&r)
	return r
}

// placeData finds the members of a row's data. The symmetric layouts go on behind the parity and around; the others go from
// the first member on and leave out parity.
func (p *parity) placeData(r *row, alg, count int) {
	if alg == leftSymmetric || alg == rightSymmetric || alg == ddfNContinue {
		from := r.p + 1
		if p.q && r.q == from%count && p.algorithm < qLast {
			from++
		}
		for i := range r.at {
			r.at[i] = (from + i) % count
		}
		return
	}
	member := 0
	for i := range r.at {
		for member == r.p || member == r.q {
			member++
		}
		r.at[i] = member
		member++
	}
}

// powers says what Q is made of. md counts data from behind Q on and around; DDF counts members.
func (p *parity) powers(r *row) {
	if p.algorithm >= ddfZeroRestart && p.algorithm <= ddfNContinue {
		r.power = func(member int) int { return member }
		return
	}
	n := len(p.legs)
	q, parity := r.q, r.p
	r.power = func(member int) int {
		power := (member - q - 1 + n) % n
		if (parity-q-1+n)%n < power {
			power--
		}
		return power
	}
}

// read fills b, which is within a chunk, from data chunk i of a row, at off in each member.
func (p *parity) read(b []byte, r row, i int, off int64) error {
	n := int64(len(b))
	want := r.at[i]
	if p.legs[want].has(off, n) {
		return guest.ReadFull(p.legs[want].dev, b, off)
	}
	// Where not all of the range is lost, go by sectors: a member that is being rebuilt ends somewhere, a bad block is small.
	if n > sectorSize && p.legs[want].dev != nil {
		head := sectorSize - off%sectorSize
		if err := p.read(b[:head], r, i, off); err != nil {
			return err
		}
		for b, off = b[head:], off+head; len(b) > 0; {
			k := min(int64(len(b)), sectorSize)
			if err := p.read(b[:k], r, i, off); err != nil {
				return err
			}
			b, off = b[k:], off+k
		}
		return nil
	}
	return p.compute(b, r, want, off)
}

// compute makes what member want held of what the others hold.
func (p *parity) compute(b []byte, r row, want int, off int64) error {
	n := int64(len(b))
	lost := -1 // a second data member
	for _, member := range r.at {
		if member != want && !p.legs[member].has(off, n) {
			if lost >= 0 {
				return guest.Damaged("more members are missing than parity makes up for")
			}
			lost = member
		}
	}
	hasP, hasQ := p.legs[r.p].has(off, n), r.q >= 0 && p.legs[r.q].has(off, n)
	switch {
	case lost < 0 && hasP:
		return p.sum(b, r, r.p, want, -1, off)
	case lost < 0 && hasQ:
		return p.fromQ(b, r, want, off)
	case lost >= 0 && hasP && hasQ:
		return p.fromBoth(b, r, want, lost, off)
	}
	return guest.Damaged("more members are missing than parity makes up for")
}

// sum fills b with P and all data but that of two members; or with Q, and each member's data times its power of the generator.
func (p *parity) sum(b []byte, r row, parity, not, nor int, off int64) error {
	if err := guest.ReadFull(p.legs[parity].dev, b, off); err != nil {
		return err
	}
	other := make([]byte, len(b))
	for _, member := range r.at {
		if member == not || member == nor {
			continue
		}
		if err := guest.ReadFull(p.legs[member].dev, other, off); err != nil {
			return err
		}
		if parity == r.p {
			subtle.XORBytes(b, b, other)
			continue
		}
		t := gfTable(gfPower(r.power(member)))
		for i, c := range other {
			b[i] ^= t[c]
		}
	}
	return nil
}

// fromQ computes one member of data with P gone: D = (Q + Qx) · g⁻ˣ ("The mathematics of RAID-6" §4).
func (p *parity) fromQ(b []byte, r row, want int, off int64) error {
	if err := p.sum(b, r, r.q, want, -1, off); err != nil {
		return err
	}
	t := gfTable(gfInverse(gfPower(r.power(want))))
	for i, c := range b {
		b[i] = t[c]
	}
	return nil
}

// fromBoth computes one of two lost members of data: Dx = A·(P + Pxy) + B·(Q + Qxy), A = gʸ⁻ˣ · (gʸ⁻ˣ + 1)⁻¹,
// B = g⁻ˣ · (gʸ⁻ˣ + 1)⁻¹ (the same, §4).
func (p *parity) fromBoth(b []byte, r row, want, lost int, off int64) error {
	if err := p.sum(b, r, r.p, want, lost, off); err != nil {
		return err
	}
	q := make([]byte, len(b))
	if err := p.sum(q, r, r.q, want, lost, off); err != nil {
		return err
	}
	gx, gy := gfPower(r.power(want)), gfPower(r.power(lost))
	ratio := gfMul(gy, gfInverse(gx))
	under := gfInverse(ratio ^ 1)
	ta, tb := gfTable(gfMul(ratio, under)), gfTable(gfMul(gfInverse(gx), under))
	for i := range b {
		b[i] = ta[b[i]] ^ tb[q[i]]
	}
	return nil
}

// gfMul multiplies in the field of RAID 6: GF(2⁸) modulo x⁸+x⁴+x³+x²+1, its generator is 2.
func gfMul(a, b byte) (c byte) {
	for ; b != 0; b >>= 1 {
		if b&1 != 0 {
			c ^= a
		}
		high := a & 0x80
		a <<= 1
		if high != 0 {
			a ^= 0x1d
		}
	}
	return c
}

func gfPower(n int) byte {
	c := byte(1)
	for range n % 255 {
		c = gfMul(c, 2)
	}
	return c
}

// gfInverse is a²⁵⁴.
func gfInverse(a byte) byte {
	c := byte(1)
	for range 254 {
		c = gfMul(c, a)
	}
	return c
}

// gfTable is what every byte is times a.
func gfTable(a byte) (t [256]byte) {
	for i := range t {
		t[i] = gfMul(a, byte(i))
	}
	return t
}
