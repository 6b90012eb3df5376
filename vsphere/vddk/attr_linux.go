package vddk

import "syscall"

// attributes keep a Ctrl-C at the terminal from nbdkit, which we end in order, and end it with us even before it has read --exit-with-parent.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}
