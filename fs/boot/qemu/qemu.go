// Package qemu boots sessions in QEMU on this computer.
//
//	s.Run(ctx, &qemu.Host{}, …)
//
// Without options it takes qemu-system-x86_64 from the path, KVM where the processor has it and
// the user may use it, and OVMF where Debian puts it. The VM has no network unless its
// cards say so, its screen and serial line are sockets in the session's directory, and it reads its disks over
// NBD, for which it waits an hour when the server is gone.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-backup/holdfast/fs/boot"
)

// Host is QEMU on this computer.
type Host struct {
	Program string // empty: qemu-system-x86_64
	// Firmware is a file with the code of UEFI; empty: where distributions have it.
	Firmware string
	// Accel is "kvm", "tcg", or empty for what there is.
	Accel string
	// Extra is passed on to QEMU.
	Extra []string
}

var _ boot.Host = (*Host)(nil)

// The names of files of a session that QEMU makes.
const (
	MonitorSocket = "qmp.sock"
	SerialSocket  = "serial.sock"
	ScreenSocket  = "vnc.sock"
	logFile       = "qemu.log"
)

// reconnect is how long QEMU waits for the disks when their server is gone, seconds.
const reconnect = 3600

// firmwares are where distributions have OVMF, code and empty variables.
var firmwares = []struct{ code, vars string }{
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},           // Debian, Ubuntu
	{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},       // Fedora, RHEL
	{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},   // Arch
	{"/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"}, // SUSE
	{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},                 // older ones
}

// ErrNotInstalled: a program or firmware is not there.
var ErrNotInstalled = errors.New("not installed")

// NVRAM gives empty variables for UEFI, in size and form those of the firmware.
func (h *Host) NVRAM() ([]byte, error) {
	for _, f := range firmwares {
		if h.Firmware != "" && h.Firmware != f.code {
			continue
		}
		if b, err := os.ReadFile(f.vars); err == nil {
			return b, nil
		}
	}
	return nil, fmt.Errorf("firmware of UEFI (OVMF): %w", ErrNotInstalled)
}

// Fits reports whether variables of UEFI can be those of this host's firmware.
func (h *Host) Fits(nvram []byte) bool {
	own, err := h.NVRAM()
	// A firmware volume has its name and signature at fixed places: UEFI PI 1.7, volume 3, §3.2.1.
	return err == nil && len(own) == len(nvram) && len(own) > 44 && bytes.Equal(own[16:44], nvram[16:44])
}

func (h *Host) code() (string, error) {
	if h.Firmware != "" {
		return h.Firmware, nil
	}
	for _, f := range firmwares {
		if _, err := os.Stat(f.code); err == nil {
			return f.code, nil
		}
	}
	return "", fmt.Errorf("firmware of UEFI (OVMF): %w", ErrNotInstalled)
}

func (h *Host) program() (string, error) {
	name := h.Program
	if name == "" {
		name = "qemu-system-x86_64"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, ErrNotInstalled)
	}
	return path, nil
}

// accel is KVM when the processor has it and its device can be opened. A processor without it
// may still show the device in a container, and then guests do not start.
func (h *Host) accel() string {
	if h.Accel != "" {
		return h.Accel
	}
	info, _ := os.ReadFile("/proc/cpuinfo")
	if !bytes.Contains(info, []byte(" vmx")) && !bytes.Contains(info, []byte(" svm")) {
		return "tcg"
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	f.Close()
	return "kvm"
}

// Boot implements boot.Host.
func (h *Host) Boot(ctx context.Context, s *boot.State) (boot.Guest, error) {
	program, err := h.program()
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	args, err := h.arguments(s)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	log, err := os.OpenFile(s.File(logFile), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	fmt.Fprintf(log, "%s %s\n", program, strings.Join(args, " "))
	at, _ := log.Seek(0, io.SeekCurrent)
	for _, name := range []string{MonitorSocket, SerialSocket, ScreenSocket, AgentSocket} {
		os.Remove(s.File(name))
	}
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir(), log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it does not end with us
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	g, err := connect(ctx, s, ended)
	if err != nil {
		cmd.Process.Kill()
		<-ended
		if said := tail(s.File(logFile), at); said != "" {
			err = fmt.Errorf("qemu: %s", said)
		}
		return nil, err
	}
	s.Process, err = processOf(cmd.Process.Pid)
	if err != nil {
		g.Stop(ctx, 0)
		return nil, err
	}
	return g, nil
}

// connect waits for the monitor.
func connect(ctx context.Context, s *boot.State, ended chan struct{}) (*guest, error) {
	limit := time.After(30 * time.Second)
	for {
		m, err := dialMonitor(ctx, s.File(MonitorSocket))
		if err == nil {
			return &guest{monitor: m, agent: s.File(AgentSocket), ended: ended}, nil
		}
		select {
		case <-ended:
			return nil, fmt.Errorf("qemu: it ended at once: %w", boot.ErrGone)
		case <-limit:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// tail is what QEMU said, from byte at on, at most 1000 bytes.
func tail(file string, at int64) string {
	b, _ := os.ReadFile(file)
	b = b[min(int(at), len(b)):]
	return strings.TrimSpace(string(b[max(0, len(b)-1000):]))
}

// Attach implements boot.Host.
func (h *Host) Attach(ctx context.Context, s *boot.State) (boot.Guest, error) {
	if !alive(s.Process) {
		return nil, boot.ErrGone
	}
	ended := make(chan struct{})
	g, err := connect(ctx, s, ended)
	if err != nil {
		return nil, err
	}
	p := s.Process
	go func() { // it is no child of this process
		defer close(ended)
		for alive(p) {
			select {
			case <-g.monitor.gone: // it ends now
				time.Sleep(20 * time.Millisecond)
			case <-time.After(time.Second):
			}
		}
	}()
	return g, nil
}

// processOf names a process.
func processOf(pid int) (boot.Process, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return boot.Process{}, err
	}
	// proc_pid_stat(5): the name in brackets may hold anything; the start time is field 22.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return boot.Process{}, boot.ErrGone
	}
	start, err := strconv.ParseInt(fields[19], 10, 64)
	return boot.Process{PID: pid, Start: start}, err
}

func alive(p boot.Process) bool {
	if p.PID == 0 {
		return false
	}
	now, err := processOf(p.PID)
	return err == nil && now == p
}

// Runs reports whether the VM of a session runs.
func Runs(s *boot.State) bool { return alive(s.Process) }
