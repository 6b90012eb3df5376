package store

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// adviseEvery is after how many pages read the kernel is told of tables that came meanwhile.
const adviseEvery = 1 << 12

// tableFile is a table of the index.
type tableFile struct {
	name        string
	left, right []byte // keys
}

// advise tells the kernel that the tables are read at random: madvise(2), MADV_RANDOM. Otherwise
// each look at what is not in memory reads as much as the read-ahead of the disk (8 MiB,
// seen on a cloud disk) for 8 KiB, and in little memory throws out what the next look needs.
// It is a hint; what goes wrong is not told.
func (x *badgerIndex) advise() {
	if x.dir == "" {
		return
	}
	dir, err := filepath.Abs(x.dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return
	}
	var list []tableFile
	newest := uint64(0)
	random := map[string]bool{}
	for _, t := range x.db.Tables() {
		newest = max(newest, t.ID)
		f := tableFile{filepath.Join(dir, fmt.Sprintf("%06d.sst", t.ID)), t.Left, t.Right}
		list = append(list, f)
		random[f.name] = true
	}
	if x.advised.Swap(newest) == newest {
		return
	}
	x.tables.Store(&list)
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); { // proc_pid_maps(5)
		at, name, _ := strings.Cut(s.Text(), "/")
		if !random["/"+name] {
			continue
		}
		var from, to uintptr
		if n, _ := fmt.Sscanf(at, "%x-%x", &from, &to); n == 2 && from < to {
			// A table that was dropped meanwhile may have left its place to something else,
			// which is then read a little slower.
			unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_RANDOM)
		}
	}
}

// readAhead tells the kernel that the entries from one key to another are read next, in order:
// posix_fadvise(2), POSIX_FADV_WILLNEED.
func (x *badgerIndex) readAhead(from, to []byte) {
	list := x.tables.Load()
	if list == nil {
		return
	}
	for _, t := range *list {
		if bytes.Compare(t.right, from) < 0 || bytes.Compare(to, t.left) < 0 {
			continue
		}
		if f, err := os.Open(t.name); err == nil {
			unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_WILLNEED)
			f.Close()
		}
	}
}
