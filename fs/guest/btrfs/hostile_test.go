package btrfs

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory = guesttest.Memory

// hostile is a small image with a bit of all, and a log.
func hostile(t *testing.T) memory {
	t.Helper()
	guesttest.Needs(t, "mkfs.btrfs", "btrfs", "mount")
	image := guesttest.Sparse(t, 40<<20)
	guesttest.Run(t, "mkfs.btrfs", "-q", "-M", "-n", "4096", "-m", "single", "-d", "single", image)
	dir, unmount := guesttest.Mount(t, image, "btrfs", "rw,nobarrier,commit=1000,compress-force=lzo")
	guesttest.Run(t, "sh", "-c", "cd "+dir+` && for i in 1 2 3 4 5 6 7 8; do mkdir d$i; seq 20000 >d$i/f; ln d$i/f d$i/l; ln -s f d$i/s; echo x >d$i/x; done
		btrfs property set d2 compression zstd; seq 30000 >d2/z; btrfs property set d3 compression zlib; seq 30000 >d3/z; truncate -s 9M d4/x; cp --reflink=always d2/z d1/r
		btrfs subvolume create s; echo s >s/s; btrfs subvolume snapshot s d1/snapshot`)
	unmount()
	dir, unmount = guesttest.Mount(t, image, "btrfs", "rw,nobarrier,commit=1000")
	err := cmp.Or(os.Remove(dir+"/d1/x"), os.WriteFile(dir+"/d1/new", bytes.Repeat([]byte("new"), 5000), 0o600), os.Rename(dir+"/d5/x", dir+"/d5/y"), os.Truncate(dir+"/d6/f", 5000),
		fsync(dir+"/d1/new"), fsync(dir+"/d1"), fsync(dir+"/d5"), fsync(dir+"/d6/f"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	unmount()
	return m
}

// nodesIn gives where the device has nodes of 4 KiB.
func nodesIn(m memory, fsid []byte) []int {
	var list []int
	for off := 0; off+4096 <= len(m); off += 4096 {
		if bytes.Equal(m[off+0x20:off+0x30], fsid) && (off == 64<<10 || le.Uint32(m[off:]) != 0) {
			list = append(list, off)
		}
	}
	return list
}

// look asks for all that there is.
func look(dev guest.Device) (lines, errs int) {
	fs, err := Open(dev, guest.Options{Cache: 1 << 20, Journal: 1 << 20})
	if err != nil {
		return 0, 1
	}
	list, err := guesttest.WalkFS(fs)
	if err != nil {
		errs++
	}
	for _, l := range list {
		if l.Fields["error"] != "" {
			errs++
		}
	}
	for range fs.Free() {
	}
	for i := range guest.Ino(300) {
		for range fs.Locate(i) {
		}
	}
	fs.Default()
	return len(list), errs
}

// TestHostile changes bytes of nodes and makes their checksums right again, so that what reads the items sees them, and changes bytes without.
func TestHostile(t *testing.T) {
	m := hostile(t)
	sound, errs := look(m)
	if sound < 40 || errs > 0 {
		t.Fatalf("%d lines, %d errors", sound, errs)
	}
	fsid := m[64<<10+0x20 : 64<<10+0x30]
	nodes := nodesIn(m, fsid)
	t.Log(len(nodes), " nodes")
	rounds := 300
	if testing.Short() {
		rounds = 60
	}
	harmed := 0
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(uint64(seed), 1))
		var undo []func()
		for range 1 + rng.IntN(4) {
			off := nodes[rng.IntN(len(nodes))]
			old := bytes.Clone(m[off : off+4096])
			undo = append(undo, func() { copy(m[off:], old) })
			for range 1 + rng.IntN(6) {
				mutate(rng, m[off:off+4096])
			}
			if seed%8 > 0 {
				copy(m[off:], csumTypes[0].sum(nil, m[off+csumField:off+4096]))
			}
		}
		start := time.Now()
		if n, errs := look(m); n != sound || errs > 0 {
			harmed++
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("seed %d took %v", seed, d)
		}
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}
	for i := range 40 {
		look(m[:len(m)/40*i])
	}
	t.Logf("%d of %d seen", harmed, rounds)
	if harmed < rounds/4 {
		t.Error("few changes are seen")
	}
}

// TestHonest changes bytes of a device, data's too. All of it has checksums: what is shown without an error is what was there.
func TestHonest(t *testing.T) {
	m := hostile(t)
	opt := guest.Options{NoReplay: true} // a log that is damaged is left out, and what it held with it
	walk := func() []guesttest.Line {
		fs, err := Open(m, opt)
		if err != nil {
			return nil
		}
		list, err := guesttest.WalkFS(fs)
		if err != nil {
			t.Error(err)
		}
		return list
	}
	var used []int
	for at := 64 << 10; at < len(m); at += 16 {
		if len(bytes.TrimLeft(m[at:at+16], "\x00")) > 0 {
			used = append(used, at)
		}
	}
	want := walk()
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	opened, harmed := 0, 0
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(uint64(seed), 7))
		old := map[int]byte{}
		for range 1 + rng.IntN(40) {
			at := used[rng.IntN(len(used))] + rng.IntN(16)
			if _, again := old[at]; !again {
				old[at] = m[at]
				m[at] ^= byte(1 + rng.IntN(255))
			}
		}
		if got := walk(); got != nil {
			opened++
			for _, lie := range guesttest.Honest(want, got) {
				t.Errorf("seed %d: %s", seed, lie)
			}
			if len(guesttest.Diff(want, got)) > 0 {
				harmed++
			}
		}
		for at, b := range old {
			m[at] = b
		}
	}
	t.Logf("%d of %d opened, %d with damage", opened, rounds, harmed)
	if harmed < rounds/4 {
		t.Error("few changes are seen")
	}
}

// mutate changes a few bytes behind the checksum, near the front more often than not, where the keys and lengths are.
func mutate(rng *rand.Rand, b []byte) {
	at := csumField + rng.IntN(len(b)-csumField-8)
	if rng.IntN(2) == 0 {
		at = headerSize + rng.IntN(500)
	}
	switch rng.IntN(4) {
	case 0:
		b[at] ^= 1 << rng.IntN(8)
	case 1:
		b[at] = byte(rng.IntN(256))
	case 2:
		le.PutUint64(b[at:], rng.Uint64()>>rng.IntN(64))
	case 3:
		copy(b[at:at+8], b[csumField+rng.IntN(len(b)-csumField-8):])
	}
}

func FuzzLZO(f *testing.F) {
	f.Add([]byte("\x10\x00\x00\x00\x08\x00\x00\x00\x15abcd\x11\x00\x00"), 4)
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		out, err := unlzo(make([]byte, 0, max(0, size)&(maxPart-1)), in, 4096)
		if err == nil && len(out) > max(0, size) {
			t.Error(len(out))
		}
	})
}

func FuzzZstd(f *testing.F) {
	f.Add([]byte("\x28\xb5\x2f\xfd\x20\x01\x09\x00\x00x"), 1)
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		unzstd(make([]byte, 0, max(0, size)&(maxPart-1)), in)
		unzlib(make([]byte, 0, max(0, size)&(maxPart-1)), in)
	})
}

func FuzzItems(f *testing.F) {
	f.Add(make([]byte, 4096))
	f.Fuzz(func(t *testing.T, b []byte) {
		fs := &FS{sb: &super{sector: 4096, node: 4096, csum: csumTypes[0]}}
		fs.parseExtent(0, b)
		parseChunk(4096, b)
		parseRefs(key{kind: kindInodeRef}, b)
		parseRefs(key{kind: kindInodeExtref}, b)
		parseRoot(b)
		parseInode(place{}, b)
		for rest := b; len(rest) > 0; {
			var err error
			if _, rest, err = parseEntry(rest); err != nil {
				break
			}
		}
		if len(b) < 4096 {
			return
		}
		b = b[:4096]
		copy(b, csumTypes[0].sum(nil, b[csumField:]))
		parseSuper(b, int64(le.Uint64(b[0x30:])))
		if n, err := fs.parseNode(b, le.Uint64(b[0x30:])); err == nil && n.level == 0 {
			for i := range n.n {
				n.item(i)
			}
			n.slot(key{1, 2, 3})
		}
	})
}
