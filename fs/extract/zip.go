package extract

import (
	"archive/zip"
	"context"
	"encoding/binary"
	"io"
	stdfs "io/fs"

	"github.com/klauspost/compress/flate"

	"github.com/holdfast-backup/holdfast/fs"
)

// Zip writes sources as a zip stream, with Unix modes, owners and symbolic links, times to the second, and names as they are. It
// cannot hold extended attributes, hard links (which are copied), devices, FIFOs and sockets.
func Zip(ctx context.Context, w io.Writer, sources []Source, opt Options) (Result, error) {
	return stream(ctx, w, func(t *tally, w io.Writer) archive {
		z := zip.NewWriter(w)
		var again *flate.Writer // entries come one after the other, and a new one takes a megabyte
		z.RegisterCompressor(zip.Deflate, func(w io.Writer) (io.WriteCloser, error) {
			if again != nil {
				again.Reset(w)
				return again, nil
			}
			var err error
			again, err = flate.NewWriter(w, 3)
			return again, err
		})
		return &zipArchive{t, z}
	}, sources, opt)
}

type zipArchive struct {
	*tally
	w *zip.Writer
}

func (a *zipArchive) close() error { return a.w.Close() }

// begin implements archive.
func (a *zipArchive) begin(ctx context.Context, f *found, path, linkTo string) (io.Writer, error) {
	h := &zip.FileHeader{Name: path, Modified: notZero(f.attr.Time), Method: zip.Deflate}
	mode := stdfs.FileMode(f.mode() & 0o777)
	for bit, flag := range map[uint32]stdfs.FileMode{0o4000: stdfs.ModeSetuid, 0o2000: stdfs.ModeSetgid, 0o1000: stdfs.ModeSticky} {
		if f.mode()&bit != 0 {
			mode |= flag
		}
	}
	var target string
	switch f.attr.Kind {
	case fs.KindFile:
		if f.attr.Size == 0 {
			h.Method = zip.Store
		}
	case fs.KindDir:
		h.Name += "/"
		h.Method = zip.Store
		mode |= stdfs.ModeDir
	case fs.KindLink:
		var err error
		if target, err = f.node.(fs.Link).Target(ctx); err != nil {
			return nil, err
		}
		h.Method = zip.Store
		mode |= stdfs.ModeSymlink
	default:
		return nil, errLeftOut
	}
	h.SetMode(mode)
	if g := f.attr.Guest; g != nil {
		h.Extra = unixOwner(g.UID, g.GID)
	}
	if list, err := f.xattrs(ctx); err != nil || len(list) > 0 {
		a.lost("xattrs")
	}
	if t := h.Modified.Unix(); t != int64(int32(t)) {
		a.lost("times")
	}
	if linkTo != "" {
		a.lost("hard link")
	}
	w, err := a.w.CreateHeader(h)
	if err == nil && target != "" {
		_, err = io.WriteString(w, target)
	}
	return w, err
}

// unixOwner is Info-ZIP's extra field "ux": id 0x7875 and size, version 1, each of UID and GID with its size before it
// (Info-ZIP's proginfo/extrafld.txt).
func unixOwner(uid, gid uint32) []byte {
	b := []byte{0x75, 0x78, 11, 0, 1, 4}
	b = binary.LittleEndian.AppendUint32(b, uid)
	return binary.LittleEndian.AppendUint32(append(b, 4), gid)
}
