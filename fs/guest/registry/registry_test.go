package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Size() int64                             { return int64(len(m)) }

// dump is guesttest.HiveDump by this package, each line as JSON.
func dump(h *Hive) ([]string, error) {
	var out []string
	root, err := h.Root()
	if err != nil {
		return nil, err
	}
	return out, dumpKey(&out, root, []string{})
}

// maxDump ends the dump of a hive that somebody has broken, lines.
const maxDump = 1 << 20

func dumpKey(out *[]string, k *Key, path []string) error {
	say := func(words ...any) {
		b, _ := json.Marshal(words)
		*out = append(*out, string(b))
	}
	if len(*out) > maxDump {
		return errors.New("no end")
	}
	var stamp any = int64(0)
	if !k.Written.IsZero() {
		stamp = (k.Written.Unix()+11644473600)*1e7 + int64(k.Written.Nanosecond())/100
	}
	say(path, stamp)
	var bad error
	for v, err := range k.Values() {
		if err != nil {
			bad = err
			break
		}
		b, err := v.Bytes()
		if err != nil {
			bad = err
			continue
		}
		say(path, v.Name, v.Type, len(b), fmt.Sprintf("%x", sha256.Sum256(b)))
	}
	for c, err := range k.Keys() {
		if err != nil {
			return errors.Join(bad, err)
		}
		if err := dumpKey(out, c, append(slices.Clone(path), c.Name)); err != nil {
			bad = err
		}
	}
	return bad
}

// same compares what we read with what hivex reads.
func same(t *testing.T, image string, h *Hive) {
	t.Helper()
	got, err := dump(h)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for line := range strings.Lines(guesttest.HiveDump(t, image)) {
		var words []any
		d := json.NewDecoder(strings.NewReader(line))
		d.UseNumber()
		if err := d.Decode(&words); err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(words)
		want = append(want, string(b))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		t.Errorf("%d lines, hivex has %d", len(got), len(want))
		for i := range want {
			if i >= len(got) || got[i] != want[i] {
				t.Fatalf("hivex: %s", want[i])
			}
		}
	}
	t.Logf("%d lines", len(got))
}

func open(t testing.TB, image string) *Hive {
	t.Helper()
	h, err := Open(guesttest.OpenDevice(t, image))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// sample is a tree of all kinds of values and names.
func sample() []guesttest.HiveValue {
	rnd := rand.New(rand.NewPCG(1, 1))
	var list []guesttest.HiveValue
	for i := range 300 {
		list = append(list, guesttest.HiveValue{Key: fmt.Sprintf(`Many\key %d`, rnd.IntN(1e6)), Type: guesttest.KeyOnly})
		data := make([]byte, i%7*i)
		for j := range data {
			data[j] = byte(rnd.Uint32())
		}
		list = append(list, guesttest.HiveValue{Key: `Values`, Name: fmt.Sprint("v", i), Type: uint32(i % 13), Data: data})
	}
	deep := `Deep`
	for i := range 60 {
		deep += fmt.Sprint(`\d`, i)
	}
	utf := func(s string) []byte {
		var b []byte
		for _, r := range s {
			b = le.AppendUint16(b, uint16(r))
		}
		return b
	}
	return append(list,
		guesttest.HiveValue{Key: deep, Name: "", Type: 1, Data: utf("bottom\x00")},
		guesttest.HiveValue{Key: `Names\Größe`, Name: "naïve", Type: 4, Data: []byte{1, 2, 3, 4}},
		guesttest.HiveValue{Key: `Names\Ключ`, Name: "имя", Type: 11, Data: []byte{1, 2, 3, 4, 5, 6, 7, 8}},
		guesttest.HiveValue{Key: `Names\Ключ`, Name: "big", Type: 5, Data: []byte{0, 0, 1, 0}},
		guesttest.HiveValue{Key: `Names\Ключ`, Name: "list", Type: 7, Data: utf("a\x00b c\x00\x00")},
		guesttest.HiveValue{Key: `Names\Ключ`, Name: "path", Type: 2, Data: utf(`%SystemRoot%\x` + "\x00")},
	)
}

// TestHivex: hives that hivex writes read as hivex reads them.
func TestHivex(t *testing.T) {
	image := guesttest.Hive(t, sample())
	h := open(t, image)
	same(t, image, h)
	k, err := h.Key(`names\КЛЮЧ`)
	if err != nil {
		t.Fatal(err)
	}
	text := func(name string) string {
		v, err := k.Value(name)
		if err != nil {
			t.Fatal(err)
		}
		switch v.Type {
		case Expand:
			s, err := v.Text()
			return fmt.Sprint(s, err)
		case Strings:
			s, err := v.Texts()
			return fmt.Sprintf("%q %v", s, err)
		}
		n, err := v.Number()
		return fmt.Sprint(n, err)
	}
	for name, want := range map[string]string{"PATH": `%SystemRoot%\x<nil>`, "list": `["a" "b c"] <nil>`, "ИМЯ": "578437695752307201 <nil>", "big": "256 <nil>"} {
		if got := text(name); got != want {
			t.Errorf("%s: %s, not %s", name, got, want)
		}
	}
	for _, path := range []string{`Names\nothing`, `nothing`, `Many\key`, `ÄÖ`} {
		if _, err := h.Key(path); !errors.Is(err, guest.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := k.Value("nothing"); !errors.Is(err, guest.ErrNotExist) {
		t.Error(err)
	}
	root, _ := h.Root()
	for c, err := range root.Keys() {
		if err != nil {
			t.Fatal(err)
		}
		found, err := h.Key(strings.ToLower(c.Name))
		if err != nil || found.Name != c.Name {
			t.Errorf("%s: %v", c.Name, err)
		}
	}
}

// builder makes hives with what hivex does not write.
type builder struct{ bins []byte }

func (b *builder) cell(content []byte) uint32 {
	if b.bins == nil {
		b.bins = make([]byte, 32)
		copy(b.bins, "hbin")
	}
	at := len(b.bins)
	size := (4 + len(content) + 7) &^ 7
	b.bins = append(b.bins, make([]byte, size)...)
	le.PutUint32(b.bins[at:], uint32(-size))
	copy(b.bins[at+4:], content)
	return uint32(at)
}

func (b *builder) key(name string, parent uint32) uint32 {
	nk := make([]byte, nodeHead, nodeHead+len(name))
	copy(nk, "nk\x20\x00")
	le.PutUint32(nk[16:], parent)
	for _, at := range []int{28, 32, 40, 44, 48} {
		le.PutUint32(nk[at:], none)
	}
	le.PutUint16(nk[72:], uint16(len(name)))
	return b.cell(append(nk, name...))
}

func (b *builder) set(cell uint32, at int, v uint32) { le.PutUint32(b.bins[int(cell)+4+at:], v) }

// list makes a list of keys of one of the kinds.
func (b *builder) list(kind string, keys []uint32, names []string) uint32 {
	l := binary.LittleEndian.AppendUint16([]byte(kind), uint16(len(keys)))
	for i, k := range keys {
		l = le.AppendUint32(l, k)
		hash, _ := hashOf(upper(names[i]))
		switch kind {
		case "lf":
			l = append(l, (names[i] + "\x00\x00\x00\x00")[:4]...)
		case "lh":
			l = le.AppendUint32(l, hash)
		}
	}
	return b.cell(l)
}

// build makes a hive whose root has keys in lists of all kinds below an index root, and a value of big data.
func build() []byte {
	b := &builder{}
	root := b.key("root", none)
	index, total := []byte("ri\x03\x00"), 0
	for _, kind := range []string{"lf", "lh", "li"} {
		var keys []uint32
		var names []string
		for i := range 40 {
			names = append(names, fmt.Sprintf("%s%03d", kind, i))
			keys = append(keys, b.key(names[i], root))
		}
		index = le.AppendUint32(index, b.list(kind, keys, names))
		total += len(keys)
	}
	b.set(root, 20, uint32(total))
	b.set(root, 28, b.cell(index))
	const size = 2*segment + 999
	data := make([]byte, size)
	rnd := rand.New(rand.NewPCG(4, 4))
	for i := range data {
		data[i] = byte(rnd.Uint32())
	}
	var pieces []byte
	for piece := range slices.Chunk(data, segment) {
		pieces = le.AppendUint32(pieces, b.cell(piece))
	}
	db := b.cell(le.AppendUint32([]byte("db\x03\x00"), b.cell(pieces)))
	vk := make([]byte, valueHead)
	copy(vk, "vk")
	le.PutUint16(vk[2:], 3)
	le.PutUint32(vk[4:], size)
	le.PutUint32(vk[8:], db)
	le.PutUint32(vk[12:], 3)
	le.PutUint16(vk[16:], valueLatin)
	b.set(root, 36, 1)
	b.set(root, 40, b.cell(le.AppendUint32(nil, b.cell(append(vk, "big"...)))))
	if free := (-len(b.bins) & (pageSize - 1)); free > 0 {
		at := len(b.bins)
		b.bins = append(b.bins, make([]byte, free)...)
		le.PutUint32(b.bins[at:], uint32(free))
	}
	le.PutUint32(b.bins[8:], uint32(len(b.bins)))
	out := append(make([]byte, baseSize), b.bins...)
	guesttest.SealHive(out, 5, root, uint32(len(b.bins)))
	return out
}

// TestBuilt: lists of all kinds and big data read as hivex reads them.
func TestBuilt(t *testing.T) {
	image := t.TempDir() + "/hive"
	if err := os.WriteFile(image, build(), 0o644); err != nil {
		t.Fatal(err)
	}
	h := open(t, image)
	same(t, image, h)
	for _, name := range []string{"LF000", "lf039", "LH007", "li020"} {
		if k, err := h.Key(name); err != nil || !strings.EqualFold(k.Name, name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
