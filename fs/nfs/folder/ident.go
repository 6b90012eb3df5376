package folder

import (
	"encoding/binary"
	"errors"
	"os"
	"syscall"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
)

// How files are opened. Nothing is opened through a symbolic link.
const (
	openDir  = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	openPath = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
)

// placedBit is set in the File of placed files alone.
const placedBit = 1 << 63

// errHidden is for what is there and not shown.
var errHidden = errors.New("neither file, directory nor link of this file system")

// mount tells a file system mounted below data/ from that of data/, a bind mount of the same one included.
type mount struct {
	major, minor uint32
	id           uint64
}

const statMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID

// rootID is that of data/ itself.
func rootID(fd int) (nfs.ID, mount, error) {
	st, err := statx(fd, "")
	if err != nil {
		return nfs.ID{}, mount{}, err
	}
	on := mountOf(&st)
	_, _, err = unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil && st.Mask&unix.STATX_BTIME == 0 {
		return nfs.ID{}, mount{}, errors.Join(ErrNoIdentity, err)
	}
	id, _, err := identify(fd, "", on)
	return id, on, err
}

func mountOf(st *unix.Statx_t) mount {
	m := mount{major: st.Dev_major, minor: st.Dev_minor}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		m.id = st.Mnt_id
	}
	return m
}

// statx is of an entry of a directory, or with no name of what is open.
func statx(dir int, name string) (st unix.Statx_t, err error) {
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	for {
		if err = unix.Statx(dir, name, flags, statMask, &st); !errors.Is(err, unix.EINTR) {
			return st, err
		}
	}
}

// identify says what an entry of a directory is, or with no name what is open.
func identify(dir int, name string, on mount) (id nfs.ID, st unix.Statx_t, err error) {
	if st, err = statx(dir, name); err != nil {
		return id, st, err
	}
	if kindOf(&st) == 0 || mountOf(&st) != on {
		return id, st, errHidden
	}
	flags := 0
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	}
	var own []byte
	h, _, err := unix.NameToHandleAt(dir, name, flags)
	switch {
	case err == nil:
		own = h.Bytes()
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE):
		return id, st, syscall.ENOENT
	}
	return idOf(&st, own), st, nil
}

// idOf makes the ID of a file of the file system's own handle for it.
func idOf(st *unix.Statx_t, own []byte) nfs.ID {
	b := make([]byte, 0, 64)
	b = binary.LittleEndian.AppendUint64(b, st.Ino)
	if st.Mask&unix.STATX_BTIME != 0 {
		b = binary.LittleEndian.AppendUint64(b, uint64(st.Btime.Sec))
		b = binary.LittleEndian.AppendUint32(b, st.Btime.Nsec)
	}
	return nfs.ID{File: st.Ino &^ placedBit, Generation: xxhash.Sum64(append(b, own...))}
}

// kindOf is 0 for what is not shown.
func kindOf(st *unix.Statx_t) nfs.Kind {
	switch uint32(st.Mode) & unix.S_IFMT {
	case unix.S_IFREG:
		return nfs.KindFile
	case unix.S_IFDIR:
		return nfs.KindDir
	case unix.S_IFLNK:
		return nfs.KindLink
	}
	return 0
}

// namesIn lists the directory that is open, by a descriptor with a position of its own.
func namesIn(dir int) ([]string, error) {
	fd, err := unix.Openat(dir, ".", openDir, 0)
	if err != nil {
		return nil, err
	}
	d := os.NewFile(uintptr(fd), "")
	defer d.Close()
	return d.Readdirnames(-1)
}
