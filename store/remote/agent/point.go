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

func checkTexts(list []string, most int) error {
	for _, s := range list {
		if err := checkText(s, most); err != nil {
			return err
		}
	}
	return nil
}

// textsIn reads a list of at most n texts.
func textsIn(raw json.RawMessage, n, most int) ([]string, error) {
	list, err := listIn[string](raw, n)
	if err != nil {
		return nil, err
	}
	return list, checkTexts(list, most)
}

// listIn reads a list of at most n items.
func listIn[T any](raw json.RawMessage, n int) (list []T, err error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, fmt.Errorf("%w: no list", errProtocol)
	}
	for d.More() {
		var v T
		if len(list) == n {
			return nil, fmt.Errorf("%w: a list of more than %d", errProtocol, n)
		}
		if err := d.Decode(&v); err != nil {
			return nil, fmt.Errorf("%w: %v", errProtocol, err)
		}
		list = append(list, v)
	}
	return list, nil
}

// CheckTags says early what a commit would refuse.
func CheckTags(tags []string) error {
	if len(tags) > maxTags || checkTexts(tags, maxTag) != nil {
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
	switch m.Consistency {
	case "crash", "application", "offline":
	default:
		return nil, fmt.Errorf("%w: consistency", errProtocol)
	}
	tags, err1 := textsIn(m.Tags, maxTags, maxTag)
	warnings, err2 := textsIn(m.Warnings, maxWarnings, maxWarning)
	disks, err3 := listIn[diskMessage](m.Disks, maxDisks)
	files, err4 := listIn[fileMessage](m.Config, maxFiles)
	if err := errors.Join(err1, err2, err3, err4, checkText(m.Program, maxAnyOther)); err != nil {
		return nil, err
	}
	p := &store.Point{VM: x.vm, Time: x.time, Tags: tags, Consistency: m.Consistency, Program: m.Program, Warnings: warnings, Agent: x.token.ID}
	if x.parent != nil {
		p.Parent = &x.parent.ID
	}
	for i, d := range disks {
		disk, err := x.disk(d)
		if err != nil {
			return nil, err
		}
		disk.Name = fmt.Sprintf("disk%d", i)
		p.Disks = append(p.Disks, disk)
		p.Stats.Add(disk.Stats)
	}
	names := map[string]bool{}
	for _, f := range files {
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
	warnings, err := textsIn(d.Warnings, maxWarnings, maxWarning)
	if err = errors.Join(err, checkText(d.How, maxAnyOther)); err != nil {
		return store.Disk{}, err
	}
	cs := int64(x.srv.repo.ChunkSize())
	most := (d.Size + cs - 1) / cs * cs
	return store.Disk{Key: d.Key, Size: d.Size, Root: root, ChangeID: d.ChangeID, Compared: d.Compared, Read: d.How, Warnings: warnings,
		Stats: store.Stats{Total: d.Size, Data: min(max(d.Data, 0), most), Read: min(max(d.Read, 0), d.Size)}}, nil
}
