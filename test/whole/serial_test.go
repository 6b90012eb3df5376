package whole

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/test/testimage"
)

// bootLimit is how long a guest may take to its shell: under TCG beside other work.
const bootLimit = 5 * time.Minute

// serial is the serial line of a guest with a shell.
type serial struct {
	conn net.Conn
	said strings.Builder
	n    int // commands so far
}

// openSerial connects to the socket of a serial line, as soon as it is there.
func openSerial(t *testing.T, path string) *serial {
	t.Helper()
	s := &serial{}
	until(t, "the serial line", func() (ok bool) {
		conn, err := net.Dial("unix", path)
		s.conn = conn
		return err == nil
	})
	t.Cleanup(func() { s.conn.Close() })
	return s
}

// shell waits for the shell.
func (s *serial) shell(t *testing.T) {
	t.Helper()
	// What came before the connection was made is lost: ask for another prompt now and then.
	for end := time.Now().Add(bootLimit); ; {
		if time.Now().After(end) {
			t.Fatalf("no shell on the serial line after %v; it said\n%.4000s", bootLimit, s.said.String())
		}
		fmt.Fprint(s.conn, "\n")
		if s.await(testimage.Prompt, 5*time.Second) {
			return
		}
	}
}

// await reads until text comes.
func (s *serial) await(text string, limit time.Duration) bool {
	s.said.Reset()
	s.conn.SetReadDeadline(time.Now().Add(limit))
	buf := make([]byte, 4096)
	for {
		n, err := s.conn.Read(buf)
		s.said.Write(buf[:n])
		if strings.Contains(s.said.String(), text) {
			return true
		}
		if err != nil {
			return false
		}
	}
}

// do types a command and gives what it printed; it must succeed.
func (s *serial) do(t *testing.T, command string) string {
	t.Helper()
	s.n++
	// The marks that are awaited are not in what the terminal echoes.
	fmt.Fprintf(s.conn, "echo be''gin%d; %s && echo wor''ked%d || echo fai''led%d; true\n", s.n, command, s.n, s.n)
	if !s.await(fmt.Sprintf("ed%d\r\n", s.n), 2*time.Minute) {
		t.Fatalf("%q in the guest:\n%.4000s", command, s.said.String())
	}
	_, out, _ := strings.Cut(strings.ReplaceAll(s.said.String(), "\r", ""), fmt.Sprintf("begin%d\n", s.n))
	out, _, worked := strings.Cut(out, fmt.Sprintf("worked%d\n", s.n))
	if !worked {
		t.Fatalf("%q failed in the guest:\n%.4000s", command, s.said.String())
	}
	return out
}
