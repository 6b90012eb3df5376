//go:build linux

package bucket_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/bucket/buckettest"
)

// childDir, when set, turns this test binary into a writer that works in that
// folder until it is killed, or has written childLimit objects.
const (
	childDir   = "HOLDFAST_TEST_BUCKET_CHILD"
	childLimit = "HOLDFAST_TEST_BUCKET_LIMIT"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		limit, _ := strconv.Atoi(os.Getenv(childLimit))
		writeObjects(dir, limit)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func openLocal(t *testing.T, dir string) *bucket.Local {
	t.Helper()
	l, err := bucket.OpenLocal(dir)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLocal(t *testing.T) {
	buckettest.TestBucket(t, func(t *testing.T) bucket.Bucket { return openLocal(t, t.TempDir()) })
}

func TestFaultyLocalWithoutFaults(t *testing.T) {
	buckettest.TestBucket(t, func(t *testing.T) bucket.Bucket { return bucket.NewFaulty(openLocal(t, t.TempDir()), nil) })
}

func TestOpenLocalNeedsAFolder(t *testing.T) {
	dir := t.TempDir()
	if _, err := bucket.OpenLocal(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing folder: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := bucket.OpenLocal(file); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
	openLocal(t, dir)
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("opening wrote something: %v", entries)
	}
}

func TestLocalModes(t *testing.T) {
	dir := t.TempDir()
	buckettest.Put(t, openLocal(t, dir), "packs/ab/x", []byte("1"))
	for name, want := range map[string]fs.FileMode{"tmp": 0o700, "packs": 0o700, "packs/ab": 0o700, "packs/ab/x": 0o600} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", name, st.Mode().Perm(), want)
		}
	}
}

// TestLocalForeignFiles: what is no object of a possible name is not listed and
// does no harm.
func TestLocalForeignFiles(t *testing.T) {
	dir := t.TempDir()
	l := openLocal(t, dir)
	buckettest.Put(t, l, "packs/x", []byte("1"))
	for _, d := range []string{"lost+found", "packs/empty"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"LOCK", "packs/Name", "lost+found/a", "tmp/other"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "packs/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("x", filepath.Join(dir, "packs/link")); err != nil {
		t.Fatal(err)
	}
	wantNames(t, l, "packs/x")
	if err := l.Remove(t.Context(), "packs/empty"); !errors.Is(err, bucket.ErrNotExist) {
		t.Errorf("Remove of a folder: %v", err)
	}
	if _, err := l.Open(t.Context(), "packs/fifo"); !errors.Is(err, bucket.ErrNotExist) {
		t.Errorf("Open of a fifo: %v", err)
	}
	if n, err := l.CleanTemp(); n != 0 || err != nil {
		t.Errorf("CleanTemp = %d, %v: took what it did not write", n, err)
	}
}

// TestLocalFolderRemoved: an administrator who clears away empty folders under
// a running process does not break it.
func TestLocalFolderRemoved(t *testing.T) {
	dir := t.TempDir()
	l := openLocal(t, dir)
	buckettest.Put(t, l, "packs/ab/x", []byte("1"))
	if err := l.Remove(t.Context(), "packs/ab/x"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"packs/ab", "packs", "tmp"} {
		if err := os.Remove(filepath.Join(dir, d)); err != nil {
			t.Fatal(err)
		}
	}
	buckettest.Put(t, l, "packs/ab/y", []byte("2"))
	wantNames(t, l, "packs/ab/y")
}

func TestCleanTempSparesLiveDrafts(t *testing.T) {
	dir := t.TempDir()
	l, other := openLocal(t, dir), openLocal(t, dir)
	w, err := l.Create(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("alive"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tmp/draft-123"), []byte("dead"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := other.CleanTemp(); n != 1 || err != nil {
		t.Errorf("CleanTemp = %d, %v, want the dead draft only", n, err)
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := buckettest.Get(t, other, "x"); string(got) != "alive" {
		t.Errorf("content %q", got)
	}
	if n, err := other.CleanTemp(); n != 0 || err != nil {
		t.Errorf("second CleanTemp = %d, %v", n, err)
	}
}

// TestCleanTempRacesWriters runs the clean-up against writers that come and go.
func TestCleanTempRacesWriters(t *testing.T) {
	dir := t.TempDir()
	stop := make(chan struct{})
	cleaned := make(chan error, 1)
	go func() {
		l, err := bucket.OpenLocal(dir)
		for err == nil {
			select {
			case <-stop:
				cleaned <- nil
				return
			default:
				_, err = l.CleanTemp()
			}
		}
		cleaned <- err
	}()
	l := openLocal(t, dir)
	for i := range 300 {
		name := fmt.Sprintf("x/%d", i)
		buckettest.Put(t, l, name, []byte(name))
	}
	close(stop)
	if err := <-cleaned; err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		name := fmt.Sprintf("x/%d", i)
		if got := buckettest.Get(t, l, name); string(got) != name {
			t.Fatalf("%s holds %q", name, got)
		}
	}
}

// TestLostProcessLeavesADraft: Faulty's Gone is as good as a death to CleanTemp.
func TestLostProcessLeavesADraft(t *testing.T) {
	dir := t.TempDir()
	f := bucket.NewFaulty(openLocal(t, dir), bucket.At(3, bucket.Fault{Kind: bucket.Gone}))
	w, err := f.Create(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("draft"), 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(); !errors.Is(err, bucket.ErrGone) {
		t.Fatalf("Commit = %v", err)
	}
	if err := w.Abort(); !errors.Is(err, bucket.ErrGone) {
		t.Fatalf("Abort = %v", err)
	}
	if n := countDrafts(t, dir); n != 1 {
		t.Errorf("%d drafts left behind, want 1", n)
	}
	next := openLocal(t, dir)
	wantNames(t, next)
	if n, err := next.CleanTemp(); n != 1 || err != nil {
		t.Errorf("CleanTemp = %d, %v", n, err)
	}
}

// writeObjects commits objects, without end when limit is 0, and prints the name
// of each that Commit has acknowledged, keeping a second draft open all the time.
func writeObjects(dir string, limit int) {
	l, err := bucket.OpenLocal(dir)
	check(err)
	ctx := context.Background()
	never, err := l.Create(ctx, "never")
	check(err)
	defer never.Abort()
	_, err = never.WriteAt([]byte(childNever), 0)
	check(err)
	for i := 0; limit == 0 || i < limit; i++ {
		name := fmt.Sprintf("packs/%02x/%d", i%256, i)
		w, err := l.Create(ctx, name)
		check(err)
		for off := int64(0); off < 4; off++ {
			_, err = w.WriteAt(childContent(name), off*childPiece)
			check(err)
		}
		check(w.Commit())
		fmt.Println(name)
	}
}

const (
	childPiece = 50_000                         // bytes
	childNever = "the draft that stays a draft" // content
)

func childContent(name string) []byte {
	return []byte(strings.Repeat(name+"\n", childPiece)[:childPiece])
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// TestKilledWriter kills a writing process at odd moments: what it acknowledged
// is there whole, nothing else is there in part, and drafts are invisible.
func TestKilledWriter(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		dir := t.TempDir()
		acked := runAndKill(t, dir, 3+round*3)
		l := openLocal(t, dir)
		for _, name := range acked {
			wantChildContent(t, l, name)
		}
		for info, err := range l.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			wantChildContent(t, l, info.Name)
		}
		if !hasDraft(t, dir, childNever) {
			t.Error("CleanTemp took a draft that was being written")
		}
		drafts := countDrafts(t, dir)
		if n, err := l.CleanTemp(); err != nil || n != drafts || n == 0 {
			t.Errorf("CleanTemp = %d, %v; there were %d drafts", n, err, drafts)
		}
	}
}

// runAndKill lets a child acknowledge n objects while CleanTemp runs, kills it,
// and returns all that it acknowledged.
func runAndKill(t *testing.T, dir string, n int) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var acked []string
	lines := bufio.NewScanner(out)
	for len(acked) < n && lines.Scan() {
		acked = append(acked, lines.Text())
		if _, err := openLocal(t, dir).CleanTemp(); err != nil {
			t.Error(err)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	for lines.Scan() {
		acked = append(acked, lines.Text())
	}
	_ = cmd.Wait()
	if len(acked) < n {
		t.Fatalf("the child ended by itself after %d objects", len(acked))
	}
	return acked
}

func wantChildContent(t *testing.T, l *bucket.Local, name string) {
	t.Helper()
	if !bytes.Equal(buckettest.Get(t, l, name), bytes.Repeat(childContent(name), 4)) {
		t.Fatalf("%s is not whole", name)
	}
}

func hasDraft(t *testing.T, dir, content string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "tmp/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && string(b) == content {
			return true
		}
	}
	return false
}

func countDrafts(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// mountTmpfs mounts a small file system of its own for the test.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("no tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func TestLocalFull(t *testing.T) {
	dir := mountTmpfs(t, "size=1m")
	l := openLocal(t, dir)
	buckettest.Put(t, l, "packs/small", []byte("small"))
	w, err := l.Create(t.Context(), "packs/big")
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); err == nil && off < 4<<20; off += 64 << 10 {
		_, err = w.WriteAt(make([]byte, 64<<10), off)
	}
	if !errors.Is(err, bucket.ErrFull) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "packs/big") {
		t.Errorf("WriteAt on a full medium: %v", err)
	}
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
	wantNames(t, l, "packs/small")
	buckettest.Put(t, l, "packs/other", make([]byte, 500<<10)) // the room is back
}

// TestLocalFullOfInodes: no room for the draft itself.
func TestLocalFullOfInodes(t *testing.T) {
	l := openLocal(t, mountTmpfs(t, "nr_inodes=4"))
	var err error
	for i := 0; err == nil && i < 10; i++ {
		var w bucket.Writer
		if w, err = l.Create(t.Context(), fmt.Sprintf("x%d", i)); err == nil {
			err = w.Commit()
		}
	}
	if !errors.Is(err, bucket.ErrFull) {
		t.Errorf("Create without inodes: %v", err)
	}
}

func TestLocalReadOnly(t *testing.T) {
	dir := mountTmpfs(t, "size=1m")
	buckettest.Put(t, openLocal(t, dir), "packs/x", []byte("1"))
	w, err := openLocal(t, dir).Create(t.Context(), "packs/y")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
	remount := func(flags uintptr) {
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(unix.MS_RDONLY)
	defer remount(0)
	l := openLocal(t, dir)
	if _, err := l.Create(t.Context(), "packs/z"); !errors.Is(err, bucket.ErrReadOnly) || !errors.Is(err, unix.EROFS) {
		t.Errorf("Create = %v", err)
	}
	if err := l.Remove(t.Context(), "packs/x"); !errors.Is(err, bucket.ErrReadOnly) {
		t.Errorf("Remove = %v", err)
	}
	if got := buckettest.Get(t, l, "packs/x"); string(got) != "1" {
		t.Errorf("content %q", got)
	}
	wantNames(t, l, "packs/x")
	if n, err := l.CleanTemp(); n != 0 || err != nil {
		t.Errorf("CleanTemp = %d, %v", n, err)
	}
}

// TestCommitOrder has strace watch the system calls of one Commit in a new
// folder: bytes, new folders, rename, folder.
func TestCommitOrder(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("needs strace")
	}
	dir := t.TempDir()
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-o", trace, "-e", "trace=fsync,fdatasync,mkdirat,rename,renameat,renameat2", os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir, childLimit+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("strace cannot trace here: %v: %s", err, out)
	}
	b, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for _, want := range []string{
		`mkdirat\(.*/tmp", 0700`, `fsync\(\d+<DIR>END`,
		`fsync\(\d+<DIR/tmp/draft-\d+>END`,
		`mkdirat\(.*/packs", 0700`, `fsync\(\d+<DIR>END`,
		`mkdirat\(.*/packs/00", 0700`, `fsync\(\d+<DIR/packs>END`,
		`rename.*/tmp/draft-\d+".*/packs/00/0"`, `fsync\(\d+<DIR/packs/00>END`,
	} {
		want = strings.NewReplacer("DIR", regexp.QuoteMeta(dir), "END", `(\)| <unfinished)`).Replace(want) // another thread may get a word in
		loc := regexp.MustCompile(want).FindIndex(b[at:])
		if loc == nil {
			t.Fatalf("no %s at its place in:\n%.3000s", want, b)
		}
		at += loc[1]
	}
}
