package nbd

import "syscall"

// ownerOnly gives a Unix socket its mode before it has a name: Linux makes the
// file with the mode of the socket, so it is never open to others.
func ownerOnly(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }); e != nil {
		return e
	}
	return err
}
