package ext

import "github.com/holdfast-backup/holdfast/fs/guest"

// before reports whether transaction a is older than b: their numbers go round.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// scan goes through the log and gives the number behind the last transaction that is whole.
func (j *journal) scan() (end uint32, err error) {
	end = j.sequence
	torn := false          // a block of this transaction does not match
	data := ^uint32(0)     // checksum of the first kind
	last := uint64(0)      // time of the last commit
	scratch := []byte(nil) // for data blocks
	if j.compat&journalCompatSum != 0 && !j.sums() {
		scratch = make([]byte, j.f.blockSize)
	}
	err = j.walk(func(l *logBlock) (bool, error) {
		if l.kind != kindCommit {
			torn = torn || !j.tailSum(l.b)
			var err error
			if l.kind == kindDescriptor && scratch != nil {
				data, err = j.sumData(data, l, scratch)
			}
			return true, err
		}
		when := be.Uint64(l.b[0x30:])
		if torn || !j.commitSum(l.b, data) {
			// A block of an older journal in the same place is no damage, nor is a commit that was written before its
			// transaction was, if the journal may do so.
			if when >= last && j.incompat&journalAsync == 0 {
				j.f.warn("transaction %d of the journal does not match its checksum: what came from there on is lost", l.sequence)
			}
			return false, nil
		}
		end, last, data = l.sequence+1, when, ^uint32(0)
		return true, nil
	})
	return end, err
}

// tailSum verifies the checksum at the end of a descriptor or revoke block.
func (j *journal) tailSum(b []byte) bool {
	n := len(b) - 4
	return !j.sums() || crc32c(crc32c(j.seed, b[:n]), zeros[:]) == be.Uint32(b[n:])
}

// sumData goes on with the checksum of the first kind, over a descriptor and its data.
func (j *journal) sumData(sum uint32, l *logBlock, scratch []byte) (uint32, error) {
	sum = crc32be(sum, l.b)
	for i := range l.tags {
		if err := j.read(j.wrap(l.data, int64(i)), scratch); err != nil {
			return 0, err
		}
		sum = crc32be(sum, scratch)
	}
	return sum, nil
}

// commitSum verifies the checksum in a commit block: of the block itself, or, of the first kind, of all that came before it.
func (j *journal) commitSum(b []byte, data uint32) bool {
	const at = 0x10
	sum, kind, size := be.Uint32(b[at:]), b[0xc], b[0xd]
	switch {
	case j.sums():
		return crc32c(crc32c(crc32c(j.seed, b[:at]), zeros[:]), b[at+4:]) == sum
	case j.compat&journalCompatSum == 0:
		return true
	}
	return sum == data && kind == 1 && size == 4 || sum == 0 && kind == 0 && size == 0
}

// revokeCost is the memory of a revoked block, bytes.
const revokeCost = 48

// revoked gives the blocks that are not to be written, each up to which transaction.
func (j *journal) revoked(end uint32, room int64) (map[int64]uint32, error) {
	list := map[int64]uint32{}
	size := 4
	if j.incompat&journal64bit != 0 {
		size = 8
	}
	err := j.walk(func(l *logBlock) (bool, error) {
		if l.kind != kindRevoke || !before(l.sequence, end) {
			return before(l.sequence, end), nil
		}
		used := int(min(be.Uint32(l.b[journalHeader:]), uint32(len(l.b))))
		for at := journalHeader + 4; at+size <= used; at += size {
			block := int64(be.Uint32(l.b[at:]))
			if size == 8 {
				block = int64(be.Uint64(l.b[at:]))
			}
			list[block] = l.sequence
		}
		if int64(len(list))*revokeCost > room {
			return false, guest.Unsupported("more to replay than fits into memory")
		}
		return true, nil
	})
	return list, err
}

// write shows all blocks of the transactions before end as the journal has them.
func (j *journal) write(over *guest.Overlay, end uint32, revoked map[int64]uint32) error {
	bad := 0
	scratch := make([]byte, j.f.blockSize)
	err := j.walk(func(l *logBlock) (bool, error) {
		if l.kind != kindDescriptor || !before(l.sequence, end) {
			return before(l.sequence, end), nil
		}
		for i, t := range l.tags {
			if by, ok := revoked[t.block]; ok && !before(by, l.sequence) {
				continue
			}
			ok, err := j.writeBlock(over, j.wrap(l.data, int64(i)), l.sequence, t, scratch)
			if err != nil {
				return false, err
			}
			if !ok {
				bad++
			}
		}
		return true, nil
	})
	if err == nil && bad > 0 {
		j.f.warn("%d blocks of the journal do not match their checksums: what they hold is shown as it was before", bad)
	}
	return err
}

// writeBlock shows a block as block n of the journal has it, if that matches its checksum.
func (j *journal) writeBlock(over *guest.Overlay, n int64, sequence uint32, t tag, scratch []byte) (bool, error) {
	if j.sums() {
		if err := j.read(n, scratch); err != nil {
			return false, err
		}
		var s [4]byte
		be.PutUint32(s[:], sequence)
		sum := crc32c(crc32c(j.seed, s[:]), scratch)
		if j.incompat&journalSum3 == 0 {
			sum &= 0xffff
		}
		if sum != t.sum {
			return false, nil
		}
	}
	if t.block < 0 || t.block >= j.f.blocks {
		return false, nil
	}
	place, err := j.place(n)
	if err != nil {
		return false, err
	}
	var head []byte
	if t.escaped {
		head = be.AppendUint32(nil, journalMagic)
	}
	return true, over.Move(t.block, place, head)
}
