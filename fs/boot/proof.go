package boot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// Sign is a sign of life that a VM gives when it has booted.
type Sign struct {
	Serial *regexp.Regexp // a line of the serial port that matches
	Agent  bool           // its guest agent answers
	Still  time.Duration  // the screen has changed, and then not for so long
}

// DefaultSign is for a VM of which nothing is known: somebody can log in at its serial port, or its agent
// answers. A screen that is still is no sign by itself: that of a VM that finds no system is, too.
func DefaultSign() Sign { return Sign{Serial: regexp.MustCompile(`login:`), Agent: true} }

// ParseSign reads "auto", "agent", "serial:REGEXP", "screen" or "screen:30s".
func ParseSign(s string) (Sign, error) {
	kind, rest, more := strings.Cut(s, ":")
	switch {
	case s == "" || s == "auto":
		return DefaultSign(), nil
	case s == "agent":
		return Sign{Agent: true}, nil
	case kind == "serial" && rest != "":
		re, err := regexp.Compile(rest)
		return Sign{Serial: re}, err
	case s == "screen":
		return Sign{Still: 30 * time.Second}, nil
	case kind == "screen" && more:
		d, err := time.ParseDuration(rest)
		if err == nil && d < time.Second {
			err = errors.New("less than a second")
		}
		return Sign{Still: d}, err
	}
	return Sign{}, errors.New("want auto, agent, serial:REGEXP or screen[:30s]")
}

// Pinger is a Guest that can ask the agent in it whether it is there.
type Pinger interface {
	Ping(ctx context.Context) error
}

// Proof is what was seen of a point when it was booted to see whether it does.
type Proof struct {
	Point  store.PointID `json:"point"`
	Time   time.Time     `json:"time"`
	OK     bool          `json:"ok"`
	Sign   string        `json:"sign,omitempty"`   // that was seen
	Why    string        `json:"why,omitempty"`    // it is not ok
	Took   float64       `json:"took_s"`           // seconds until the sign, or the end
	Serial []byte        `json:"serial,omitempty"` // the end of what its serial port said
	Screen []byte        `json:"screen,omitempty"` // PNG
}

const (
	proofKind = "proof"
	maxSerial = 256 << 10 // bytes kept of what the serial port said
)

// SaveProof keeps a proof with its point.
func SaveProof(ctx context.Context, repo *store.Repo, p *Proof) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return repo.SetNote(ctx, proofKind, p.Point.String(), b)
}

// ProofOf gives the proof that was kept last. store.ErrNotExist when there is none.
func ProofOf(ctx context.Context, repo *store.Repo, id store.PointID) (*Proof, error) {
	b, err := repo.Note(ctx, proofKind, id.String())
	if err != nil {
		return nil, err
	}
	p := &Proof{}
	if err := json.Unmarshal(b, p); err != nil {
		return nil, fmt.Errorf("boot: proof of %s: %w", id, err)
	}
	return p, nil
}

// SweepProofs removes the proofs of points that there are no more.
func SweepProofs(ctx context.Context, repo *store.Repo) error {
	points, err := repo.Points(ctx)
	if err != nil {
		return err
	}
	var keep []string
	for i := range points {
		keep = append(keep, points[i].ID.String())
	}
	return repo.SweepNotes(ctx, proofKind, keep)
}

// Prove boots the session, waits for a sign of life until limit is over, and switches the VM off. An error
// means that nothing can be said of the point: that the host failed, or that ctx ended.
func (s *Session) Prove(ctx context.Context, host Host, sign Sign, limit time.Duration) (*Proof, error) {
	p := &Proof{Point: s.Point, Time: time.Now().UTC()}
	run, stop := context.WithCancel(ctx)
	defer stop()
	ready, ended := make(chan struct{}), make(chan error, 1)
	var troubles trouble
	go func() {
		_, err := s.Run(run, host, RunOptions{Ready: func(*State) { close(ready) }, Log: troubles.add})
		ended <- err
	}()
	select {
	case <-ready:
	case err := <-ended:
		return nil, errors.Join(err, ctx.Err())
	}
	began := time.Now()
	w := watch{s: s, sign: sign}
	for p.Sign == "" && p.Why == "" {
		select {
		case err := <-ended:
			ended <- err
			p.Why = "the VM ended by itself"
		case <-ctx.Done():
		case <-time.After(time.Second):
			p.Sign = w.look(run)
		}
		if ctx.Err() != nil {
			stop()
			return nil, errors.Join(ctx.Err(), <-ended)
		}
		if p.Sign == "" && p.Why == "" && time.Since(began) > limit {
			p.Why = fmt.Sprintf("no sign of life in %s", limit)
		}
	}
	p.Took = time.Since(began).Seconds()
	p.Screen = w.shot(run)
	stop()
	err := <-ended
	p.Serial = s.serialTail()
	if said := troubles.text(); said != "" { // a disk that cannot be read
		p.Why = strings.TrimPrefix(p.Why+"; "+said, "; ")
	}
	p.OK = p.Why == ""
	return p, err
}

// trouble collects what went wrong while a VM ran.
type trouble struct {
	mu   sync.Mutex // guards following
	said []string
}

func (t *trouble) add(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if errors.Is(err, store.ErrDamaged) && len(t.said) < 10 {
		t.said = append(t.said, err.Error())
	}
}

func (t *trouble) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.said, "; ")
}

// watch looks for a sign.
type watch struct {
	s       *Session
	sign    Sign
	screens int // different ones
	last    [32]byte
	since   time.Time // of the last
}

// look gives the sign that is seen now, or nothing.
func (w *watch) look(ctx context.Context) string {
	if w.sign.Serial != nil {
		for line := range bytes.Lines(w.s.serialTail()) {
			if line = bytes.TrimRight(line, "\r\n"); w.sign.Serial.Match(line) {
				return fmt.Sprintf("serial line %.200q", line)
			}
		}
	}
	if g, ok := w.s.guest.(Pinger); ok && w.sign.Agent {
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if g.Ping(ask) == nil {
			return "guest agent answers"
		}
	}
	if w.sign.Still > 0 {
		sum := sha256.Sum256(w.shot(ctx))
		if sum != w.last {
			w.screens++
			w.last, w.since = sum, time.Now()
		}
		if w.screens > 1 && time.Since(w.since) >= w.sign.Still {
			return fmt.Sprintf("screen still for %s", w.sign.Still)
		}
	}
	return ""
}

// shot is what is on the screen; nil when that cannot be had.
func (w *watch) shot(ctx context.Context) []byte {
	var b bytes.Buffer
	if w.s.guest.Screenshot(ctx, &b) != nil {
		return nil
	}
	return b.Bytes()
}

// serialTail is the end of what the serial port said.
func (s *Session) serialTail() []byte {
	f, err := os.Open(s.File(SerialLog))
	if err != nil {
		return nil
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > maxSerial {
		f.Seek(-maxSerial, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, maxSerial))
	return b
}
