package folder

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// workDir tells this program to work in the folder of a directory until it is killed, instead of testing.
const workDir = "HOLDFAST_TEST_FOLDER_WORK"

func TestMain(m *testing.M) {
	dir := os.Getenv(workDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	fmt.Fprintln(os.Stderr, work(dir))
	os.Exit(1)
}

const killWorkers = 4

func killPlaced() (list []Placed) {
	for w := range killWorkers {
		for i := range 3 {
			list = append(list, Placed{Path: fmt.Sprintf("w%d/p%d", w, i), Key: fmt.Sprint(w, i), Content: newDisk(100), Time: day})
		}
	}
	return list
}

// action is what a worker does with a name.
type action struct {
	kind     string // one of the letters below
	name, to string
	n        uint64 // mark or mode
}

// work does random operations, each in its own directory. It says on stdout what it begins and what it has done.
func work(dir string) error {
	f, err := Open(dir, killPlaced(), Options{OpenFiles: 4})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	errs := make(chan error)
	for w := range killWorkers {
		go func() { errs <- workIn(f, w) }()
	}
	return <-errs
}

func workIn(f *Folder, w int) error {
	dir, err := f.Lookup(ctx, f.Root(), fmt.Sprint("w", w))
	if err != nil {
		return err
	}
	for {
		a := action{kind: string("XGMMRRD"[rand.IntN(7)]), name: someName(), to: someName(), n: 0o600 + rand.Uint64N(8)}
		id, err := f.Lookup(ctx, dir, a.name)
		there := err == nil
		if there == (a.kind == "X" || a.kind == "G") || a.name == a.to && a.kind == "R" {
			continue
		}
		fmt.Printf("B %d %s %s %s %d\n", w, a.kind, a.name, a.to, a.n)
		switch a.kind {
		case "X":
			id, err = f.Create(ctx, dir, a.name, nfs.Creation{Exclusive: mark(a.n)})
		case "G":
			id, err = f.Create(ctx, dir, a.name, nfs.Creation{Guarded: true, Set: nfs.Change{Mode: ptr(uint32(a.n))}})
		case "M":
			err = f.SetAttr(ctx, id, nfs.Change{Mode: ptr(uint32(a.n))})
		case "R":
			err = f.Rename(ctx, dir, a.name, dir, a.to)
		case "D":
			err = f.Remove(ctx, dir, a.name)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", a, err)
		}
		fmt.Printf("E %d %d %d\n", w, id.File, id.Generation)
	}
}

// someName is rarely that of a placed file, so that those live for a while.
func someName() string {
	if rand.IntN(500) == 0 {
		return fmt.Sprint("p", rand.IntN(3))
	}
	return string(rune('a' + rand.IntN(5)))
}

// known is what must be true of a file.
type known struct {
	id   nfs.ID
	mode uint32
	mark uint64 // and 100 added to it; 0 for none
}

// after is what a directory holds after an action by which the file of id was made or changed.
func after(was map[string]known, a action, id nfs.ID) map[string]known {
	now := maps.Clone(was)
	switch a.kind {
	case "X":
		now[a.name] = known{id: id, mode: fileMode, mark: a.n + 100}
	case "G":
		now[a.name] = known{id: id, mode: uint32(a.n)}
	case "M":
		now[a.name] = known{id: now[a.name].id, mode: uint32(a.n)}
	case "R":
		now[a.to] = now[a.name]
		delete(now, a.name)
	case "D":
		delete(now, a.name)
	}
	return now
}

// TestKill kills a process in the middle of its work, many times: what it had finished is there, with the same IDs and marks, and what it had
// begun was done or not.
func TestKill(t *testing.T) {
	kills := 60
	if testing.Short() {
		kills = 10
	}
	n, _ := strconv.Atoi(os.Getenv("HOLDFAST_TEST_KILLS"))
	kills = cmp.Or(n, kills)
	dir := tempDir(t)
	holds := make([]map[string]known, killWorkers)
	f := mustOpen(t, dir, Options{}, killPlaced()...)
	for w := range holds {
		holds[w] = map[string]known{}
		for i := range 3 {
			name := fmt.Sprint("p", i)
			holds[w][name] = known{id: lookup(t, f, fmt.Sprint("w", w), name)}
		}
	}
	f.Close()
	finished, begun, done, removed := 0, 0, 0, 0
	for range kills {
		pending := life(t, dir, holds, &finished)
		f := mustOpen(t, dir, Options{}, killPlaced()...)
		for w := range holds {
			a, ok := pending[w]
			if !ok {
				holds[w] = look(t, f, w, holds[w], holds[w], "")
				continue
			}
			begun++
			next := after(holds[w], a, nfs.ID{})
			was := maps.Clone(holds[w])
			if holds[w] = look(t, f, w, was, next, a.name); !maps.Equal(was, holds[w]) {
				done++
			}
		}
		removed = len(f.Removed())
		f.Close()
	}
	t.Logf("%d kills; %d operations finished, %d begun of which %d were done; %d of %d placed files removed", kills, finished, begun, done, removed, 3*killWorkers)
}

// life runs the process for a while and gives what was begun, by worker.
func life(t *testing.T, dir string, holds []map[string]known, finished *int) map[int]action {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if s, err := lines.ReadString('\n'); s != "ready\n" {
		t.Fatal(s, err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		cmd.Process.Kill()
	})
	pending := map[int]action{}
	for {
		s, err := lines.ReadString('\n')
		if err == io.EOF {
			break // what is cut off was not finished
		}
		var w int
		var a action
		var id nfs.ID
		if _, err := fmt.Sscanf(s, "B %d %s %s %s %d", &w, &a.kind, &a.name, &a.to, &a.n); err == nil {
			pending[w] = a
		} else if _, err := fmt.Sscanf(s, "E %d %d %d", &w, &id.File, &id.Generation); err == nil {
			holds[w] = after(holds[w], pending[w], id)
			delete(pending, w)
			*finished++
		} else {
			t.Fatalf("%q %v", s, err)
		}
	}
	wg.Wait()
	cmd.Wait()
	return pending
}

// look checks that a worker's directory holds was or next. In next the ID of made may be any.
func look(t *testing.T, f *Folder, w int, was, next map[string]known, made string) map[string]known {
	t.Helper()
	for _, k := range was {
		_, err := f.Attr(ctx, k.id) // before anybody looked for it
		if still := slices.ContainsFunc(slices.Collect(maps.Values(next)), func(n known) bool { return n.id == k.id }); err != nil && (still || !errors.Is(err, syscall.ESTALE)) {
			t.Fatalf("worker %d: %v: %v", w, k, err)
		}
	}
	dir := lookup(t, f, fmt.Sprint("w", w))
	got := map[string]known{}
	for e, err := range f.ReadDir(ctx, dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		got[e.Name] = known{id: e.ID, mode: attr(t, f, e.ID).Mode}
	}
	if n, ok := next[made]; ok && n.id == (nfs.ID{}) {
		n.id = got[made].id
		next[made] = n
	}
	for _, want := range []map[string]known{was, next} {
		unmarked := maps.Clone(want)
		for name, k := range unmarked {
			k.mark = 0
			unmarked[name] = k
		}
		if maps.Equal(got, unmarked) {
			replay(t, f, dir, want)
			return want
		}
	}
	t.Fatalf("worker %d: %v, must be %v or %v", w, got, was, next)
	return nil
}

// replay sends each EXCLUSIVE creation again.
func replay(t *testing.T, f *Folder, dir nfs.ID, holds map[string]known) {
	t.Helper()
	for name, k := range holds {
		if k.mark == 0 {
			want(t, second(f.Create(ctx, dir, name, nfs.Creation{Exclusive: mark(7)})), syscall.EEXIST)
			continue
		}
		id, err := f.Create(ctx, dir, name, nfs.Creation{Exclusive: mark(k.mark - 100)})
		if err != nil || id != k.id {
			t.Fatalf("%s %v: %v %v", name, k, id, err)
		}
		want(t, second(f.Create(ctx, dir, name, nfs.Creation{Exclusive: mark(k.mark - 99)})), syscall.EEXIST)
	}
}
