package boot

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/fs/nbd"
)

// The control socket takes one request per connection, a line of JSON, and answers with lines of
// JSON: any number with progress, then one that ends it.

// maxRequest bounds a request, bytes.
const maxRequest = 64 << 10

type request struct {
	Do   string      `json:"do"` // "stop", "commit", "migrate", "screenshot"
	Stop StopRequest `json:"stop,omitzero"`
	Tags []string    `json:"tags,omitempty"`
	Disk string      `json:"disk,omitempty"`
	File string      `json:"file,omitempty"`
}

type answer struct {
	Done   int64           `json:"done,omitempty"` // of Total; progress
	Total  int64           `json:"total,omitempty"`
	End    bool            `json:"end,omitempty"`
	Error  string          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// control is a control socket that is listened on.
type control struct {
	ln     net.Listener
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// listen answers requests until close is called.
func (s *Session) listen(ctx context.Context, opt RunOptions) (*control, error) {
	ln, err := nbd.Listen("unix:" + s.File(ControlSocket))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &control{ln: ln, cancel: cancel}
	c.work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			c.work.Go(func() {
				defer conn.Close()
				s.answer(ctx, conn, opt)
			})
		}
	})
	return c, nil
}

func (c *control) close() {
	c.cancel()
	c.ln.Close()
	c.work.Wait()
}

// answer deals with one connection.
func (s *Session) answer(ctx context.Context, conn net.Conn, opt RunOptions) {
	var mu sync.Mutex // one answer at a time
	say := func(a answer) {
		mu.Lock()
		defer mu.Unlock()
		conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		json.NewEncoder(conn).Encode(a)
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	line, err := bufio.NewReaderSize(conn, maxRequest).ReadSlice('\n')
	var req request
	if err == nil {
		err = json.Unmarshal(line, &req)
	}
	if err != nil {
		say(answer{End: true, Error: "not a request: " + err.Error()})
		return
	}
	result, err := s.carryOut(ctx, req, opt, func(done, total int64) { say(answer{Done: done, Total: total}) })
	end := answer{End: true}
	if err == nil && result != nil {
		end.Result, err = json.Marshal(result)
	}
	if err != nil {
		end.Error = err.Error()
	}
	say(end)
}

func (s *Session) carryOut(ctx context.Context, req request, opt RunOptions, progress func(done, total int64)) (any, error) {
	switch req.Do {
	case "stop":
		s.stop(req.Stop)
		return nil, nil
	case "commit":
		if opt.Commit == nil {
			return nil, errors.New("this process cannot commit")
		}
		return opt.Commit(ctx, s, req.Tags)
	case "migrate":
		return nil, s.Migrate(ctx, req.Disk, req.File, slowly(progress))
	case "screenshot":
		return nil, s.screenshot(ctx, req.File)
	}
	return nil, fmt.Errorf("request %q is not known", req.Do)
}

// slowly passes progress on a few times a second.
func slowly(progress func(done, total int64)) func(done, total int64) {
	var mu sync.Mutex
	var last time.Time
	return func(done, total int64) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) > 200*time.Millisecond || done == total {
			last = now
			progress(done, total)
		}
	}
}

func (s *Session) screenshot(ctx context.Context, file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	s.mu.Lock()
	guest := s.guest
	s.mu.Unlock()
	return errors.Join(guest.Screenshot(ctx, f), f.Close())
}

// call asks the process that serves a session. progress may be nil.
func (s *State) call(ctx context.Context, req request, progress func(done, total int64)) (json.RawMessage, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.File(ControlSocket))
	if err != nil {
		return nil, fmt.Errorf("boot: %s: %w", s.Name, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return nil, fmt.Errorf("boot: %s: %w", s.Name, err)
	}
	for in := json.NewDecoder(conn); ; {
		var a answer
		if err := in.Decode(&a); err != nil {
			return nil, errors.Join(ctx.Err(), fmt.Errorf("boot: the process that serves %s went away: %w", s.Name, err))
		}
		switch {
		case a.Error != "":
			return nil, errors.New(a.Error)
		case a.End:
			return a.Result, nil
		case progress != nil:
			progress(a.Done, a.Total)
		}
	}
}

// AskStop asks the process that serves the session to end it. It returns when that was heard.
func (s *State) AskStop(ctx context.Context, how StopRequest) error {
	_, err := s.call(ctx, request{Do: "stop", Stop: how}, nil)
	return err
}

// AskCommit asks for a point of the disks as they are, and gives what RunOptions.Commit gave, as JSON.
func (s *State) AskCommit(ctx context.Context, tags []string) (json.RawMessage, error) {
	return s.call(ctx, request{Do: "commit", Tags: tags}, nil)
}

// AskMigrate asks to move a disk to a file, and waits until it is there.
func (s *State) AskMigrate(ctx context.Context, disk, file string, progress func(done, total int64)) error {
	_, err := s.call(ctx, request{Do: "migrate", Disk: disk, File: file}, progress)
	return err
}

// AskScreenshot asks for what is on the screen, as a PNG in file.
func (s *State) AskScreenshot(ctx context.Context, file string) error {
	_, err := s.call(ctx, request{Do: "screenshot", File: file}, nil)
	return err
}
