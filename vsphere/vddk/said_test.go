//go:build linux

package vddk

import (
	"slices"
	"strings"
	"testing"
)

// FuzzSaid: what is kept of nbdkit's words is little, and nothing of the password is left, however they come.
func FuzzSaid(f *testing.F) {
	f.Add([]byte("error: hunter2 is wrong\n"), 3, "hunter2")
	f.Add([]byte("hunter2hunt\n\nhunter2"), 1000, "hunter2")
	f.Add([]byte("aaab\n\x00\xffaab"), 1, "aab")
	f.Fuzz(func(t *testing.T, text []byte, step int, secret string) {
		var logged []string
		s := newSaid(secret, func(line string) { logged = append(logged, line) })
		for rest := text; len(rest) > 0; {
			n := min(max(step, 1), len(rest))
			if m, err := s.Write(rest[:n]); m != n || err != nil {
				t.Fatal(m, err)
			}
			rest = rest[n:]
		}
		s.end()
		last := s.last()
		if len(last) > saidLines || len(last) > 0 && !slices.Equal(last, logged[max(0, len(logged)-saidLines):]) {
			t.Errorf("%d lines, or others than were logged", len(last))
		}
		for _, line := range logged {
			if len(line) > 3*(saidBytes+len(secret)) {
				t.Errorf("a line of %d bytes", len(line))
			}
			if !strings.ContainsAny(secret, "*?…") && secret != "" && strings.Contains(line, secret) {
				t.Errorf("%q holds the password", line)
			}
		}
	})
}

// TestSaidCut: no part of the password is left where a long line is cut.
func TestSaidCut(t *testing.T) {
	const password = "hunter2"
	for before := saidBytes - 50; before < saidBytes+30; before++ {
		for step := range 9 {
			s := newSaid(password, nil)
			for rest := []byte(strings.Repeat(password, 3) + strings.Repeat("-", before) + password + strings.Repeat("-", 99) + "\n"); len(rest) > 0; {
				n := min(len(rest), step+1)
				s.Write(rest[:n])
				rest = rest[n:]
			}
			if got := s.last(); len(got) != 1 || strings.Contains(got[0], "h") || len(got[0]) < saidBytes-60 {
				t.Fatalf("after %d bytes: %q", before, got)
			}
		}
	}
}
