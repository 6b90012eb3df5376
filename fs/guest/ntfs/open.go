package ntfs

import (
	"errors"
	"slices"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// Open implements guest.FS.
func (f *FS) Open(ino guest.Ino) (guest.File, error) {
	i, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	n, err := f.nature(i)
	switch {
	case err != nil:
		return nil, err
	case n.mode != guest.ModeRegular:
		return nil, errors.New("ntfs: no regular file")
	}
	a := i.find(attrData, "")
	if n.tag == tagWOF {
		_, data, err := f.reparse(i)
		if err != nil {
			return nil, err
		}
		return f.openWOF(i, a, data)
	}
	if err := elsewhere(i, n.tag, a); err != nil {
		return nil, err
	}
	if a == nil {
		a = &attr{kind: attrData, resident: true}
	}
	return f.file(a)
}

// elsewhere refuses a file whose content is not, or not all, in its data: what reads there as zeros is something else to Windows.
func elsewhere(i *inode, tag uint32, a *attr) error {
	what := ""
	switch tag {
	case 0, tagSymlink, tagMountPoint, tagLXSymlink, tagSocket, tagLXFIFO, tagLXChar, tagLXBlock:
		return nil
	case tagDedup:
		what = "a file that Windows deduplicated: its data is in the chunk store of the volume"
	case tagHSM, tagHSM2:
		what = "a file that was moved to other storage (HSM)"
	case tagSIS:
		what = "a file of Single Instance Storage"
	case tagWIM:
		what = "a file in a mounted WIM image"
	case tagAppLink:
		what = "a link to an application of the Windows store"
	case tagNFS:
		what = "a special file of the NFS server of Windows"
	default:
		if tag&cloudMask != tagCloud {
			return guest.Unsupported("a file with the reparse tag %#x, whose data a filter of Windows makes", tag)
		}
		away := uint32(flagOffline | flagRecallOpen | flagRecallData)
		if i.std.flags&away == 0 && (a == nil || a.flags&sparse == 0) {
			return nil // in the cloud, and here as well
		}
		what = "a file that is in the cloud (OneDrive)"
	}
	return guest.Unsupported("%s", what)
}

// Streams implements guest.Streamer. Their names are in the order of their bytes.
func (f *FS) Streams(ino guest.Ino) ([]string, error) {
	i, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	tag, _, err := f.reparse(i)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, a := range i.attrs {
		// What CompactOS compressed is the file's content, and no stream to look at.
		if a.kind == attrData && a.name != "" && !(tag == tagWOF && a.name == wofStream) {
			names = append(names, a.name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// OpenStream implements guest.Streamer.
func (f *FS) OpenStream(ino guest.Ino, name string) (guest.File, error) {
	i, err := f.inode(ino)
	if err != nil {
		return nil, err
	}
	a := i.find(attrData, name)
	if a == nil || name == "" {
		return nil, guest.ErrNotExist
	}
	return f.file(a)
}
