package unneeded

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/machine"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store/extent"
)

// Options say what to look for.
type Options struct {
	Swap bool  // swap areas and files, pagefile.sys, swapfile.sys, hiberfil.sys
	Free bool  // blocks that no file system uses
	Unit int64 // bytes: only whole units, counted from the start of the disk, are found
}

// Item is one thing that need not be held.
type Item struct {
	Disk   string `json:"disk"`   // "disk0"
	Volume string `json:"volume"` // as volume.Volume names it
	What   string `json:"what"`   // "swap area", "free space", or the path of a file
	Bytes  int64  `json:"bytes"`
}

// Found is what Find found. It takes a bit of memory for each unit of the disks.
type Found struct {
	Items []Item
	Notes []string // what was left as it is, and why
	sets  []*set
}

// Ranges yields what of disk i (in the order that Find got them) is not needed, ascending, whole units.
func (f *Found) Ranges(i int) iter.Seq[extent.Extent] { return f.sets[i].ranges() }

// Find looks at the disks of one machine. It does not fail: what it cannot read it leaves as it is.
func Find(disks []volume.Disk, opt Options) *Found {
	s := &search{opt: opt, found: &Found{}, disks: disks}
	for _, d := range disks {
		s.found.sets = append(s.found.sets, newSet(d.Size(), opt.Unit))
	}
	s.safely("the disks", func() error {
		s.m = machine.Open(disks, machine.Options{})
		return nil
	})
	if s.m == nil {
		return s.found
	}
	for _, v := range s.m.Volumes {
		if opt.Swap {
			s.safely(v.Name, func() error { return s.swap(v) })
		}
		if opt.Free {
			s.safely(v.Name, func() error { return s.free(v) })
		}
	}
	return s.found
}

type search struct {
	opt   Options
	disks []volume.Disk
	m     *machine.Machine
	found *Found
}

// safely runs a step. Whatever goes wrong with it, a panic in a reader too, is noted: no backup fails for it.
func (s *search) safely(what string, step func() error) {
	defer func() {
		if p := recover(); p != nil {
			s.note(what, fmt.Errorf("%v", p))
		}
	}()
	if err := step(); err != nil {
		s.note(what, err)
	}
}

func (s *search) note(what string, err error) {
	s.found.Notes = append(s.found.Notes, fmt.Sprintf("%s: %v", what, err))
}

// take adds ranges of a volume to what is not needed, all of them or none.
func (s *search) take(v *machine.Volume, what string, ranges iter.Seq2[extent.Extent, error]) error {
	sets := make([]*set, len(s.disks)) // of this item
	for e, err := range ranges {
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		pieces, err := v.Map(e.Off, e.Len)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		for _, p := range pieces {
			if sets[p.Disk] == nil {
				sets[p.Disk] = newSet(s.disks[p.Disk].Size(), s.opt.Unit)
			}
			sets[p.Disk].add(extent.Extent{Off: p.Off, Len: p.Len})
		}
	}
	for i, some := range sets {
		if some == nil {
			continue
		}
		bytes := int64(0)
		for e := range some.ranges() {
			bytes += s.found.sets[i].add(e)
		}
		if bytes > 0 {
			s.found.Items = append(s.found.Items, Item{Disk: s.disks[i].Name, Volume: v.Name, What: what, Bytes: bytes})
		}
	}
	return nil
}

// swapHeader is what is kept of a swap area or file, bytes: the page with its header, however large that is.
const swapHeader = 64 << 10

// isSwap reports whether dev begins as mkswap(8) leaves it: the mark is at the end of the first page, and another one when a
// hibernated system is in it.
func isSwap(dev io.ReaderAt) bool {
	for page := int64(4096); page <= swapHeader; page *= 2 {
		mark := make([]byte, 10)
		if guest.ReadFull(dev, mark, page-10) == nil && (string(mark) == "SWAPSPACE2" || string(mark) == "SWAP-SPACE") {
			return true
		}
	}
	return false
}

// swap finds the swap area that a volume is, or the swap files in it.
func (s *search) swap(v *machine.Volume) error {
	switch {
	case v.Device == nil:
		return nil
	case v.Signature == "swap":
		if !isSwap(v.Device) {
			return errors.New("swap area: may hold a hibernated system")
		}
		return s.take(v, "swap area", extent.All([]extent.Extent{{Off: swapHeader, Len: v.Device.Size() - swapHeader}}))
	case !v.HasReader():
		return nil
	}
	f, err := v.FS()
	if err != nil {
		return err
	}
	l, ok := f.(guest.Locator)
	if !ok {
		return nil
	}
	if w := f.Info().Warnings; len(w) > 0 { // what the disk says of a file may not be the last word
		return fmt.Errorf("files with swap are kept: %s", strings.Join(w, "; "))
	}
	for _, path := range s.swapFiles(v) {
		if err := s.swapFile(v, f, l, path); err != nil {
			return err
		}
	}
	return nil
}

// windowsFiles are what Windows writes its memory to, in the root of a volume.
var windowsFiles = []string{"pagefile.sys", "swapfile.sys", "hiberfil.sys"}

// swapFiles are the paths in a volume where files that hold memory may be.
func (s *search) swapFiles(v *machine.Volume) []string {
	if v.Signature == "ntfs" {
		return windowsFiles
	}
	paths := []string{"swapfile", "swap.img", "swap/swapfile"}
	for _, view := range s.m.Views() {
		if view.Root.Vol == v {
			paths = append(paths, view.Swap...)
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

func (s *search) swapFile(v *machine.Volume, f guest.FS, l guest.Locator, path string) error {
	ino := f.Root()
	for name := range strings.SplitSeq(path, "/") {
		var err error
		if ino, err = f.Lookup(ino, name); errors.Is(err, guest.ErrNotExist) || errors.Is(err, guest.ErrNotDir) {
			return nil
		} else if err != nil {
			return err
		}
	}
	st, err := f.Stat(ino)
	if err != nil || st.Mode&guest.ModeType != guest.ModeRegular || st.Nlink > 1 {
		return err
	}
	if v.Signature == "ntfs" {
		return s.take(v, path, l.Locate(ino))
	}
	file, err := f.Open(ino)
	if err != nil {
		return err
	}
	if !isSwap(file) {
		return nil
	}
	return s.take(v, path, behindHeader(l.Locate(ino)))
}

// behindHeader leaves out the beginning of a file, whose ranges come in the order of the file.
func behindHeader(ranges iter.Seq2[extent.Extent, error]) iter.Seq2[extent.Extent, error] {
	return func(yield func(extent.Extent, error) bool) {
		keep := int64(swapHeader)
		for e, err := range ranges {
			n := min(keep, e.Len)
			keep -= n
			e.Off, e.Len = e.Off+n, e.Len-n
			if (err != nil || !e.Empty()) && !yield(e, err) {
				return
			}
		}
	}
}

// free finds the blocks of a volume that its file system does not use.
func (s *search) free(v *machine.Volume) error {
	if !v.HasReader() {
		return nil
	}
	f, err := v.FS()
	if err != nil {
		return err
	}
	free, ok := f.(guest.Freer)
	if !ok {
		return nil
	}
	if w := f.Info().Warnings; len(w) > 0 {
		return fmt.Errorf("free space is kept: %s", strings.Join(w, "; "))
	}
	return s.take(v, "free space", free.Free())
}
