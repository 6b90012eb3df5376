package volume

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// try scans disks and reads some of every volume; it must end, and not panic.
func try(disks ...guest.Device) (found int) {
	var list []Disk
	for i, d := range disks {
		list = append(list, Disk{string(rune('a' + i)), d})
	}
	opt := Options{KeyMemory: 1 << 20, Unlock: func(Locked) [][]byte { return nil }}
	volumes, _ := Scan(list, opt)
	b := make([]byte, 8192)
	for i := range volumes {
		v := &volumes[i]
		if v.Device == nil {
			continue
		}
		for _, off := range []int64{0, v.Device.Size() / 2, v.Device.Size() - 4096} {
			if off >= 0 {
				v.Device.ReadAt(b, off)
				v.Map(off, min(4096, v.Device.Size()-off))
			}
		}
	}
	return len(volumes)
}

// sealLabel puts the checksum of a label right, so that a fuzzer gets behind it.
func sealLabel(b []byte) {
	binary.LittleEndian.PutUint32(b[16:], lvmCRC(b[20:512]))
}

func FuzzMBR(f *testing.F) {
	b := []byte{0x80, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0}
	f.Add(b, b)
	f.Fuzz(func(t *testing.T, first, second []byte) {
		disk := make(memory, 16<<10)
		copy(disk[446:], first)
		copy(disk[512+446:], second)
		disk[510], disk[511], disk[1022], disk[1023] = 0x55, 0xaa, 0x55, 0xaa
		try(disk)
	})
}

func FuzzGPT(f *testing.F) {
	f.Add([]byte("EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00"), []byte("0123456789abcdef0123456789abcdef\x10\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, header, entries []byte) {
		disk := make(memory, 32<<10)
		copy(disk[512:1024], header)
		copy(disk[1024:16<<10], entries)
		h := disk[512:]
		le := binary.LittleEndian
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], 1)
		if n := int(le.Uint32(h[80:])) * int(le.Uint32(h[84:])); n >= 0 && n < 8<<10 {
			le.PutUint32(h[88:], crc32.ChecksumIEEE(disk[1024:1024+n]))
		}
		le.PutUint32(h[16:], 0)
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		disk[446+4], disk[446+12], disk[510], disk[511] = mbrProtective, 1, 0x55, 0xaa
		try(disk)
	})
}

const lvmText = `v { extent_size = 8 physical_volumes { a { id = "0123456789abcdef0123456789abcdef" pe_count = 2 } } logical_volumes {
l { status = ["VISIBLE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["a", 0] } } } }`

const someText = `vg { id = "a" seqno = 1 extent_size = 8 physical_volumes { pv0 { id = "0123456789abcdef0123456789abcdef" pe_start = 16 pe_count = 2 } }
logical_volumes { lv { id = "b" status = ["VISIBLE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
r { status = ["VISIBLE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "raid5" stripe_size = 1 raids = ["lv", "lv", "r", "r"] } }
s { status = [] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "thin" thin_pool = "p" device_id = 1 } }
p { status = [] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "thin-pool" metadata = "lv" pool = "lv" } }
n { status = ["VISIBLE"] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "snapshot" origin = "lv" cow_store = "s" } } } }`

func FuzzText(f *testing.F) {
	f.Add([]byte(lvmText))
	f.Add([]byte(someText))
	f.Add([]byte(`a = [1, "\"b\\"] # c`))
	f.Fuzz(func(t *testing.T, text []byte) {
		g, err := parseGroup(text)
		if err != nil {
			return
		}
		s := &scan{names: map[string]bool{}, said: map[string]bool{}}
		disk := make(memory, 64<<10)
		s.group(g, map[string]device{"0123456789abcdef0123456789abcdef": whole{disk, 0}}, 0)
	})
}

func FuzzLabel(f *testing.F) {
	b := make([]byte, 120)
	copy(b, "LABELONE")
	copy(b[24:], "LVM2 001")
	b[20] = 32
	f.Add(b, []byte(" LVM2 x[5A%r0N*>\x01\x00\x00\x00\x00\x10"))
	f.Fuzz(func(t *testing.T, label, area []byte) {
		disk := make(memory, 16<<10)
		copy(disk[:512], label)
		sealLabel(disk)
		copy(disk[4096+4:4096+512], area)
		binary.LittleEndian.PutUint32(disk[4096:], lvmCRC(disk[4096+4:4096+512]))
		try(disk)
	})
}

func FuzzMember(f *testing.F) {
	b := make([]byte, 232)
	le := binary.LittleEndian
	le.PutUint32(b, mdMagic)
	le.PutUint32(b[4:], 1)
	le.PutUint32(b[72:], 5)
	le.PutUint64(b[80:], 8)
	le.PutUint32(b[88:], 1)
	le.PutUint32(b[92:], 2)
	le.PutUint64(b[128:], 16)
	le.PutUint64(b[136:], 16)
	le.PutUint32(b[220:], 4)
	f.Add(b, uint8(1))
	f.Fuzz(func(t *testing.T, super []byte, disks uint8) {
		var all []guest.Device
		for i := range disks % 5 {
			disk := make(memory, 24<<10)
			copy(disk[:1024], super)
			le.PutUint32(disk, mdMagic)
			le.PutUint32(disk[160:], uint32(i))
			le.PutUint16(disk[256+2*int(i):], uint16(i))
			if n := int(le.Uint32(disk[220:])); n < 1000 && n >= 0 {
				le.PutUint32(disk[216:], mdSum(disk[:256+2*n], 216))
			}
			all = append(all, disk)
		}
		try(all...)
	})
}

func FuzzMember0(f *testing.F) {
	f.Add([]byte("\xfc\x4e\x2b\xa9"))
	f.Fuzz(func(t *testing.T, super []byte) {
		disk := make(memory, 128<<10)
		b := disk[64<<10 : 68<<10]
		copy(b, super)
		binary.LittleEndian.PutUint32(b[38*4:], mdSum(b, 38*4))
		try(disk)
	})
}

func FuzzLUKS1(f *testing.F) {
	f.Add([]byte("LUKS\xba\xbe\x00\x01aes"))
	f.Fuzz(func(t *testing.T, b []byte) {
		disk := make(memory, 64<<10)
		copy(disk[:4096], b)
		h, err := readLUKS(disk)
		if err != nil {
			return
		}
		for i := range h.slots {
			h.slots[i].kdf.time = min(h.slots[i].kdf.time, 2)
		}
		for i := range h.digests {
			h.digests[i].time = min(h.digests[i].time, 2)
		}
		h.open(whole{disk, 0}, [][]byte{[]byte("x")}, 1<<20)
	})
}

const someJSON = `{"keyslots":{"0":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":2,"hash":"sha256"},"area":{"type":"raw","offset":"32768","size":"1024",
"encryption":"aes-xts-plain64","key_size":64},"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1,"salt":"PEqI"}}},"segments":{"0":{"type":"crypt","offset":"8192",
"size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":4096}},"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256",
"iterations":1,"salt":"3sR4","digest":"SS8F"}}}`

func FuzzLUKS2(f *testing.F) {
	f.Add([]byte(someJSON))
	f.Fuzz(func(t *testing.T, text []byte) {
		h, err := parseLUKS2(make([]byte, 4096), text)
		if err != nil {
			return
		}
		for i := range h.slots {
			h.slots[i].kdf.time = min(h.slots[i].kdf.time, 2)
		}
		for i := range h.digests {
			h.digests[i].time = min(h.digests[i].time, 2)
		}
		disk := whole{make(memory, 64<<10), 0}
		h.open(disk, [][]byte{[]byte("x")}, 1<<20)
		if dev, err := h.device(disk, make([]byte, 64)); err == nil {
			dev.ReadAt(make([]byte, 5000), 7)
		}
	})
}

func FuzzThin(f *testing.F) {
	le := binary.LittleEndian
	super := make([]byte, 344)
	le.PutUint64(super[32:], thinMagic)
	le.PutUint32(super[40:], 2)
	le.PutUint64(super[320:], 1)
	le.PutUint32(super[336:], 128)
	le.PutUint32(super[340:], 8)
	node := make([]byte, 64)
	le.PutUint32(node[4:], 2)
	le.PutUint32(node[16:], 1)
	le.PutUint32(node[20:], 1)
	le.PutUint32(node[24:], 8)
	f.Add(super, node, node)
	f.Fuzz(func(t *testing.T, super, one, two []byte) {
		disk := make(memory, 3*thinBlock)
		for i, b := range [][]byte{super, one, two} {
			block := disk[i*thinBlock : (i+1)*thinBlock]
			copy(block, b)
			le.PutUint64(block[8:], uint64(i))
			le.PutUint32(block, thinSum(block, []uint32{superXOR, nodeXOR, nodeXOR}[i]))
		}
		p, err := openPool(whole{disk, 0}, whole{make(memory, 128<<10), 0}, 0)
		if err != nil {
			return
		}
		for key := range uint64(4) {
			if root, ok, err := p.lookup(p.mappings, key); err == nil && ok {
				dev := &mapped{layout: &thinVolume{pool: p, root: root}, size: 1 << 20}
				dev.ReadAt(make([]byte, 100<<10), 60<<10)
			}
		}
	})
}

func FuzzSnapshot(f *testing.F) {
	f.Add([]byte("SnAp\x01\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00"), []byte("\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, header, pairs []byte) {
		disk := make(memory, 64<<10)
		copy(disk[4096:], pairs)
		copy(disk, header)
		g := &group{extent: 4096, lvs: map[string]*logical{}}
		b := &builder{group: g, built: map[string]result{"o": {whole{make(memory, 64<<10), 0}, nil}}}
		s := segment{0, 16, "snapshot", &textNode{values: map[string]any{"origin": "o"}}}
		if dev, err := b.snapshot(s, whole{disk, 0}); err == nil {
			dev.ReadAt(make([]byte, dev.Size()), 0)
		}
	})
}

// TestHostile flips bytes of small images of all kinds, thousands of times, and cuts them short.
func TestHostile(t *testing.T) {
	guesttest.Needs(t, "sfdisk", "lvm", "cryptsetup")
	image := guesttest.Sparse(t, 8<<20)
	sfdisk(t, image, "label: dos\n1M,2M,83\n3M,,5\n,1M,83\n,1M,83\n")
	other := guesttest.Sparse(t, 12<<20)
	sfdisk(t, other, "label: gpt\nsize=1M\nsize=2M\n")
	pv := guesttest.Sparse(t, 8<<20)
	l := newLVM(t, pv)
	l.run("vgcreate", "-s", "128k", "vg", l.loops[0])
	l.create("-n", "a", "-L", "1M", "vg")
	l.create("-n", "b", "-L", "1M", "vg")
	l.run("lvextend", "--driverloaded", "n", "-L", "+1M", "vg/a")
	guesttest.Run(t, "sync", pv)
	luks := guesttest.Sparse(t, 20<<20)
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("k"), 0o600); err != nil {
		t.Fatal(err)
	}
	guesttest.Run(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", key, luks)

	turns := 1500
	if testing.Short() {
		turns = 200
	}
	rnd := rand.New(rand.NewPCG(5, 5))
	for i, image := range []string{image, other, pv, luks} {
		whole, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if n := try(memory(whole)); n == 0 {
			t.Fatal("nothing found in image ", i)
		}
		start := time.Now()
		// What is not zero, in the first part, is where flips are worth it.
		var places []int
		part := int64(3 << 20)
		if image == luks {
			part = 20 << 10
		}
		for at, c := range whole[:part] {
			if c != 0 {
				places = append(places, at)
			}
		}
		for range turns {
			at := make([]int, 1+rnd.IntN(4))
			old := make([]byte, len(at))
			for j := range at {
				at[j] = places[rnd.IntN(len(places))]
				old[j] = whole[at[j]]
				whole[at[j]] = byte(rnd.Uint32())
			}
			cut := len(whole)
			if rnd.IntN(8) == 0 {
				cut = rnd.IntN(len(whole))
			}
			try(memory(whole[:cut]))
			for j := len(at) - 1; j >= 0; j-- {
				whole[at[j]] = old[j]
			}
		}
		t.Logf("image %d: %v for %d turns, %d places", i, time.Since(start), turns, len(places))
	}
}
