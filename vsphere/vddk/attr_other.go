//go:build !linux

package vddk

import "syscall"

func attributes() *syscall.SysProcAttr { return nil }
