package folder

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

const (
	stateMagic = "HFFOLD1\n"
	stateHead  = len(stateMagic) + 8
	maxState   = 16 << 20 // bytes
	maxKey     = 1024     // bytes
	maxPath    = 32 << 10 // bytes
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// entry is what is kept of a placed file.
type entry struct {
	key     string
	removed bool
	at      slot
	path    string // of the directory, if it cannot be found by its ID
	over    nfs.ID // file of data/ to be removed when it is found at the name; File 0 for none
	yields  nfs.ID // this file is removed when that one is found at the name; File 0 for none

	mode, uid, gid              uint32
	accessed, modified, changed int64 // nanoseconds since 1970
	ceiling                     int64 // up to when it may have been modified since; 0 for not at all
}

func (e *entry) append(b []byte) []byte {
	le := binary.LittleEndian
	flags := byte(0)
	if e.removed {
		flags = 1
	}
	b = append(appendString(b, e.key), flags)
	b = appendID(b, e.at.dir)
	b = appendString(b, e.at.name)
	b = appendString(b, e.path)
	b = appendID(appendID(b, e.over), e.yields)
	for _, v := range []uint32{e.mode, e.uid, e.gid} {
		b = le.AppendUint32(b, v)
	}
	for _, v := range []int64{e.accessed, e.modified, e.changed, e.ceiling} {
		b = le.AppendUint64(b, uint64(v))
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(s))), s...)
}

func appendID(b []byte, id nfs.ID) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, id.File), id.Generation)
}

func encodeState(list []entry) []byte {
	b := append(make([]byte, 0, 4096), stateMagic...)
	b = b[:stateHead]
	for i := range list {
		b = list[i].append(b)
	}
	copy(b[len(stateMagic):], sumOf(b[stateHead:]))
	return b
}

// sumOf is what is said of the body in the head.
func sumOf(body []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(body)))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(body, crcTable))
}

// decodeState refuses what encodeState would not write.
func decodeState(b []byte) ([]entry, error) {
	if len(b) < stateHead || string(b[:len(stateMagic)]) != stateMagic {
		return nil, ErrDamaged
	}
	body := b[stateHead:]
	if !bytes.Equal(b[len(stateMagic):stateHead], sumOf(body)) {
		return nil, ErrDamaged
	}
	var list []entry
	keys := map[string]bool{}
	for d := (decoder{b: body}); len(d.b) > 0; {
		e := d.entry()
		if d.bad || keys[e.key] || e.key == "" || len(e.key) > maxKey || len(e.path) > maxPath || checkName(e.at.name) != nil {
			return nil, ErrDamaged
		}
		keys[e.key] = true
		list = append(list, e)
	}
	return list, nil
}

// decoder takes values off its beginning. After one that was not there it is bad, and gives zeros.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if n > len(d.b) {
		d.bad, d.b = true, nil
		return make([]byte, n)
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u32() uint32    { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) u64() uint64    { return binary.LittleEndian.Uint64(d.take(8)) }
func (d *decoder) string() string { return string(d.take(int(binary.LittleEndian.Uint16(d.take(2))))) }
func (d *decoder) id() nfs.ID     { return nfs.ID{File: d.u64(), Generation: d.u64()} }

func (d *decoder) entry() (e entry) {
	e.key = d.string()
	flags := d.take(1)[0]
	e.removed = flags == 1
	d.bad = d.bad || flags > 1
	e.at.dir = d.id()
	e.at.name = d.string()
	e.path = d.string()
	e.over, e.yields = d.id(), d.id()
	e.mode, e.uid, e.gid = d.u32(), d.u32(), d.u32()
	for _, v := range []*int64{&e.accessed, &e.modified, &e.changed, &e.ceiling} {
		*v = int64(d.u64())
	}
	return e
}

// loadState reads the state in dir; none is an empty one.
func loadState(dir string) ([]entry, error) {
	f, err := os.Open(filepath.Join(dir, stateName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxState {
		return nil, fmt.Errorf("%w: over %d bytes", ErrDamaged, maxState)
	}
	return decodeState(b)
}

// save replaces the state durably. f.saving is held.
func (f *Folder) save(list []entry) error {
	b := encodeState(list)
	if len(b) > maxState {
		return syscall.ENOSPC
	}
	name := filepath.Join(f.dir, stateName)
	to, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = to.Write(b)
	err = errors.Join(err, to.Sync(), to.Close())
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
