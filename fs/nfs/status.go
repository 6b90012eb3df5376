package nfs

import (
	"errors"
	"fmt"
	"syscall"
)

// A status is how an NFS procedure went, nfsstat3 of RFC 1813 §2.6.
type status uint32

const (
	statOK          status = 0
	statPerm        status = 1
	statNoEnt       status = 2
	statIO          status = 5
	statNXIO        status = 6
	statAccess      status = 13
	statExist       status = 17
	statXDev        status = 18
	statNoDev       status = 19
	statNotDir      status = 20
	statIsDir       status = 21
	statInval       status = 22
	statFBig        status = 27
	statNoSpc       status = 28
	statROFS        status = 30
	statMLink       status = 31
	statNameTooLong status = 63
	statNotEmpty    status = 66
	statDQuot       status = 69
	statStale       status = 70
	statBadHandle   status = 10001
	statNotSync     status = 10002
	statBadCookie   status = 10003
	statNotSupp     status = 10004
	statTooSmall    status = 10005
	statJukebox     status = 10008
)

// statuses maps what an FS may answer to what the client is told.
var statuses = map[syscall.Errno]status{
	syscall.EPERM:        statPerm,
	syscall.ENOENT:       statNoEnt,
	syscall.EIO:          statIO,
	syscall.ENXIO:        statNXIO,
	syscall.EACCES:       statAccess,
	syscall.EEXIST:       statExist,
	syscall.EXDEV:        statXDev,
	syscall.ENODEV:       statNoDev,
	syscall.ENOTDIR:      statNotDir,
	syscall.EISDIR:       statIsDir,
	syscall.EINVAL:       statInval,
	syscall.EFBIG:        statFBig,
	syscall.ENOSPC:       statNoSpc,
	syscall.EROFS:        statROFS,
	syscall.EMLINK:       statMLink,
	syscall.ENAMETOOLONG: statNameTooLong,
	syscall.ENOTEMPTY:    statNotEmpty,
	syscall.EDQUOT:       statDQuot,
	syscall.ESTALE:       statStale,
	syscall.ENOTSUP:      statNotSupp,
}

// statusOf gives the status of an error, and whether the log should hear of it:
// EIO, and what clients have no word for.
func statusOf(err error) (st status, log bool) {
	if err == nil {
		return statOK, false
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		if st, ok := statuses[e]; ok {
			return st, st == statIO
		}
	}
	return statIO, true
}

// status is that of what the FS answered; the log hears of what went wrong inside.
func (r *request) status(err error) status {
	if err == nil {
		return statOK
	}
	st, log := statusOf(err)
	if log {
		r.srv.log(fmt.Errorf("nfs: export %q: %s: %w", r.e.Path, r.procName(), err))
	}
	return st
}
