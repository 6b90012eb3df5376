package reader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path"

	"github.com/zeebo/blake3"
)

const (
	packHeader    = 80
	packTrailer   = 64
	recordHeader  = 56
	tableEntry    = 44
	recordMagic   = 0x52434648
	maxPack       = 1 << 30
	kindChunk     = 0
	kindPage      = 1
	codecRaw      = 0
	codecZstd     = 1
	tag           = 16
	maxPageLength = 36 + 256*32
)

type pack struct {
	id   ID
	key  []byte
	size int64
}

// place is where a record is.
type place struct {
	pack   ID
	offset uint32
	stored uint32 // length of the body
	plain  uint32
	kind   byte
}

func (r *Repo) readPacks(scan bool) error {
	entries, err := fs.ReadDir(r.fsys, "packs")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if err := r.readPack(e.Name(), scan); err != nil {
			r.Damage = append(r.Damage, fmt.Errorf("packs/%s: %w", e.Name(), err))
		}
	}
	return nil
}

func (r *Repo) readPack(name string, scan bool) error {
	p := new(pack)
	if err := unhex(p.id[:], name); err != nil {
		return err
	}
	b, err := fs.ReadFile(r.fsys, path.Join("packs", name))
	if err != nil {
		return err
	}
	if len(b) > maxPack {
		return fmt.Errorf("%d bytes", len(b))
	}
	p.size = int64(len(b))
	p.key = derive("holdfast repository v1 pack", append(bytes.Clone(r.keys.master), p.id[:]...))
	damage := r.checkHeader(b, p)
	r.packs[p.id] = p
	var places map[ID]place
	if damage == nil && !scan {
		places, damage = r.table(b, p)
	}
	if damage != nil || scan {
		var err error
		places, err = r.scan(b, p)
		damage = errors.Join(damage, err)
	}
	for id, at := range places {
		r.records[id] = append(r.records[id], at)
	}
	return damage
}

func (r *Repo) checkHeader(b []byte, p *pack) error {
	switch {
	case len(b) < packHeader:
		return fmt.Errorf("%d bytes", len(b))
	case crc32.Checksum(b[:76], castagnoli) != le32(b[76:]):
		return errors.New("header: wrong CRC")
	case string(b[:8]) != "HFPACK\r\n", le32(b[8:]) != 1, le32(b[12:]) != r.flag():
		return fmt.Errorf("header: %q", b[:16])
	case !bytes.Equal(b[16:32], r.ID[:]):
		return fmt.Errorf("header: of repository %x", b[16:32])
	case !bytes.Equal(b[32:64], p.id[:]):
		return fmt.Errorf("header: of pack %x", b[32:64])
	case !zero(b[64:76]):
		return errors.New("header: not zero where it must be")
	}
	return nil
}

// table reads trailer and table.
func (r *Repo) table(b []byte, p *pack) (map[ID]place, error) {
	if len(b) < packHeader+packTrailer {
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	end := len(b) - packTrailer
	t := b[end:]
	n, e := int64(le32(t)), int64(le32(t[4:]))
	if string(t[56:]) != "HFFOOT\r\n" || e < packHeader || e+n*tableEntry != int64(end) || !zero(t[8:24]) {
		return nil, fmt.Errorf("trailer: %d entries at %d", n, e)
	}
	h := blake3.New()
	h.Write(b[:packHeader])
	h.Write(b[e:end])
	h.Write(t[:24])
	if !bytes.Equal(h.Sum(nil), t[24:56]) {
		return nil, errors.New("trailer: wrong checksum")
	}
	places := map[ID]place{}
	var last ID
	for i := range n {
		row := b[e+i*tableEntry:]
		id := ID(row[:32])
		if i > 0 && bytes.Compare(last[:], id[:]) >= 0 {
			return nil, fmt.Errorf("table: entry %d is not sorted", i)
		}
		last = id
		length := le32(row[40:])
		places[id] = place{
			pack: p.id, offset: le32(row[32:]), stored: le32(row[36:]),
			plain: length &^ (1 << 31), kind: byte(length >> 31),
		}
	}
	return places, nil
}

// scan goes from record to record, and past damage by searching for the next one.
func (r *Repo) scan(b []byte, p *pack) (map[ID]place, error) {
	places := map[ID]place{}
	slots := map[uint32]bool{}
	var damage error
	magic := binary.LittleEndian.AppendUint32(nil, recordMagic)
	for at := packHeader; at < len(b); {
		stored, ok := recordAt(b, at)
		if ok {
			id, slot := ID(b[at+8:at+40]), le32(b[at+52:])
			if slots[slot] {
				damage = errors.Join(damage, fmt.Errorf("record at %d: slot %d again", at, slot))
			}
			slots[slot] = true
			places[id] = place{
				pack: p.id, offset: uint32(at), stored: stored,
				plain: le32(b[at+44:]), kind: b[at+49],
			}
			at += recordHeader + int(stored)
			continue
		}
		if _, err := r.table(b, p); err == nil && at == int(le32(b[len(b)-packTrailer+4:])) {
			return places, damage // the records end where the table begins
		}
		next := -1
		if at+1 < len(b) {
			next = bytes.Index(b[at+1:], magic)
		}
		if next < 0 {
			return places, errors.Join(damage, fmt.Errorf("no record from %d on", at))
		}
		at += 1 + next
	}
	return places, damage
}

// recordAt says whether a good record begins at that offset.
func recordAt(b []byte, at int) (stored uint32, ok bool) {
	if len(b)-at < recordHeader || le32(b[at:]) != recordMagic {
		return 0, false
	}
	stored = le32(b[at+40:])
	if int64(stored) > int64(len(b)-at-recordHeader) {
		return 0, false
	}
	body := b[at+8 : at+recordHeader+int(stored)]
	return stored, crc32.Checksum(body, castagnoli) == le32(b[at+4:])
}

// read returns a chunk or page from the first good copy of it.
func (r *Repo) read(id ID, kind byte) ([]byte, error) {
	err := fmt.Errorf("%s is in no pack", id)
	for _, at := range r.records[id] {
		var plain []byte
		plain, err = r.readRecord(id, kind, at)
		if err == nil {
			return plain, nil
		}
		err = fmt.Errorf("packs/%s: record at %d: %w", at.pack, at.offset, err)
	}
	return nil, err
}

func (r *Repo) readRecord(id ID, kind byte, at place) ([]byte, error) {
	p := r.packs[at.pack]
	if int64(at.offset)+recordHeader+int64(at.stored) > p.size {
		return nil, errors.New("reaches past the end")
	}
	f, err := r.fsys.Open(path.Join("packs", p.id.String()))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	ra, ok := f.(io.ReaderAt)
	if !ok {
		return nil, fmt.Errorf("no ReadAt in %T", f)
	}
	b := make([]byte, recordHeader+int(at.stored))
	if _, err := ra.ReadAt(b, int64(at.offset)); err != nil {
		return nil, err
	}
	stored, ok := recordAt(b, 0)
	length := le32(b[44:])
	switch {
	case !ok:
		return nil, errors.New("wrong magic or CRC")
	case stored != at.stored, length != at.plain, b[49] != at.kind, ID(b[8:40]) != id:
		return nil, errors.New("not what the table says")
	case b[49] != kind:
		return nil, fmt.Errorf("kind %d", b[49])
	case kind == kindChunk && int(length) != r.ChunkSize,
		kind == kindPage && (length > maxPageLength || b[48] != codecRaw):
		return nil, fmt.Errorf("plaintext of %d bytes, codec %d", length, b[48])
	case !zero(b[50:52]):
		return nil, errors.New("not zero where it must be")
	}
	return r.unseal(b, p, id)
}

// unseal opens the body of record b, inflates it, and compares the id.
func (r *Repo) unseal(b []byte, p *pack, id ID) ([]byte, error) {
	body := b[recordHeader:]
	if r.Sealed {
		var err error
		nonce := append(make([]byte, 8), b[52:56]...)
		if body, err = gcm(p.key).Open(nil, nonce, body, b[8:recordHeader]); err != nil {
			return nil, err
		}
	}
	length := int(le32(b[44:]))
	switch b[48] {
	case codecRaw:
	case codecZstd:
		if len(body) >= length {
			return nil, errors.New("compressed, but not shorter")
		}
		var err error
		if body, err = inflate(body, 8<<20); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("codec %d", b[48])
	}
	if len(body) != length {
		return nil, fmt.Errorf("%d bytes, not %d", len(body), length)
	}
	key := r.keys.chunk
	if b[49] == kindPage {
		key = r.keys.page
	}
	if ID(keyed(key, body)) != id {
		return nil, errors.New("the content has another id")
	}
	return body, nil
}

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
