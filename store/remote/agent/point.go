package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/store"
)

// What a point of a helper may hold.
const (
	maxDisks    = 256
	maxFiles    = 4096
	maxFileSize = 64 << 20 // bytes: configuration files are held in memory by those who read them
	maxTags     = 64
	maxTag      = 256 // bytes
	maxWarnings = 1000
	maxWarning  = 1 << 10 // bytes
	maxKey      = 1 << 10 // bytes, of a disk's key and change id
	maxFileName = 512     // bytes
	maxAnyOther = 256     // bytes
)

// checkText wants text that can be shown: whatever reads a point may print it.
func checkText(s string, most int) error {
	if len(s) > most || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("%w: a text is longer than %d bytes or cannot be printed", errProtocol, most)
	}
	return nil
}

func checkTexts(list []string, n, most int) error {
	if len(list) > n {
		return fmt.Errorf("%w: %d texts where at most %d can be", errProtocol, len(list), n)
	}
	for _, s := range list {
		if err := checkText(s, most); err != nil {
			return err
		}
	}
	return nil
}

// CheckTags says early what a commit would refuse.
func CheckTags(tags []string) error {
	if checkTexts(tags, maxTags, maxTag) != nil {
		return fmt.Errorf("a point has at most %d tags of at most %d bytes, which can be printed", maxTags, maxTag)
	}
	return nil
}

// decode reads JSON. What is not understood is not dropped in silence.
func decode(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%w: %v", errProtocol, err)
	}
	return nil
}

// point makes the point that a client describes, of maps that were finished.
func (x *session) point(text []byte) (*store.Point, error) {
	var m pointMessage
	if err := decode(text, &m); err != nil {
		return nil, err
	}
	if len(m.Disks) > maxDisks || len(m.Config) > maxFiles {
		return nil, fmt.Errorf("%w: %d disks and %d files", errProtocol, len(m.Disks), len(m.Config))
	}
	switch m.Consistency {
	case "crash", "application", "offline":
	default:
		return nil, fmt.Errorf("%w: consistency", errProtocol)
	}
	if err := errors.Join(checkTexts(m.Tags, maxTags, maxTag), checkTexts(m.Warnings, maxWarnings, maxWarning), checkText(m.Program, maxAnyOther)); err != nil {
		return nil, err
	}
	p := &store.Point{VM: x.vm, Time: x.time, Tags: m.Tags, Consistency: m.Consistency, Program: m.Program, Warnings: m.Warnings, Agent: x.token.ID}
	if x.parent != nil {
		p.Parent = &x.parent.ID
	}
	for i, raw := range m.Disks {
		var d diskMessage
		if err := decode(raw, &d); err != nil {
			return nil, err
		}
		disk, err := x.disk(d)
		if err != nil {
			return nil, err
		}
		disk.Name = fmt.Sprintf("disk%d", i)
		p.Disks = append(p.Disks, disk)
		p.Stats.Add(disk.Stats)
	}
	// New, and with Commit stored, are those of all that was sent, config files too.
	p.Stats.New = x.fresh.Load()
	names := map[string]bool{}
	for _, raw := range m.Config {
		var f fileMessage
		if err := decode(raw, &f); err != nil {
			return nil, err
		}
		root, err := x.rootOf(f.Root, f.Size)
		if err != nil {
			return nil, err
		}
		if err := checkText(f.Name, maxFileName); err != nil {
			return nil, err
		}
		if !fs.ValidPath(f.Name) || f.Name == "." || names[f.Name] || f.Size > maxFileSize {
			return nil, fmt.Errorf("%w: configuration file %q of %d bytes", errProtocol, f.Name, f.Size)
		}
		names[f.Name] = true
		p.Config = append(p.Config, store.ConfigFile{Name: f.Name, Size: f.Size, Root: root})
	}
	for name := range names { // no file is the folder of another
		for i, c := range name {
			if c == '/' && names[name[:i]] {
				return nil, fmt.Errorf("%w: configuration file %q is a folder, too", errProtocol, name[:i])
			}
		}
	}
	return p, nil
}

// disk makes a disk of what a client says. Its sums are believed as far as they are possible.
func (x *session) disk(d diskMessage) (store.Disk, error) {
	root, err := x.rootOf(d.Root, d.Size)
	if err != nil {
		return store.Disk{}, err
	}
	if len(d.Key) > maxKey || len(d.ChangeID) > maxKey {
		return store.Disk{}, fmt.Errorf("%w: key and change id of a disk have %d and %d bytes", errProtocol, len(d.Key), len(d.ChangeID))
	}
	err = errors.Join(checkText(d.How, maxAnyOther), checkTexts(d.Warnings, maxWarnings, maxWarning))
	if err != nil {
		return store.Disk{}, err
	}
	cs := int64(x.srv.repo.ChunkSize())
	most := (d.Size + cs - 1) / cs * cs
	return store.Disk{Key: d.Key, Size: d.Size, Root: root, ChangeID: d.ChangeID, Read: d.How, Warnings: d.Warnings,
		Stats: store.Stats{Total: d.Size, Data: min(max(d.Data, 0), most), Read: min(max(d.Read, 0), d.Size)}}, nil
}
