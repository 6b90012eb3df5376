package vddk

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// ErrNotInstalled: nbdkit, its vddk plugin or VDDK is not there.
var ErrNotInstalled = errors.New("not installed")

// Error is what nbdkit or VDDK could not do.
type Error struct {
	Err  error
	Said []string // nbdkit's last lines, without the password
	Hint string   // what a user can do; may be empty

	lasting bool // another attempt is of no use
}

func (e *Error) Error() string {
	if len(e.Said) == 0 {
		return e.Err.Error()
	}
	return fmt.Sprintf("%v; nbdkit says: %s", e.Err, strings.Join(e.Said, "; "))
}

func (e *Error) Unwrap() error { return e.Err }

// lasting reports whether another attempt will end the same way.
func lasting(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.lasting
}

// failure says what could not be done.
func (d *Disk) failure(what string, err error) error {
	return fmt.Errorf("vddk: %s: %s: %w", d.o.File, what, err)
}

// explain makes an Error of err, with what nbdkit said.
func (s *server) explain(err error) error {
	if text := s.said.scrub(err.Error()); text != err.Error() {
		err = errors.New(text) // it holds words of nbdkit's, too
	}
	e := &Error{Err: err, Said: s.said.last()}
	text := strings.ToLower(e.Error())
	for _, c := range causes {
		for _, words := range c.words {
			if strings.Contains(text, words) {
				e.Hint, e.lasting = c.hint, c.lasting
				return e
			}
		}
	}
	return e
}

// causes are what is known to go wrong, the first that fits counts.
var causes = []struct {
	words   []string // any of them, in small letters
	hint    string
	lasting bool
}{
	{[]string{"cannot open plugin"},
		"install nbdkit's plugin: nbdkit-vddk-plugin on Fedora and RHEL, nbdkit-plugin-vddk on Debian (after 12) and Ubuntu", true},
	{[]string{"libvixdisklib", "error: realpath:"},
		"unpack VDDK, and name its folder vmware-vix-disklib-distrib (the one with lib64 in it)", true},
	// nbdkit-vddk-plugin(1), "Trick: Get VDDK to tell you the thumbprint".
	{[]string{"thumbprint"},
		"the thumbprint is the SHA-1 of the server's certificate: openssl s_client -connect SERVER:443 </dev/null | openssl x509 -fingerprint -sha1 -noout", false},
	// An account may be locked after a few attempts.
	{[]string{"incorrect user name or password", "invalidlogin", "login failure"},
		"user name or password is wrong", true},
	// nbdkit-vddk-plugin(1), "Out of memory errors".
	{[]string{"nfc error 5", "failed to allocate"},
		"the host is short of memory for NFC: read fewer disks at once, or in smaller requests", false},
	// kubevirt/containerized-data-importer#3385.
	{[]string{"error 13", "access rights"},
		"name the snapshot, and see that the user may read the VM's disks (Virtual machine > Provisioning > Allow read-only disk access)", false},
	// vexxhost/migratekit#14, vmware-tanzu/velero-plugin-for-vsphere#118, adminsyspro/proxcenter-ui#438.
	{[]string{":902", "vmware-authd", "refused connection", "nfcnewauthdconnection"},
		"port 902 of the ESXi hosts must be open to this computer, and they take about 50 disks at once", false},
}

// said keeps the last lines that nbdkit writes, without the password.
type said struct {
	secret string
	log    func(string) // may be nil

	mu sync.Mutex
	// guards following
	part  []byte // of the line that has not ended
	cut   bool   // the line is longer than part
	lines []string
}

const (
	saidLines = 12
	saidBytes = 1000 // of a line
)

func newSaid(secret string, log func(string)) *said { return &said{secret: secret, log: log} }

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(p)
	for {
		line, rest, whole := bytes.Cut(p, []byte{'\n'})
		// Enough for a password that begins at the last byte that is kept.
		room := saidBytes + len(s.secret) - len(s.part)
		s.part = append(s.part, line[:min(len(line), room)]...)
		s.cut = s.cut || len(line) > room
		if !whole {
			return n, nil
		}
		s.endLine()
		p = rest
	}
}

// end ends the last line: nothing more is written.
func (s *said) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLine()
}

func (s *said) scrub(text string) string {
	if s.secret == "" {
		return text
	}
	return strings.ReplaceAll(text, s.secret, "***")
}

func (s *said) endLine() {
	text, cut := string(s.part), s.cut
	s.part, s.cut = s.part[:0], false
	text = s.scrub(text)
	if cut { // the last bytes may be the beginning of the password
		text = text[:max(0, min(saidBytes, len(text)-len(s.secret)))] + "…"
	}
	text = strings.TrimSpace(strings.ToValidUTF8(text, "?"))
	if text == "" {
		return
	}
	s.lines = append(s.lines, text)
	if len(s.lines) > saidLines {
		s.lines = append(s.lines[:0], s.lines[1:]...)
	}
	if s.log != nil {
		s.log(text)
	}
}

// last gives the last lines.
func (s *said) last() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.lines...)
}
