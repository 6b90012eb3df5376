package xfs

import (
	"bytes"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// TestOrder replays items that are older than what the disk has, as old, and newer. The end of a whole log is the same whether the older ones
// are left out or not, so that comparing with the kernel does not show it.
func TestOrder(t *testing.T) {
	disk := goldenDisk(t)
	fs, err := Open(disk, guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	block := int64(0) // of a directory
	for at := int64(0); at < fs.dev.Size(); at += 1024 {
		if m := string(disk.base[at : at+4]); m == "XDD3" || m == "XDB3" {
			block = at
		}
	}
	lsn := be.Uint64(disk.base[block+16:])
	if block == 0 || lsn < 1<<32 {
		t.Fatalf("block at %d, lsn %#x", block, lsn)
	}
	parts := func(fill byte, chunk int) []item {
		head := make([]byte, 24)
		le.PutUint16(head, itemBuffer)
		le.PutUint16(head[2:], 2)
		le.PutUint16(head[6:], 8)
		le.PutUint64(head[8:], uint64(block)/512)
		le.PutUint32(head[16:], 1)
		le.PutUint32(head[20:], 1<<chunk)
		return []item{{regions: [][]byte{head, bytes.Repeat([]byte{fill}, bufChunk)}, want: 2}}
	}
	r := &replayer{fs: fs, over: guest.NewOverlay(disk, 1024, 1<<20), pages: map[int64][]byte{}, replayed: replayed{unsummed: map[int64]bool{}}}
	carry := func(lsn uint64, fill byte, chunk int) {
		t.Helper()
		if err := r.transaction(&trans{lsn: lsn, items: parts(fill, chunk)}); err != nil {
			t.Fatal(err)
		}
	}
	at := func(chunk int) byte {
		b, err := r.read(block, 4096)
		if err != nil {
			t.Fatal(err)
		}
		return b[chunk*bufChunk]
	}
	carry(lsn-1, 0xaa, 3)
	carry(lsn, 0xaa, 3)
	if len(r.pages) > 0 {
		t.Error("an item was replayed over what is as new")
	}
	carry(lsn+1, 0xbb, 3)
	carry(lsn+1, 0xcc, 4) // of the same number: began in the same record
	if at(3) != 0xbb || at(4) != 0xcc {
		t.Errorf("%x, %x: a newer item was not replayed", at(3), at(4))
	}
	carry(lsn+2, 0xdd, 5)
	carry(lsn, 0xee, 6)
	if at(5) != 0xdd || at(6) == 0xee {
		t.Errorf("%x, %x: the sequence number was not stamped", at(5), at(6))
	}
	if err := r.stampAll(); err != nil {
		t.Fatal(err)
	}
	b, _ := r.read(block, 4096)
	if be.Uint64(b[16:]) != lsn+2 || !summed(b, 4) {
		t.Errorf("lsn %#x, or the checksum", be.Uint64(b[16:]))
	}
}

// TestInodeOrder does it with an inode.
func TestInodeOrder(t *testing.T) {
	fs, err := Open(goldenDisk(t), guest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ino, err := guesttest.Find(fs, "churn/last")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := fs.rawInode(uint64(ino))
	if err != nil {
		t.Fatal(err)
	}
	lsn := be.Uint64(raw[inodeLSN:])
	fsb, at := fs.sb.inodePlace(uint64(ino))
	off, _ := fs.sb.offset(fsb, 1)
	core := bytes.Clone(raw[:coreV3])
	for _, f := range [][2]int{{0, 2}, {8, 4}, {inodeFlags2, 8}, {152, 8}} { // magic, owner, flags, number
		for i, c := range raw[f[0] : f[0]+f[1]] {
			core[f[0]+f[1]-1-i] = c
		}
	}
	le.PutUint32(core[8:], 4711)
	head := make([]byte, 56)
	le.PutUint16(head, itemInode)
	le.PutUint16(head[2:], 2)
	le.PutUint32(head[4:], 1)
	le.PutUint64(head[16:], uint64(ino))
	le.PutUint64(head[40:], uint64(off)/512)
	le.PutUint32(head[48:], 2)
	le.PutUint32(head[52:], uint32(at))
	for _, c := range []struct {
		lsn  uint64
		want uint32
	}{{lsn - 1, be.Uint32(raw[8:])}, {lsn, 4711}, {lsn + 1, 4711}} {
		r := &replayer{fs: fs, over: guest.NewOverlay(fs.dev, 1024, 1<<20), pages: map[int64][]byte{}}
		i := item{regions: [][]byte{head, core}, want: 2}
		if err := r.transaction(&trans{lsn: c.lsn, items: []item{i}}); err != nil {
			t.Fatal(err)
		}
		b, err := r.read(off+at, fs.sb.inodeSize)
		if err != nil {
			t.Fatal(err)
		}
		if got := be.Uint32(b[8:]); got != c.want || !summed(b, inodeCRC) {
			t.Errorf("an item of %#x over an inode of %#x: owner %d, want %d", c.lsn, lsn, got, c.want)
		}
	}
}
