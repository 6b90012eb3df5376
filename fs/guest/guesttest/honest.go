package guesttest

import (
	"fmt"
	"slices"
	"strings"
)

// Honest says where a reader of a damaged file system is wrong without saying so: got differs from want, which is what was there before the damage, and there
// is no error in the line or, for names that are not there, in a directory above. Fields named in ignore have no checksum on the disk.
func Honest(want, got []Line, ignore ...string) (lies []string) {
	w, g := byPath(want), byPath(got)
	for _, l := range got {
		old, is := w[l.Path]
		if !is {
			lies = append(lies, Quote(l.Path)+": was not there")
		}
		for _, field := range Fields {
			// The first path of an inode may be one that cannot be read.
			if field != "id" && is && l.Fields["error"] == "" && l.Fields[field] != old[field] && !slices.Contains(ignore, field) {
				lies = append(lies, fmt.Sprintf("%s: %s: was %.100q, is %.100q", Quote(l.Path), field, old[field], l.Fields[field]))
			}
		}
	}
	for _, l := range want {
		if g[l.Path] == nil && !excused(g, l.Path) {
			lies = append(lies, Quote(l.Path)+": is gone")
		}
	}
	return lies
}

// excused reports whether a directory above a path has an error.
func excused(got map[string]map[string]string, p string) bool {
	for p != "" {
		p = p[:max(0, strings.LastIndexByte(p, '/'))]
		if f := got[p]; f != nil && f["error"] != "" {
			return true
		}
	}
	return false
}
