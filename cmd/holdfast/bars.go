package main

import (
	"fmt"
	"io"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// bars draws one bar per running task on a terminal. Messages and tasks that have
// ended scroll away above them.
type bars struct {
	w     io.Writer
	least level         // messages below it are dropped
	pool  *mpb.Progress // nil until the first task
	drawn map[*task]*mpb.Bar
}

var _ printer = (*bars)(nil)

// every is 0: the library looks at the tasks by itself, 7 times a second.
func (b *bars) every() time.Duration { return 0 }
func (b *bars) tick([]*task, int)    {}

func (b *bars) begin(t *task) {
	if b.pool == nil {
		b.drawn = map[*task]*mpb.Bar{}
		b.pool = mpb.New(mpb.WithOutput(b.w), mpb.WithAutoRefresh(), mpb.PopCompletedMode())
	}
	bar, err := b.pool.Add(0, fillerOf(t),
		mpb.PrependDecorators(decor.Name(printable(t.name), decor.WCSyncWidthR)),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return t.look(t.owner.clock.now()).text() })))
	if err == nil { // else the terminal is gone
		b.drawn[t] = bar
	}
}

// fillerOf draws how much of a task is done, and nothing when that is unknown or
// the task has ended.
func fillerOf(t *task) mpb.BarFiller {
	bar := mpb.BarStyle().Build()
	return mpb.BarFillerFunc(func(w io.Writer, s decor.Statistics) error {
		v := t.look(t.owner.clock.now())
		if v.total <= 0 || v.state != stateRunning {
			return nil
		}
		s.Total, s.Current = v.total, min(v.done, v.total)
		s.RequestedWidth = 30
		return bar.Fill(w, s)
	})
}

func (b *bars) end(t *task) {
	bar := b.drawn[t]
	if bar == nil {
		return
	}
	delete(b.drawn, t)
	bar.SetTotal(-1, true)
}

func (b *bars) message(l level, text string) {
	if l < b.least {
		return
	}
	line := messageText(l, text) + "\n"
	if b.pool != nil {
		if _, err := b.pool.Write([]byte(line)); err == nil {
			return
		}
	}
	fmt.Fprint(b.w, line)
}

// close waits for the last drawing. All tasks have ended by then.
func (b *bars) close() {
	if b.pool != nil {
		b.pool.Wait()
	}
}
