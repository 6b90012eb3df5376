package bucket

import (
	"fmt"
	"io/fs"
	"strings"
)

// maxElement is the longest part of a name between slashes, in bytes: NAME_MAX
// of Linux file systems.
const maxElement = 255

// maxName is the longest whole name, in bytes: what S3 allows a key to have.
const maxName = 1024

// CheckName returns nil when name may name an object: slash-separated elements
// of [a-z0-9._-], none of them empty or ".", no ".." anywhere, and not below
// "tmp", where drafts live. Otherwise the error matches fs.ErrInvalid.
func CheckName(name string) error {
	if why := badName(name); why != "" {
		return fmt.Errorf("bucket: name %q: %w: %s", name, fs.ErrInvalid, why)
	}
	return nil
}

// badName says what is wrong with name, or "" when nothing is.
func badName(name string) string {
	if len(name) > maxName {
		return "too long"
	}
	if strings.Contains(name, "..") {
		return `contains ".."`
	}
	for i, elem := range strings.Split(name, "/") {
		switch {
		case elem == "" || elem == ".":
			return "empty element"
		case len(elem) > maxElement:
			return "element too long"
		case i == 0 && elem == draftFolder:
			return "reserved for drafts"
		}
		if strings.IndexFunc(elem, notInName) >= 0 {
			return "character not in [a-z0-9._-]"
		}
	}
	return ""
}

func notInName(r rune) bool {
	return !('a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '.' || r == '_' || r == '-')
}
