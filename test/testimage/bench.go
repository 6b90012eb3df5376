//go:build linux

package testimage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/test/command"
)

// FullSize is the size the benchmark's figures are published for. Smaller
// images hold proportionally less of the same.
const FullSize = 4 << 30 // bytes

// MinSize is the smallest image that still holds a bit of everything.
const MinSize = 128 << 20 // bytes

const mib = 1 << 20

// Bench is a pair of benchmark images: V1, and V2 as it is some days later.
//
// V1 is one ext4 file system with system programs, a Go toolchain, libraries
// and documentation of this host; about a third of it is allocated. V2 is a
// copy of it with holes detected again and files deleted, added, appended to
// and overwritten in place; at full size 1 to 2 % of its 4 KiB blocks differ.
// The files are picked in the same way each time; their bytes are the host's.
type Bench struct {
	V1, V2  string
	Size    int64 // bytes
	Changed int64 // 4 KiB blocks that differ between the two
}

// scale is the size of the image as a share of FullSize.
type scale float64

func (s scale) bytes(full int64) int64 { return int64(float64(full) * float64(s)) }

// count is never below 1.
func (s scale) count(full int) int { return max(1, int(math.Round(float64(full)*float64(s)))) }

// MakeBench builds v1.img and v2.img in dir, or takes those that are there.
// Needs root, and a Go toolchain in PATH.
func MakeBench(ctx context.Context, dir string, size int64) (Bench, error) {
	if size < MinSize || size > FullSize {
		return Bench{}, fmt.Errorf("image size %d: want %d to %d bytes", size, MinSize, int64(FullSize))
	}
	b := Bench{V1: filepath.Join(dir, "v1.img"), V2: filepath.Join(dir, "v2.img"), Size: size}
	s := scale(float64(size) / FullSize)
	if err := makeOnce(b.V1, size, func(tmp string) error { return makeV1(ctx, tmp, s, size) }); err != nil {
		return b, fmt.Errorf("image v1: %w", err)
	}
	if err := makeOnce(b.V2, size, func(tmp string) error { return makeV2(ctx, b.V1, tmp, s) }); err != nil {
		return b, fmt.Errorf("image v2: %w", err)
	}
	var err error
	b.Changed, err = ChangedBlocks(ctx, b.V1, b.V2)
	return b, err
}

// makeOnce lets fn make an image under another name, unless it is there.
func makeOnce(path string, size int64, fn func(tmp string) error) error {
	st, err := os.Stat(path)
	if err == nil && st.Size() != size {
		return fmt.Errorf("%s has %d bytes, not %d: remove it", path, st.Size(), size)
	}
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp := path + ".new"
	if err := fn(tmp); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return os.Rename(tmp, path)
}

func makeV1(ctx context.Context, img string, s scale, size int64) error {
	goroot, err := goRoot(ctx)
	if err != nil {
		return err
	}
	if err := emptyFile(img, size); err != nil {
		return err
	}
	_, err = command.Run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0",
		"-U", "6d6f6c64-0000-4000-8000-000000000001",
		"-E", "lazy_itable_init=0,lazy_journal_init=0,hash_seed=6d6f6c64-0000-4000-8000-000000000002", img)
	if err != nil {
		return err
	}
	return InMount(ctx, Part{Image: img}, "ext4", img+".mnt", func(root string) error {
		return fillV1(ctx, root, goroot, s)
	})
}

// fillV1 leaves out the programs and the Perl libraries that v2 brings.
func fillV1(ctx context.Context, root, goroot string, s scale) error {
	system := &copier{budget: s.bytes(290 * mib), keep: float64(s), skip: hasPrefix("/usr/bin/g", "/usr/share/perl")}
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/usr/share/locale", "/usr/share/zoneinfo", "/usr/share/i18n"} {
		if err := system.tree(ctx, dir, root+dir); err != nil {
			return err
		}
	}
	data := filepath.Join(root, "data")
	toolchain := &copier{budget: math.MaxInt64, keep: float64(s)}
	if err := toolchain.tree(ctx, goroot, filepath.Join(data, "go")); err != nil {
		return err
	}
	libs := &copier{budget: s.bytes(710 * mib), keep: 1, skip: largerThan(500 * mib)}
	if s < 1 {
		libs.keep = 2 * float64(s) // a mix of files rather than the first few
	}
	if err := libs.tree(ctx, "/usr/lib", filepath.Join(data, "lib")); err != nil {
		return err
	}
	docs := &copier{budget: s.bytes(100 * mib), keep: float64(s)}
	return docs.tree(ctx, "/usr/share/doc", filepath.Join(data, "doc"))
}

// largerThan skips folders right below /usr/lib that hold more than limit.
func largerThan(limit int64) func(string) bool {
	return func(path string) bool {
		if filepath.Dir(path) != "/usr/lib" {
			return false
		}
		var total int64
		_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil
			}
			if st, err := d.Info(); err == nil {
				total += st.Size()
			}
			if total > limit {
				return fs.SkipAll
			}
			return nil
		})
		return total > limit
	}
}

func makeV2(ctx context.Context, v1, img string, s scale) error {
	if err := CopySparse(ctx, v1, img); err != nil {
		return err
	}
	return InMount(ctx, Part{Image: img}, "ext4", img+".mnt", func(root string) error {
		return changeToV2(ctx, root, s)
	})
}

func changeToV2(ctx context.Context, root string, s scale) error {
	rng := rand.New(rand.NewPCG(2, 2))
	doomed := []string{filepath.Join(root, "data/go/src/cmd/compile"), filepath.Join(root, "data/go/src/crypto")}
	locales, err := filepath.Glob(filepath.Join(root, "usr/share/locale/[a-f]*"))
	if err != nil {
		return err
	}
	for _, path := range append(doomed, locales...) {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	programs := &copier{budget: s.bytes(30 * mib), keep: float64(s), skip: func(path string) bool {
		return path != "/usr/bin" && !strings.HasPrefix(path, "/usr/bin/g")
	}}
	if err := programs.tree(ctx, "/usr/bin", filepath.Join(root, "usr/bin")); err != nil {
		return err
	}
	perl := &copier{budget: s.bytes(12 * mib), keep: float64(s)}
	if err := perl.tree(ctx, "/usr/share/perl", filepath.Join(root, "usr/share/perl")); err != nil {
		return err
	}
	return editFiles(ctx, root, s, rng, 0)
}

// editFiles is the part of a change that every generation repeats: a log that
// grows, sources edited, databases written in place, a new incompressible file.
func editFiles(ctx context.Context, root string, s scale, rng *rand.Rand, generation int) error {
	if err := appendLog(filepath.Join(root, "data/app.log"), s.count(400), rng); err != nil {
		return err
	}
	var tests, large []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, "_test.go") {
			tests = append(tests, path)
		}
		if st.Size() > 2*mib {
			large = append(large, path)
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	for i := generation % 12; i < len(tests); i += 12 {
		if err := appendTo(tests[i], []byte("// changed\n")); err != nil {
			return err
		}
	}
	for i := range min(s.count(12), len(large)) {
		if err := overwriteBlocks(large[(i+generation)%len(large)], rng); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(root, fmt.Sprintf("data/random-%d", generation)), randomBytes(rng, int(s.bytes(12*mib))), 0o600)
}

func appendLog(path string, lines int, rng *rand.Rand) error {
	var b []byte
	for range lines {
		b = fmt.Appendf(b, "2026-11-21T06:30:%02d app[%d]: request %x answered in %d ms\n", rng.IntN(60), rng.IntN(32768), rng.Uint64(), rng.IntN(900))
	}
	return appendTo(path, b)
}

func appendTo(path string, p []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write(p)
	return err
}

// overwriteBlocks writes 4 random blocks in place into a file above 2 MiB.
func overwriteBlocks(path string, rng *rand.Rand) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, block := range []int64{3, 77, 201, 333} {
		if _, err := f.WriteAt(randomBytes(rng, 4096), block*4096); err != nil {
			return err
		}
	}
	return nil
}

// Increment changes the image in place, as much as a V2 made of an image of
// that size: what editFiles does, and new programs instead of those the
// increment before had brought. generation starts at 1.
func Increment(ctx context.Context, img string, generation int) error {
	st, err := os.Stat(img)
	if err != nil {
		return err
	}
	s := scale(float64(st.Size()) / FullSize)
	return InMount(ctx, Part{Image: img}, "ext4", img+".mnt", func(root string) error {
		return increment(ctx, root, s, generation)
	})
}

func increment(ctx context.Context, root string, s scale, generation int) error {
	rng := rand.New(rand.NewPCG(3, uint64(generation)))
	for _, old := range []string{fmt.Sprintf("data/new-%d", generation-1), fmt.Sprintf("data/random-%d", generation-1)} {
		if err := os.RemoveAll(filepath.Join(root, old)); err != nil {
			return err
		}
	}
	fresh := &copier{budget: s.bytes(32 * mib), keep: 0.1, filter: substitution(rng)}
	for _, i := range rng.Perm(26) {
		fresh.skip = notNamed("/usr/bin", byte('a'+i))
		if err := fresh.tree(ctx, "/usr/bin", filepath.Join(root, fmt.Sprintf("data/new-%d", generation))); err != nil {
			return err
		}
	}
	return editFiles(ctx, root, s, rng, generation)
}

func notNamed(dir string, first byte) func(string) bool {
	return func(path string) bool {
		return path != dir && !strings.HasPrefix(path, dir+"/"+string(first))
	}
}

// substitution returns a filter that swaps byte values throughout. What it
// makes compresses as the original does and shares no block with it, like a
// new version of a program.
func substitution(rng *rand.Rand) func([]byte) {
	var table [256]byte
	for i, v := range rng.Perm(255) {
		table[i+1] = byte(v + 1) // zero stays zero
	}
	return func(p []byte) {
		for i, v := range p {
			p[i] = table[v]
		}
	}
}

// ChangedBlocks counts the 4 KiB blocks that differ between two images of one
// size. It reads what is allocated in either.
func ChangedBlocks(ctx context.Context, a, b string) (int64, error) {
	fa, err := os.Open(a)
	if err != nil {
		return 0, err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return 0, err
	}
	defer fb.Close()
	var pieces []int64 // MiB numbers that hold data, with repetitions
	var sizes [2]int64
	for i, f := range []*os.File{fa, fb} {
		st, err := f.Stat()
		if err != nil {
			return 0, err
		}
		sizes[i] = st.Size()
		err = dataRanges(f, st.Size(), func(off, end int64) {
			for m := off / mib; m*mib < end; m++ {
				pieces = append(pieces, m)
			}
		})
		if err != nil {
			return 0, err
		}
	}
	if sizes[0] != sizes[1] {
		return 0, fmt.Errorf("%s and %s: %d and %d bytes", a, b, sizes[0], sizes[1])
	}
	slices.Sort(pieces)
	var changed int64
	pa, pb := make([]byte, mib), make([]byte, mib)
	for _, m := range slices.Compact(pieces) {
		n, err := changedIn(ctx, fa, fb, pa, pb, m*mib)
		if err != nil {
			return 0, fmt.Errorf("compare %s and %s: %w", a, b, err)
		}
		changed += n
	}
	return changed, nil
}

// changedIn compares the MiB at off.
func changedIn(ctx context.Context, fa, fb *os.File, pa, pb []byte, off int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	na, err := fa.ReadAt(pa, off)
	if err != nil && err != io.EOF {
		return 0, err
	}
	if _, err := fb.ReadAt(pb[:na], off); err != nil {
		return 0, err
	}
	var changed int64
	for i := 0; i < na; i += 4096 {
		end := min(i+4096, na)
		if !bytes.Equal(pa[i:end], pb[i:end]) {
			changed++
		}
	}
	return changed, nil
}

// Allocated is how many bytes of the medium the file takes.
func Allocated(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	return st.Blocks * 512, nil
}

func emptyFile(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func goRoot(ctx context.Context) (string, error) {
	out, err := command.Run(ctx, "go", "env", "GOROOT")
	return strings.TrimSpace(string(out)), err
}

// seeded is a source that gives the same every time.
func seeded(n uint64) *rand.Rand { return rand.New(rand.NewPCG(n, n)) }

func randomBytes(rng *rand.Rand, n int) []byte {
	p := make([]byte, 0, n+8)
	for len(p) < n {
		v := rng.Uint64()
		p = append(p, byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56))
	}
	return p[:n]
}
