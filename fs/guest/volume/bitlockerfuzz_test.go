package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

func le2(n int) []byte { return binary.LittleEndian.AppendUint16(nil, uint16(n)) }
func le4(n int) []byte { return binary.LittleEndian.AppendUint32(nil, uint32(n)) }
func le8(n int) []byte { return binary.LittleEndian.AppendUint64(nil, uint64(n)) }

func fuzzDatum(role, kind int, parts ...[]byte) []byte {
	data := slices.Concat(parts...)
	return slices.Concat(le2(8+len(data)), le2(role), le2(kind), le2(1), data)
}

// FuzzBitLocker tries a boot sector, metadata and a key, with the checksum put right.
func FuzzBitLocker(f *testing.F) {
	const at = 64 << 10
	boot := make([]byte, 200)
	copy(boot, "\xeb\x58\x90"+bitLockerSign+"\x00\x02\x08")
	copy(boot[160:], bitLockerGUID)
	binary.LittleEndian.PutUint64(boot[176:], at)
	set := slices.Concat(fuzzDatum(3, datumSealed, make([]byte, 44)), fuzzDatum(2, datumProtector, make([]byte, 26), le2(protectRecovery),
		fuzzDatum(0, datumStretch, make([]byte, 20)), fuzzDatum(0, datumSealed, make([]byte, 44))))
	block := slices.Concat([]byte(bitLockerSign), le2(32), le2(2), le4(0), le8(128<<10), le4(0), le4(16), le8(at), le8(0), le8(0), le8(32<<10),
		le4(48+len(set)), le4(1), le4(48), le4(0), make([]byte, 20), le2(0x8004), make([]byte, 10), set)
	f.Add(boot, block, []byte("key"))
	f.Add(boot, block, slices.Concat(le4(76), le4(1), le4(48), make([]byte, 36), fuzzDatum(6, datumExternal, make([]byte, 20))))
	f.Fuzz(func(t *testing.T, boot, block, key []byte) {
		disk := make(memory, 256<<10)
		copy(disk[:512], boot)
		b := disk[at : at+64<<10]
		copy(b, block)
		if size := 16 * int(binary.LittleEndian.Uint16(b[8:])); size < len(b)-8 {
			binary.LittleEndian.PutUint32(b[size+4:], crc32.ChecksumIEEE(b[:size]))
		}
		newSecret(key)
		unseal(make([]byte, 32), key)
		all, _, err := readBitLocker(disk)
		if err != nil {
			return
		}
		for _, h := range all {
			_ = h.String()
			h.unlock([]secret{{external: externalKeys(key)}}, stretcher{}) // no others: they are slow
			dev, err := h.device(whole{disk, 0}, make([]byte, 2*max(16, h.method.key)))
			if err != nil {
				continue
			}
			if err := guest.ReadFull(dev, make([]byte, dev.Size()), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestBitLockerHostile flips bytes of a small volume that needs no key, thousands of times, and cuts it short.
func TestBitLockerHostile(t *testing.T) {
	plain := make([]byte, 1536<<10)
	for i := range plain {
		plain[i] = byte(i)
	}
	m := guesttest.BitLocker{Method: 0x8000, Sector: 512, Header: 8192, Protectors: []string{"tpm", "external", "clear"}}
	v := m.Make(plain, 512<<10, 3)
	if got, _ := openMemory(t, v.Image, Options{}); got.Err != nil || !bytes.Equal(readAll(t, got.Device), v.Plain) {
		t.Fatalf("%+v", got)
	}
	turns := 2000
	if testing.Short() {
		turns = 200
	}
	rnd, start, opened := rand.New(rand.NewPCG(6, 6)), time.Now(), 0
	size := 16 * int(binary.LittleEndian.Uint16(v.Image[v.Metadata[0]+8:]))
	good := bytes.Clone(v.Image)
	for range turns {
		copy(v.Image, good)
		for range 1 + rnd.IntN(4) {
			if rnd.IntN(5) == 0 {
				v.Image[rnd.IntN(512)] = byte(rnd.Uint32())
				continue
			}
			in, c := rnd.IntN(size+100), byte(rnd.Uint32())
			for _, at := range v.Metadata { // in all copies, often with the checksum right
				v.Image[at+in] = c
			}
		}
		if rnd.IntN(4) > 0 {
			for _, at := range v.Metadata {
				binary.LittleEndian.PutUint32(v.Image[at+size+4:], crc32.ChecksumIEEE(v.Image[at:at+size]))
			}
		}
		cut := len(v.Image)
		if rnd.IntN(8) == 0 {
			cut = rnd.IntN(cut)
		}
		list, _ := Scan([]Disk{{"d", memory(v.Image[:cut])}}, Options{})
		if len(list) == 1 && list[0].Encryption != "" && list[0].Device != nil {
			opened++
			dev := list[0].Device
			b := make([]byte, min(128<<10, dev.Size()))
			if err := errors.Join(guest.ReadFull(dev, b, 0), guest.ReadFull(dev, b, dev.Size()-int64(len(b)))); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%v, opened %d times", time.Since(start), opened)
}
