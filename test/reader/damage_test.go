package reader_test

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-backup/holdfast/store"
)

var long = flag.Bool("long", false, "damage a repository with a chunk that does not compress as well: some minutes")

// TestEveryByte flips one bit of every byte of every object, each in a copy of
// its own, and looks at the copy with an index from before the damage and with one made after it:
// verification must find it and name what was hit, a disk must read right or
// fail as damaged, and disks that do not need the record that was hit must read right.
func TestEveryByte(t *testing.T) {
	if testing.Short() {
		t.Skip("opens a repository 26,000 times: minutes under the race detector")
	}
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprint("plain ", plain), func(t *testing.T) {
			s := newSubject(t, plain, *long)
			var flips []flip
			for _, name := range slices.Sorted(maps.Keys(s.objects)) {
				for off := range s.objects[name] {
					flips = append(flips, flip{name, off})
				}
			}
			var bad atomic.Int32
			parallel(len(flips), func(i int) {
				f := flips[i]
				for _, kind := range []string{"old", "new"} {
					if bad.Load() > 20 {
						return
					}
					if err := f.try(t, s, kind); err != nil {
						bad.Add(1)
						t.Errorf("%s byte %d of %d, %s index: %v", f.object, f.off, len(s.objects[f.object]), kind, err)
					}
				}
			})
			t.Logf("%d bytes of %d objects hit, with two indexes each", len(flips), len(s.objects))
		})
	}
}

// parallel calls fn for 0..n-1 on all processors.
func parallel(n int, fn func(int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				fn(i)
			}
		})
	}
	wg.Wait()
}

type flip struct {
	object string
	off    int
}

func (f flip) try(t *testing.T, s *subject, kind string) error {
	rnd := rand.New(rand.NewPCG(uint64(f.off), uint64(len(f.object))))
	hit := maps.Clone(s.objects)
	b := bytes.Clone(hit[f.object])
	b[f.off] ^= 1 << rnd.IntN(8)
	hit[f.object] = b
	index := newMapIndex().opener(false)
	if kind == "old" {
		index = s.index.clone().opener(true)
	}
	v, err := s.examine(t, hit, index, rnd)
	if err != nil {
		return err
	}
	if !s.named(v.findings, f.object) {
		return fmt.Errorf("verification names no %s: %v", f.object, v.findings)
	}
	users := s.usersOf(f.object, int64(f.off))
	for disk, err := range v.failed {
		if !users[disk] && !s.isManifest(f.object, disk) {
			return fmt.Errorf("%s cannot be read: %w", disk, err)
		}
	}
	for disk := range users {
		if !slices.ContainsFunc(v.findings, func(d *store.DamageError) bool { return d.Point+" "+d.Disk == disk }) {
			return fmt.Errorf("verification does not name %s: %v", disk, v.findings)
		}
	}
	if strings.HasPrefix(f.object, "points/") && len(v.failed) != 1 {
		return fmt.Errorf("a damaged manifest was read: %v", v.failed)
	}
	return nil
}

// named reports whether a finding names the object, by its kind and id.
func (s *subject) named(findings []*store.DamageError, object string) bool {
	folder, id, _ := strings.Cut(object, "/")
	for _, d := range findings {
		switch folder {
		case "packs":
			if strings.Contains(d.Error(), "pack "+id) {
				return true
			}
		case "points":
			if d.What == "manifest "+id {
				return true
			}
		default:
			if d.What == object {
				return true
			}
		}
	}
	return false
}

// isManifest reports whether object is the manifest of the point with that path.
func (s *subject) isManifest(object, path string) bool {
	for i := range s.points {
		if s.paths[i] == path {
			return object == "points/"+s.points[i].id.String()
		}
	}
	return false
}
