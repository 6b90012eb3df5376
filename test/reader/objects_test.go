package reader_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/test/reader"
)

// loss is one way to damage whole objects.
type loss struct {
	name   string
	hit    []string // objects that verification must name, any of them
	do     func(m objectMap)
	silent bool // nothing can tell: verification need not find it
	whole  bool // every point must still read right
}

// losses are the ways that are tried on s; other is another repository.
func losses(s, other *subject) (list []loss) {
	packs, points := s.names("packs/"), s.names("points/")
	cut := func(name string, n int) func(objectMap) {
		return func(m objectMap) { m[name] = m[name][:n:n] }
	}
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		l := len(s.objects[name])
		for _, n := range []int{0, 1, 20, 71, 79, 80, 136, 143, 144, l / 3, l / 2, l - 200, l - 65, l - 64, l - 63, l - 1} {
			if n >= 0 && n < l {
				list = append(list, loss{name: fmt.Sprintf("%s cut to %d of %d bytes", name, n, l), hit: []string{name}, do: cut(name, n)})
			}
		}
		for _, n := range []int{1, 64, 5000} {
			list = append(list, loss{name: fmt.Sprintf("%s longer by %d", name, n), hit: []string{name},
				do: func(m objectMap) { m[name] = append(bytes.Clone(m[name]), make([]byte, n)...) }})
		}
		list = append(list, loss{name: name + " gone", hit: []string{name}, silent: !strings.HasPrefix(name, "config"),
			do: func(m objectMap) { delete(m, name) }})
	}
	swap := func(a, b string) func(objectMap) {
		return func(m objectMap) { m[a], m[b] = m[b], m[a] }
	}
	fresh := strings.Repeat("ab", 32)
	foreignPack, foreignPoint := other.names("packs/")[0], other.names("points/")[0]
	return append(list,
		loss{name: "two packs swapped", hit: packs, do: swap(packs[0], packs[1])},
		loss{name: "two manifests swapped", hit: points, do: swap(points[0], points[1])},
		loss{name: "a manifest under another id", hit: []string{"points/" + fresh[:32]}, whole: true,
			do: func(m objectMap) { m["points/"+fresh[:32]] = m[points[0]] }},
		loss{name: "the first pack under another id", hit: []string{"packs/" + fresh}, whole: true,
			do: func(m objectMap) { m["packs/"+fresh] = m[packs[0]] }},
		loss{name: "the second pack under another id", hit: []string{"packs/" + fresh}, whole: true,
			do: func(m objectMap) { m["packs/"+fresh] = m[packs[1]] }},
		loss{name: "a foreign pack", hit: []string{foreignPack}, whole: true,
			do: func(m objectMap) { m[foreignPack] = other.objects[foreignPack] }},
		loss{name: "a foreign pack in the place of one", hit: []string{packs[0]},
			do: func(m objectMap) { m[packs[0]] = other.objects[foreignPack] }},
		loss{name: "a foreign manifest", hit: []string{foreignPoint}, whole: true,
			do: func(m objectMap) { m[foreignPoint] = other.objects[foreignPoint] }},
		loss{name: "a foreign config.copy", hit: []string{"config.copy"}, whole: true,
			do: func(m objectMap) { m["config.copy"] = other.objects["config.copy"] }},
		loss{name: "a manifest of 64 MiB and more", hit: []string{points[0]},
			do: func(m objectMap) { m[points[0]] = make([]byte, 64<<20+1) }},
		loss{name: "files of other names", silent: true, whole: true, do: func(m objectMap) {
			m["packs/readme"], m["points/readme"], m["packs/"+strings.Repeat("z", 64)] = []byte("x"), []byte("x"), nil
		}},
	)
}

func (s *subject) names(prefix string) (list []string) {
	for _, name := range slices.Sorted(maps.Keys(s.objects)) {
		if strings.HasPrefix(name, prefix) {
			list = append(list, name)
		}
	}
	return list
}

// TestLostObjects damages whole objects, with an index from before, clean and
// not, and with none. A backup made afterwards must be whole.
func TestLostObjects(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprint("plain ", plain), func(t *testing.T) {
			s, other := newSubject(t, plain, false), newSubject(t, plain, false)
			list := losses(s, other)
			if testing.Short() {
				list = list[len(list)-11:] // without each object cut at each length
			}
			parallel(len(list), func(i int) {
				for _, kind := range []string{"old, clean", "old, not clean", "new"} {
					var index store.IndexOpener
					switch kind {
					case "new":
						index = store.MemoryIndex()
					default:
						index = s.index.clone().opener(kind == "old, clean")
					}
					if err := list[i].try(t, s, kind, index); err != nil {
						t.Errorf("%s, index %s: %v", list[i].name, kind, err)
					}
				}
			})
			t.Logf("%d losses, with three indexes each", len(list))
		})
	}
}

func (l loss) try(t *testing.T, s *subject, kind string, index store.IndexOpener) error {
	m := maps.Clone(s.objects)
	l.do(m)
	v, err := s.examine(t, m, index, rand.New(rand.NewPCG(1, 2)))
	if err != nil {
		return err
	}
	// What the index has never heard of, or has been told to forget, leaves no trace.
	unseen := kind == "old, clean" && l.whole && strings.HasPrefix(l.hit0(), "packs/")
	named := slices.ContainsFunc(l.hit, func(object string) bool { return s.named(v.findings, object) })
	lost := len(v.findings) > 0
	if !named && !l.silent && !unseen {
		return fmt.Errorf("verification does not name it: %v", v.findings)
	}
	if len(v.failed) > 0 && !lost && !strings.HasPrefix(l.hit0(), "points/") {
		return fmt.Errorf("verification finds nothing, but: %v", v.failed)
	}
	if l.whole && len(v.failed) > 0 {
		return fmt.Errorf("cannot be read: %v", v.failed)
	}
	if hit := l.hit0(); kind != "new" && strings.HasPrefix(hit, "packs/") && len(m[hit]) == len(s.objects[hit]) {
		return nil // other bytes of the same length: only reading them shows it, which a backup does not
	}
	return s.backAgain(t, m, kind)
}

func (l loss) hit0() string {
	if len(l.hit) == 0 {
		return ""
	}
	return l.hit[0]
}

// backAgain makes one more point and reads it with the independent reader.
func (s *subject) backAgain(t *testing.T, m objectMap, kind string) error {
	index := store.MemoryIndex()
	if kind != "new" {
		index = s.index.clone().opener(kind == "old, clean")
	}
	b := memoryOf(t, m)
	opt := openOptions(t)
	opt.Warn = nil
	repo, err := store.Open(t.Context(), b, index, opt)
	if err != nil {
		return err
	}
	defer repo.Close()
	vm := *s.machine
	p, err := backup.Run(t.Context(), repo, &vm, backup.Options{})
	if err != nil {
		return fmt.Errorf("the next backup: %w", err)
	}
	r, err := reader.Open(objects(t, b).fs(), reader.Options{Passphrase: secret})
	if err != nil {
		return err
	}
	for _, q := range r.Points {
		if q.ID != p.ID.String() {
			continue
		}
		for i, d := range q.Disks {
			got, err := r.Bytes(d)
			if err != nil {
				return fmt.Errorf("the next backup has what was lost: %s: %w", d.Name, err)
			}
			if !bytes.Equal(got, vm.disks[i]) {
				return fmt.Errorf("the next backup: %s has wrong bytes", d.Name)
			}
		}
		return nil
	}
	return fmt.Errorf("the next backup: %w", os.ErrNotExist)
}
