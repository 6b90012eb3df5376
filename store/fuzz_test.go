package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"reflect"
	"testing"
	"time"

	"github.com/zeebo/blake3"
)

// fuzzKeys are of no repository.
func fuzzKeys(sealed bool) *keys { return newKeys([keyLen]byte{1, 2, 3}, sealed) }

// FuzzConfig: what decodes must decode the same after being encoded, and unlock
// must end. The checksum is made right, so that the fuzzer gets behind it.
func FuzzConfig(f *testing.F) {
	for _, plain := range []bool{false, true} {
		c, _, err := newConfig(InitOptions{ChunkSize: MinChunkSize, NoEncryption: plain, Passphrase: []byte("x")}, time.Unix(1e9, 0))
		if err != nil {
			f.Fatal(err)
		}
		b, err := c.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, false)
		f.Add(b[len(configMagic):len(b)-len(configSumLabel)-65], true)
	}
	f.Add([]byte(`{"version":2}`), true)
	f.Fuzz(func(t *testing.T, b []byte, body bool) {
		if body {
			b = append([]byte(configMagic), b...)
			sum := blake3.Sum256(b)
			b = append(append(b, configSumLabel...), hexBytesText(sum[:])...)
			b = append(b, '\n')
		}
		c, err := decodeConfig(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatal(err)
			}
			return
		}
		again, err := c.encode()
		if err != nil {
			return // a time that JSON cannot hold
		}
		c2, err := decodeConfig(again)
		if err != nil || !reflect.DeepEqual(c.aad(), c2.aad()) {
			t.Fatalf("%v: %q, then %q", err, c.aad(), c2.aad())
		}
		for i := range c.Keys { // one that costs little
			if c.Keys[i].MemoryKiB > 64 || c.Keys[i].Time > 2 {
				return
			}
		}
		if _, err := c.unlock([]byte("x")); err != nil && !errors.Is(err, ErrPassphrase) && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	})
}

func hexBytesText(b []byte) []byte {
	s, _ := hexBytes(b).MarshalText()
	return s
}

// fuzzPack is a pack with a chunk and a page, not encrypted.
func fuzzPack() (header, records []byte, recs []PackRecord) {
	header = encodePackHeader([16]byte{1}, PackID{2}, false)
	for i, body := range [][]byte{[]byte("hello hello"), bytes.Repeat([]byte{7}, 68)} {
		b := make([]byte, recordLen, recordLen+len(body))
		h := recordHeader{id: ID{byte(i + 1)}, len: uint32(len(body)), plain: uint32(len(body)), kind: uint8(i), slot: uint32(i)}
		putRecordHeader(b, &h)
		b = append(b, body...)
		putRecordCRC(b)
		recs = append(recs, PackRecord{ID: h.id, Off: uint32(packHeaderLen + len(records)), Len: h.len, Plain: h.plain, Kind: h.kind})
		records = append(records, b...)
	}
	return header, records, recs
}

// FuzzFooter: a table that decodes has only entries inside of the pack, and
// encodes to the same bytes. With mend the checksum is made right.
func FuzzFooter(f *testing.F) {
	header, records, recs := fuzzPack()
	end := packHeaderLen + len(records)
	f.Add(append(append(bytes.Clone(header), records...), encodeFooter(recs, header, uint32(end))...), false)
	f.Add(append(append(bytes.Clone(header), records...), encodeFooter(recs, header, uint32(end))...), true)
	f.Add(append(bytes.Clone(header), encodeFooter(nil, header, packHeaderLen)...), true)
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if mend && len(b) >= packHeaderLen+trailerLen {
			b = bytes.Clone(b)
			copy(b, header)
			n := int64(binary.LittleEndian.Uint32(b[len(b)-trailerLen:]))
			if start := int64(len(b)) - trailerLen - n*footerEntryLen; start >= packHeaderLen {
				sum := footerSum(header, b[start:len(b)-40])
				copy(b[len(b)-40:], sum[:])
				copy(b[len(b)-8:], trailerMagic[:])
			}
		}
		recs, err := readFooter(bytes.NewReader(b), int64(len(b)), [16]byte{1}, PackID{2}, false)
		if err != nil {
			return
		}
		for _, r := range recs {
			if int(r.Off) < packHeaderLen || int64(r.Off)+recordLen+int64(r.Len) > int64(len(b)) || r.Plain > MaxChunkSize {
				t.Fatalf("%+v in %d bytes", r, len(b))
			}
		}
	})
}

// FuzzScan: scanning ends, gives only records with a right CRC-32C that lie
// inside of the pack and do not overlap, and opening them does not panic.
func FuzzScan(f *testing.F) {
	header, records, recs := fuzzPack()
	f.Add(append(bytes.Clone(header), records...))
	f.Add(append(append(bytes.Clone(header), records[5:]...), encodeFooter(recs, header, 99)...))
	f.Add(bytes.Repeat([]byte("HFCR"), 50))
	r := &Repo{keys: fuzzKeys(false)}
	f.Fuzz(func(t *testing.T, b []byte) {
		end := int64(0)
		dst := make([]byte, MinChunkSize)
		got, err := scanRecords(bytes.NewReader(b), int64(len(b)), func(off int64, h recordHeader, raw []byte) error {
			if off < end || off+int64(len(raw)) > int64(len(b)) || len(raw) != recordLen+int(h.len) {
				t.Fatalf("%d bytes at %d, after %d", len(raw), off, end)
			}
			if crc32.Checksum(raw[8:], castagnoli) != h.crc || !bytes.Equal(raw, b[off:off+int64(len(raw))]) {
				t.Fatalf("record at %d", off)
			}
			end = off + int64(len(raw))
			_, _ = r.openRecord(bytes.Clone(raw), h.id, h.kind, box{}, dst, true)
			return nil
		})
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
		if end > 0 && got != end {
			t.Fatalf("ends at %d, not %d", got, end)
		}
	})
}

// FuzzRecord: any body behind a right header and CRC-32C is refused or decoded to
// the length that the header says.
func FuzzRecord(f *testing.F) {
	enc, err := newEncoder()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(enc.EncodeAll(make([]byte, 1000), nil), uint32(1000), uint8(codecZstd))
	f.Add([]byte("raw"), uint32(3), uint8(codecRaw))
	r := &Repo{keys: fuzzKeys(false)}
	dst := make([]byte, MinChunkSize)
	f.Fuzz(func(t *testing.T, body []byte, plain uint32, codec uint8) {
		b := make([]byte, recordLen)
		putRecordHeader(b, &recordHeader{id: ID{1}, len: uint32(len(body)), plain: plain, codec: codec})
		b = append(b, body...)
		putRecordCRC(b)
		got, err := r.openRecord(b, ID{1}, KindChunk, box{}, dst, false)
		if err == nil && len(got) != int(plain) {
			t.Fatalf("%d bytes, want %d", len(got), plain)
		}
	})
}

// FuzzPage: what decodes encodes to the same bytes.
func FuzzPage(f *testing.F) {
	p := page{level: 1}
	p.ids[0], p.ids[255] = ID{1}, ID{2}
	f.Add(p.encode(nil), uint8(1))
	f.Add((&page{}).encode(nil), uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, level uint8) {
		var p page
		if decodePage(b, level, &p) == nil && (!bytes.Equal(p.encode(nil), b) || p.level != level) {
			t.Fatalf("%x encodes to %x", b, p.encode(nil))
		}
	})
}

// FuzzManifest decodes manifests as they are, and frames sealed by the right key.
func FuzzManifest(f *testing.F) {
	k, id := fuzzKeys(false), PointID{9}
	b, err := encodePoint(&Point{ID: id, Name: "n", Disks: []Disk{{Name: "disk0", Size: 1, Root: make([]byte, 32)}}}, [16]byte{1}, k)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, false)
	f.Add(b[pointHeaderLen:len(b)-tagLen-4], true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			h := make([]byte, pointHeaderLen)
			copy(h, pointMagic[:])
			h[8], h[16], h[32] = pointVersion, 1, 9
			binary.LittleEndian.PutUint64(h[64:], uint64(len(b)))
			b = append(h, k.sealSmall(ctxPoint, h[48:64], h, b)...)
			b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
		}
		p, err := decodePoint(b, id, [16]byte{1}, k)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatal(err)
			}
			return
		}
		for i := range p.Disks {
			if d := &p.Disks[i]; d.Map().Size < 0 {
				t.Fatal(d)
			}
		}
	})
}

// FuzzSummary: what decodes decodes the same after being encoded.
func FuzzSummary(f *testing.F) {
	f.Add((&Summary{VM: "vm", Name: "n", Tags: []string{"a", ""}, Time: time.Unix(1e9, 0)}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSummary(b)
		if err != nil {
			return
		}
		again, err := decodeSummary(s.encode())
		if err != nil || !reflect.DeepEqual(s, again) {
			t.Fatalf("%v: %+v, then %+v", err, s, again)
		}
	})
}

// FuzzVerifyState decodes states as they are, and JSON sealed by the right key. What decodes
// decodes the same after being encoded.
func FuzzVerifyState(f *testing.F) {
	k, repo := fuzzKeys(false), [16]byte{1}
	at := time.Unix(1e9, 0).UTC()
	s := &verifyState{
		Pass: &verifyPass{Began: at, After: PackID{1}, Packs: 2, Read: 3}, Ended: at, Unlisted: 1,
		Damage:  []damageRecord{{ID: ID{1}, Pack: PackID{2}, Off: 80, Error: "checksum", Found: at}, {ID: ID{2}, Kind: KindPage, Error: "nowhere", Found: at}},
		Touched: []touch{{Point: PointID{1}, Disk: "disk0", Found: at, More: true, Places: []touchedPlace{{65536, ID{1}}, {0, ID{2}}}}},
	}
	b, err := s.encode(repo, k)
	if err != nil {
		f.Fatal(err)
	}
	plain, err := s.marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, false)
	f.Add(plain, true)
	f.Add([]byte(`{"damage":[{"id":"01"}],"touched":[{"places":[[0,9]]}]}`), true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal {
			h := make([]byte, verifyHeaderLen)
			copy(h, verifyMagic[:])
			h[8], h[16] = verifyVersion, 1
			var err error
			if b, err = sealObject(h, ctxVerify, b, k); err != nil {
				t.Fatal(err)
			}
		}
		s, err := decodeVerifyState(b, repo, k)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewerFormat) {
				t.Fatal(err)
			}
			return
		}
		s.limit()
		one, err := s.marshal()
		if err != nil {
			return // a time that JSON cannot hold
		}
		raw, err := s.encode(repo, k)
		if err != nil {
			t.Fatal(err)
		}
		if s, err = decodeVerifyState(raw, repo, k); err != nil {
			t.Fatal(err)
		}
		if two, err := s.marshal(); err != nil || !bytes.Equal(one, two) {
			t.Fatalf("%v: %s, then %s", err, one, two)
		}
	})
}
