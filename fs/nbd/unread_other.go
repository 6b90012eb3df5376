//go:build !linux

package nbd

import "net"

func unreadOf(net.Conn) func() bool { return nil }
