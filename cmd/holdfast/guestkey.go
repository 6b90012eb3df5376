package main

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest/volume"
	"github.com/holdfast-backup/holdfast/store"
)

func guestKeyFlag() cli.Flag {
	return &cli.StringSliceFlag{Name: "guest-key-file", TakesFile: true, Usage: "`FILE` with the passphrase of a guest's encrypted volume (LUKS, BitLocker) or a BitLocker recovery password, or several, one a line; or a .BEK file; may be repeated"}
}

// maxGuestKeys bounds a file with passphrases, bytes.
const maxGuestKeys = 1 << 20

// tree is the tree of the repository, with what opens the guests' encrypted volumes.
func (c *call) tree(r *store.Repo) (*fs.Tree, error) {
	tree := fs.New(r)
	var keys [][]byte
	for _, file := range c.StringSlice("guest-key-file") {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(io.LimitReader(f, maxGuestKeys+1))
		f.Close()
		if err != nil {
			return nil, err
		}
		if len(b) > maxGuestKeys {
			return nil, fmt.Errorf("%s: larger than %s", file, sizeText(maxGuestKeys))
		}
		// The file as it is, too: cryptsetup's key files may hold anything, BitLocker's are binary.
		keys = append(keys, b)
		for line := range bytes.Lines(b) {
			if line = bytes.TrimRight(line, "\r\n"); len(line) > 0 && !bytes.Equal(line, b) {
				keys = append(keys, line)
			}
		}
	}
	if len(keys) > 0 {
		tree.Unlock = func(volume.Locked) [][]byte { return keys }
	}
	return tree, nil
}
