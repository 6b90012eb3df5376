package main

import "testing"

func TestNearest(t *testing.T) {
	known := []string{"backup", "points", "restore", "mount", "umount", "ls"}
	for word, want := range map[string]string{
		"bakcup": "backup", "point": "points", "rest": "restore", "unmount": "umount", "moutn": "mount",
		"sl": "", "x": "", "": "", "frobnicate": "", "l": "ls",
	} {
		if got := nearest(word, known); got != want {
			t.Errorf("nearest(%q) = %q, want %q", word, got, want)
		}
	}
}
