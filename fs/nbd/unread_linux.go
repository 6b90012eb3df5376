package nbd

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// unreadOf gives a function that tells whether bytes wait in a socket; nil for another kind of connection.
func unreadOf(nc net.Conn) func() bool {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	waiting := false
	// One closure for all calls: they come from one goroutine at a time.
	look := func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		waiting = err != nil || n > 0
	}
	return func() bool {
		return raw.Control(look) != nil || waiting
	}
}
