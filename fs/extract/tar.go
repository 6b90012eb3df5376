package extract

import (
	"archive/tar"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/holdfast-backup/holdfast/fs"
	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Tar writes sources as a tar stream in PAX form (POSIX.1-2024, pax), with extended attributes as SCHILY.xattr.* and ACLs as
// SCHILY.acl.* (star(4)). Holes are written as zeros. When a file cannot be read to its end, the stream ends with an error
// and without an end mark.
func Tar(ctx context.Context, w io.Writer, sources []Source, opt Options) (Result, error) {
	return stream(ctx, w, func(t *tally, w io.Writer) archive { return &tarArchive{t, tar.NewWriter(w)} }, sources, opt)
}

type tarArchive struct {
	*tally
	w *tar.Writer
}

func (a *tarArchive) close() error { return a.w.Close() }

var tarTypes = map[fs.Kind]byte{
	fs.KindDir: tar.TypeDir, fs.KindFile: tar.TypeReg, fs.KindLink: tar.TypeSymlink, fs.KindChar: tar.TypeChar, fs.KindBlock: tar.TypeBlock, fs.KindFIFO: tar.TypeFifo,
}

// begin implements archive.
func (a *tarArchive) begin(ctx context.Context, f *found, path, linkTo string) (io.Writer, error) {
	h := &tar.Header{Name: path, Mode: int64(f.mode()), ModTime: notZero(f.attr.Time), Format: tar.FormatPAX, PAXRecords: map[string]string{}}
	if g := f.attr.Guest; g != nil {
		h.Uid, h.Gid, h.Devmajor, h.Devminor = int(g.UID), int(g.GID), int64(g.Major), int64(g.Minor)
		h.AccessTime, h.ChangeTime = g.Atime, g.Ctime
	}
	var ok bool
	if h.Typeflag, ok = tarTypes[f.attr.Kind]; !ok {
		return nil, errLeftOut
	}
	switch {
	case linkTo != "":
		h.Typeflag, h.Linkname = tar.TypeLink, linkTo
	case f.attr.Kind == fs.KindDir:
		h.Name += "/"
	case f.attr.Kind == fs.KindFile:
		h.Size = f.attr.Size
	case f.attr.Kind == fs.KindLink:
		target, err := f.node.(fs.Link).Target(ctx)
		if err != nil {
			return nil, err
		}
		h.Linkname = target
	}
	if !utf8.ValidString(path) || !utf8.ValidString(h.Linkname) {
		h.PAXRecords["hdrcharset"] = "BINARY"
	}
	if linkTo != "" {
		return nil, a.w.WriteHeader(h)
	}
	list, err := f.xattrs(ctx)
	if err != nil {
		a.fail(path, fmt.Errorf("extended attributes: %w", err), true)
	}
	for _, x := range list {
		a.xattr(h, x)
	}
	return a.w, a.w.WriteHeader(h)
}

func (a *tarArchive) xattr(h *tar.Header, x guest.Xattr) {
	switch text, ok := aclText(x.Value); {
	case strings.ContainsAny(x.Name, "=\x00"):
		a.lost(fmt.Sprintf("xattr %.80s: its name has \"=\" in it", x.Name))
	case x.Name == aclAccess && ok:
		h.PAXRecords["SCHILY.acl.access"] = text
	case x.Name == aclDefault && ok:
		h.PAXRecords["SCHILY.acl.default"] = text
	default:
		h.PAXRecords["SCHILY.xattr."+x.Name] = string(x.Value)
	}
}

// aclTags are the tags of an ACL's entries (linux/posix_acl.h).
var aclTags = map[uint16]string{1: "user", 2: "user", 4: "group", 8: "group", 16: "mask", 32: "other"}

// aclText turns the value of system.posix_acl_* (version 2, then entries of tag, permissions and id, little-endian:
// linux/posix_acl_xattr.h) into text in which users are numbers, as acl(5).
func aclText(v []byte) (string, bool) {
	if len(v) < 4 || (len(v)-4)%8 != 0 || binary.LittleEndian.Uint32(v) != 2 {
		return "", false
	}
	var out []string
	for v = v[4:]; len(v) > 0; v = v[8:] {
		tag, perm := binary.LittleEndian.Uint16(v), binary.LittleEndian.Uint16(v[2:])
		word, ok := aclTags[tag]
		if !ok || perm > 7 {
			return "", false
		}
		id := ""
		if tag == 2 || tag == 8 {
			id = fmt.Sprint(binary.LittleEndian.Uint32(v[4:]))
		}
		rwx := []byte("rwx")
		for i := range rwx {
			if perm&(4>>i) == 0 {
				rwx[i] = '-'
			}
		}
		out = append(out, word+":"+id+":"+string(rwx))
	}
	return strings.Join(out, ","), true
}

// notZero gives 1970's beginning for a time that the file system does not have.
func notZero(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(0, 0)
	}
	return t
}
