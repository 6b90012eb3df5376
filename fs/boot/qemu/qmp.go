package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs/boot"
)

// monitor speaks QMP, QEMU's machine protocol: qemu.org, "QEMU Machine Protocol Specification" 1.0.
type monitor struct {
	conn net.Conn
	gone chan struct{} // closed when the connection has ended

	mu      sync.Mutex // guards following, and writing
	next    int
	waiting map[int]chan qmpMessage
	events  map[chan qmpEvent]bool
}

type qmpMessage struct {
	ID     int             `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	qmpEvent
}

type qmpEvent struct {
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// dialMonitor connects and negotiates.
func dialMonitor(ctx context.Context, socket string) (*monitor, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn, gone: make(chan struct{}), waiting: map[int]chan qmpMessage{}, events: map[chan qmpEvent]bool{}}
	// The monitor serves one client at a time: should another have it, no greeting comes.
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	in := json.NewDecoder(conn)
	var hello struct {
		QMP json.RawMessage `json:"QMP"`
	}
	if err := in.Decode(&hello); err != nil || hello.QMP == nil {
		conn.Close()
		return nil, fmt.Errorf("qemu: no greeting on %s: %w", socket, errors.Join(err, ctx.Err()))
	}
	conn.SetReadDeadline(time.Time{})
	go m.read(in)
	if err := m.do(ctx, "qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) read(in *json.Decoder) {
	defer close(m.gone)
	for {
		var msg qmpMessage
		if in.Decode(&msg) != nil {
			return
		}
		m.mu.Lock()
		if msg.Event != "" {
			for c := range m.events {
				select {
				case c <- msg.qmpEvent:
				default: // who does not keep up asks again
				}
			}
		} else if c := m.waiting[msg.ID]; c != nil {
			delete(m.waiting, msg.ID)
			c <- msg
		}
		m.mu.Unlock()
	}
}

// do carries out a command; result may be nil. boot.ErrGone when QEMU is gone.
func (m *monitor) do(ctx context.Context, command string, arguments, result any) error {
	c := make(chan qmpMessage, 1)
	m.mu.Lock()
	m.next++
	id := m.next
	m.waiting[id] = c
	text, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        int    `json:"id"`
	}{command, arguments, id})
	if err == nil {
		_, err = m.conn.Write(append(text, '\n'))
	}
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("qemu: %s: %w: %w", command, boot.ErrGone, err)
	}
	select {
	case msg := <-c:
		if msg.Error != nil {
			return fmt.Errorf("qemu: %s: %s", command, msg.Error.Desc)
		}
		if result != nil {
			return json.Unmarshal(msg.Return, result)
		}
		return nil
	case <-m.gone:
		return fmt.Errorf("qemu: %s: %w", command, boot.ErrGone)
	case <-ctx.Done():
		return fmt.Errorf("qemu: %s: %w", command, ctx.Err())
	}
}

// watch gives events until forget is called.
func (m *monitor) watch() (events chan qmpEvent, forget func()) {
	c := make(chan qmpEvent, 16)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events[c] = true
	return c, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.events, c)
	}
}
