package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

// progress is how far a command has come: tasks, such as the disks of a backup,
// and what there was to say meanwhile. Backup, restore and verify feed the same
// one; a printer shows it. All methods are safe for concurrent use; the counters
// of a task are atomics and cheap enough to call for every chunk.
type progress struct {
	clock clock

	mu sync.Mutex // guards following, and serialises the printer
	// printer shows everything below.
	printer  printer
	running  []*task
	whole    *task // of which the others are parts; nil when there is none
	ended    int   // tasks
	warnings []string
	ticking  chan struct{} // closed to end the ticks; nil until the first task
	ticked   chan struct{} // closed when they have ended
	closed   bool
}

// maxWarnings bounds the warnings kept for the result; more are only printed.
const maxWarnings = 1000

// level says who wants to read a message.
type level int

const (
	levelDetail level = iota // those who asked with --verbose
	levelNote                // everybody but those who asked for --quiet
	levelWarning
)

func (l level) String() string { return [...]string{"detail", "note", "warning"}[l] }

// printer shows progress. Its methods are called one at a time, close last.
type printer interface {
	begin(t *task)
	end(t *task)
	message(l level, text string)
	// every is how often the printer wants tick; 0 is never.
	every() time.Duration
	tick(running []*task, ended int)
	close()
}

func newProgress(c clock, p printer) *progress { return &progress{clock: c, printer: p} }

// choosePrinter decides who shows progress: bars on a terminal, else a line every
// 30 s; with --json nothing but warnings, unless -v asks for JSON lines.
func choosePrinter(stderr io.Writer, o options) printer {
	l := &lines{w: stderr, least: levelNote}
	switch {
	case o.quiet:
		l.least = levelWarning
	case o.verbose:
		l.least = levelDetail
	}
	if o.json && o.verbose && !o.quiet {
		l.json = true
	}
	switch {
	case o.quiet, o.noProgress, o.json && !o.verbose:
		return l
	case l.json:
		l.interval = 5 * time.Second
		return l
	case drawable(stderr):
		return &bars{w: stderr, least: l.least}
	}
	l.interval = 30 * time.Second
	return l
}

// drawable reports whether bars can be drawn on w.
func drawable(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" || !term.IsTerminal(int(f.Fd())) {
		return false
	}
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0 && height > 0
}

// task begins a task, such as "web/disk0". total is in bytes, negative when
// unknown. counts names what task.count counts, such as "new" bytes, and is empty
// when nothing is counted. The caller must end the task.
func (p *progress) task(name, counts string, total int64) *task {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.beginLocked(&task{name: name, counts: counts, whole: p.whole}, total)
}

// inTotal begins a task that is the whole of those which begin after it: what they add and count is added and counted for it, too. It
// shows how many of parts, such as "VMs", have ended: see part.
func (p *progress) inTotal(parts string, n int, counts string, total int64) *task {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.whole = p.beginLocked(&task{name: "in total", counts: counts, parts: parts, allParts: n}, total)
	return p.whole
}

func (p *progress) beginLocked(t *task, total int64) *task {
	t.owner, t.started = p, p.clock.now()
	t.total.Store(total)
	t.sampled = t.started
	if p.closed {
		return t
	}
	p.running = append(p.running, t)
	p.printer.begin(t)
	if every := p.printer.every(); every > 0 && p.ticking == nil {
		p.ticking, p.ticked = make(chan struct{}), make(chan struct{})
		c, stop := p.clock.tick(every)
		go p.tick(c, stop)
	}
	return t
}

func (p *progress) tick(c <-chan time.Time, stop func()) {
	defer close(p.ticked)
	defer stop()
	for {
		select {
		case <-p.ticking:
			return
		case <-c:
		}
		p.mu.Lock()
		if len(p.running) > 0 {
			p.printer.tick(p.running, p.ended)
		}
		p.mu.Unlock()
	}
}

// warn says what the user should know though the work goes on. Warnings are
// kept for the result.
func (p *progress) warn(format string, a ...any) { p.say(levelWarning, format, a...) }

// note says what went as planned.
func (p *progress) note(format string, a ...any) { p.say(levelNote, format, a...) }

// detail says what only --verbose shows.
func (p *progress) detail(format string, a ...any) { p.say(levelDetail, format, a...) }

func (p *progress) say(l level, format string, a ...any) {
	text := printable(fmt.Sprintf(format, a...))
	p.mu.Lock()
	defer p.mu.Unlock()
	if l == levelWarning && len(p.warnings) < maxWarnings {
		p.warnings = append(p.warnings, text)
	}
	p.printer.message(l, text)
}

// warned returns the warnings so far, the first maxWarnings of them.
func (p *progress) warned() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.warnings)
}

// close ends the tasks that still run as stopped and shows the last state of
// everything. It may be called twice. Messages after it are still printed.
func (p *progress) close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	ticked := p.ticked
	if p.ticking != nil {
		close(p.ticking)
	}
	for len(p.running) > 0 {
		p.endLocked(p.running[0], stateStopped)
	}
	p.printer.close()
	p.mu.Unlock()
	if ticked != nil {
		<-ticked
	}
}

func (p *progress) endLocked(t *task, s state) {
	i := slices.Index(p.running, t)
	if i < 0 {
		return // ended before
	}
	p.running = slices.Delete(p.running, i, i+1)
	p.ended++
	t.finish(s, p.clock.now())
	p.printer.end(t)
}

// state of a task.
type state int32

const (
	stateRunning state = iota
	stateDone
	stateFailed
	stateStopped // by the user, or because something else failed
)

func (s state) String() string { return [...]string{"running", "done", "failed", "stopped"}[s] }

// task is one piece of work, measured in bytes.
type task struct {
	owner   *progress
	name    string
	counts  string
	started time.Time
	whole   *task // that this one is a part of; nil for none
	// parts is what allParts of them are, empty for a task that has none.
	parts    string
	allParts int

	total, done, counted atomic.Int64 // bytes; total < 0: unknown
	files                atomic.Int64
	ended                atomic.Int64 // parts

	mu sync.Mutex // guards following
	// state, and what the rate is computed from: the bytes done at the time of
	// the last look, and the rate then.
	state   state
	stopped time.Time
	sampled time.Time
	before  int64   // bytes
	rate    float64 // bytes per second
}

// add reports n more bytes as done.
func (t *task) add(n int64) {
	t.done.Add(n)
	if t.whole != nil {
		t.whole.done.Add(n)
	}
}

// count reports n more bytes of those that the task counts, such as new ones.
// They are not added to the bytes done.
func (t *task) count(n int64) {
	t.counted.Add(n)
	if t.whole != nil {
		t.whole.counted.Add(n)
	}
}

// part reports that one more part has ended, of whose bytes rest were not added.
func (t *task) part(rest int64) {
	t.add(rest)
	t.ended.Add(1)
}

// file reports one more file as done, where they are counted.
func (t *task) file() { t.files.Add(1) }

// setTotal tells the total, in bytes, once it is known.
func (t *task) setTotal(n int64) { t.total.Store(n) }

// end ends the task: done, failed, or stopped when err is a cancelled context's.
// Only the first call counts.
func (t *task) end(err error) {
	s := stateDone
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errInterrupted):
		s = stateStopped
	case err != nil:
		s = stateFailed
	}
	t.owner.mu.Lock()
	defer t.owner.mu.Unlock()
	t.owner.endLocked(t, s)
}

func (t *task) finish(s state, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.state, t.stopped = s, now
}

// rateMemory is how fast a change of speed shows in the rate.
const rateMemory = 10 * time.Second

// look returns the task as it is now. The rate of a running task is a moving
// average, and one of the whole run once it has ended.
func (t *task) look(now time.Time) view {
	v := view{task: t.name, counts: t.counts, total: t.total.Load(), done: t.done.Load(), counted: t.counted.Load(), files: t.files.Load()}
	v.parts, v.endedParts, v.allParts = t.parts, int(t.ended.Load()), t.allParts
	t.mu.Lock()
	defer t.mu.Unlock()
	v.state = t.state
	if t.state != stateRunning {
		v.elapsed = t.stopped.Sub(t.started)
		if v.elapsed > 0 {
			v.rate = float64(v.done) / v.elapsed.Seconds()
		}
		return v
	}
	v.elapsed = now.Sub(t.started)
	// Two looks within a moment would measure noise.
	if dt := now.Sub(t.sampled); dt >= 100*time.Millisecond {
		rate := float64(v.done-t.before) / dt.Seconds()
		if t.sampled.Equal(t.started) {
			t.rate = rate
		} else {
			t.rate += (rate - t.rate) * (1 - math.Exp(-dt.Seconds()/rateMemory.Seconds()))
		}
		t.sampled, t.before = now, v.done
	}
	v.rate = t.rate
	return v
}

// view is a task, or a sum of several, at one moment.
type view struct {
	task                 string
	state                state
	counts               string
	total, done, counted int64 // bytes; total < 0: unknown
	files                int64
	rate                 float64 // bytes per second
	elapsed              time.Duration
	parts                string
	endedParts, allParts int
}

// left is the time that remains at the present rate; ok is false when it is unknown.
func (v view) left() (d time.Duration, ok bool) {
	if v.state != stateRunning || v.total < 0 || v.rate < 1 {
		return 0, false
	}
	s := float64(max(v.total-v.done, 0)) / v.rate
	if s > 1e8 { // three years: stalled
		return 0, false
	}
	return time.Duration(s * float64(time.Second)), true
}

// text is the view in one line, without the name of the task.
func (v view) text() string {
	var parts []string
	if v.parts != "" {
		parts = append(parts, fmt.Sprintf("%d of %d %s", v.endedParts, v.allParts, v.parts))
	}
	switch {
	case v.state == stateFailed || v.state == stateStopped:
		parts = append(parts, fmt.Sprintf("%s after %s", v.state, sizeText(v.done)))
	case v.state == stateDone || v.total < 0:
		parts = append(parts, sizeText(v.done))
	default:
		parts = append(parts, fmt.Sprintf("%s %s of %s", percentText(v.done, v.total), sizeText(v.done), sizeText(v.total)))
	}
	if v.files > 0 {
		parts = append(parts, fmt.Sprintf("%d files", v.files))
	}
	if v.counts != "" {
		parts = append(parts, sizeText(v.counted)+" "+v.counts)
	}
	if v.rate >= 1 {
		parts = append(parts, sizeText(int64(v.rate))+"/s")
	}
	if d, ok := v.left(); ok {
		parts = append(parts, durationText(d)+" left")
	}
	if v.state == stateDone {
		parts = append(parts, "in "+durationText(v.elapsed))
	}
	return strings.Join(parts, ", ")
}

// sum adds up tasks that run at once. Its total is unknown if any of theirs is.
func sum(running []*task, now time.Time) view {
	var s view
	for i, t := range running {
		v := t.look(now)
		if i == 0 {
			s.counts = v.counts
		} else if s.counts != v.counts {
			s.counts = ""
		}
		if v.total < 0 || s.total < 0 {
			s.total = -1
		} else {
			s.total += v.total
		}
		s.done += v.done
		s.counted += v.counted
		s.files += v.files
		s.rate += v.rate
		s.elapsed = max(s.elapsed, v.elapsed)
	}
	return s
}
