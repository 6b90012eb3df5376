package xfs

import "github.com/holdfast-backup/holdfast/fs/guest"

const maxLink = 1024 // bytes of a link's target (XFSDS, Symbolic Links)

// Readlink implements guest.FS.
func (fs *FS) Readlink(ino guest.Ino) (string, error) {
	n, err := fs.inode(ino)
	switch {
	case err != nil:
		return "", err
	case n.kind() != guest.ModeLink:
		return "", guest.Unsupported("inode %d: reading the target of what is no link", n.num)
	case n.size == 0 || n.size > maxLink:
		return "", guest.Damaged("inode %d: a link of %d bytes", n.num, n.size)
	case n.data.form != formLocal:
		return fs.remoteLink(&n)
	case n.size > int64(len(n.data.area)):
		return "", guest.Damaged("inode %d: a link of %d bytes in %d", n.num, n.size, len(n.data.area))
	}
	return string(n.data.area[:n.size]), nil
}

// remoteLink reads a target outside of the inode. In version 5 each extent has a header (XFSDS, Symbolic Links).
func (fs *FS) remoteLink(n *inode) (string, error) {
	var target []byte
	for s, err := range fs.spans(&n.data) {
		if err != nil {
			return "", err
		}
		off, err := fs.sb.offset(s.block, s.n)
		if err != nil {
			return "", err
		}
		b := make([]byte, min(s.n<<fs.sb.blockLog, 65536))
		if err := guest.ReadFull(fs.dev, b, off); err != nil {
			return "", err
		}
		if fs.sb.v5 {
			if b, err = fs.remoteData(n, b, "XSLM", len(target), off); err != nil {
				return "", err
			}
		}
		if target = append(target, b...); int64(len(target)) >= n.size {
			return string(target[:n.size]), nil
		}
	}
	return "", guest.Damaged("inode %d: %d bytes of a link of %d", n.num, len(target), n.size)
}
