package reader_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"testing"

	"github.com/zeebo/blake3"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/test/reader"
)

// TestNewerFormat: a config, manifest or pack of a later version is refused as
// such, by both readers, and is no damage. The sums are right, as a later program would make them;
// with a wrong one it is damage.
func TestNewerFormat(t *testing.T) {
	const version = 2
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	golden := fsObjects(t, os.DirFS("testdata/v1/encrypted"))
	s := &subject{objects: golden}
	pack, point := s.names("packs/")[0], s.names("points/")[0]
	changes := map[string]func(b []byte) []byte{
		"config": func(b []byte) []byte {
			body, _, _ := bytes.Cut(b, []byte("\nblake3 "))
			body = bytes.Replace(body, []byte(`"version": 1`), fmt.Appendf(nil, `"version": %d`, version), 1)
			return fmt.Appendf(bytes.Clone(body), "\nblake3 %x\n", blake3.Sum256(body))
		},
		point: func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[8:], version)
			binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
			return b
		},
		pack: func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[8:], version)
			binary.LittleEndian.PutUint32(b[76:], crc32.Checksum(b[:76], castagnoli))
			return b
		},
	}
	changes["config.copy"] = changes["config"]
	for name, change := range changes {
		m := maps.Clone(golden)
		m[name] = change(bytes.Clone(m[name]))
		if err := openAs(t, m, "golden"); !errors.Is(err, store.ErrNewerFormat) || errors.Is(err, store.ErrDamaged) {
			t.Errorf("%s of version %d: %v", name, version, err)
		}
		r, err := reader.Open(m.fs(), reader.Options{Passphrase: "golden"})
		if err == nil && len(r.Damage) == 0 && name != "config.copy" {
			t.Errorf("the independent reader takes %s of version %d", name, version)
		}
		// The same bytes without the right sum are damaged, not newer.
		m[name] = bytes.Clone(m[name])
		m[name][8+len(m[name])%4] ^= 0x40
		if err := openAs(t, m, "golden"); errors.Is(err, store.ErrNewerFormat) {
			t.Errorf("%s damaged: %v", name, err)
		}
	}
}

func openAs(t *testing.T, m objectMap, password string) error {
	opt := openOptions(t)
	opt.Passphrase = func() ([]byte, error) { return []byte(password), nil }
	repo, err := store.Open(t.Context(), memoryOf(t, m), store.MemoryIndex(), opt)
	if err != nil {
		return err
	}
	return repo.Close()
}
