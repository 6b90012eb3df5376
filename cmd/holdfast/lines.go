package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"
)

// lines prints progress as lines for logs and, as JSON, for programs:
//
//	{"type":"progress","task":"web/disk0","state":"running","bytes_total":…,"bytes_done":…,"bytes_new":…,"rate":…,"seconds_left":…}
//	{"type":"message","level":"warning","text":"…"}
//
// bytes_total and seconds_left are missing while unknown; bytes_new is called
// after what the task counts. What is done in total, of several VMs, is the task
// "in total", with parts_done and parts_total.
type lines struct {
	w        io.Writer
	json     bool
	least    level         // messages below it are dropped
	interval time.Duration // between two states; 0: messages only
}

var _ printer = (*lines)(nil)

func (l *lines) every() time.Duration { return l.interval }

func (l *lines) begin(*task) {}

func (l *lines) end(t *task) {
	if l.interval > 0 {
		l.show(t.look(t.owner.clock.now()))
	}
}

func (l *lines) tick(running []*task, ended int) {
	now := running[0].owner.clock.now()
	if i := slices.IndexFunc(running, func(t *task) bool { return t.parts != "" }); i >= 0 && !l.json {
		l.show(running[i].look(now))
		return
	}
	if !l.json && len(running) > 1 {
		s := sum(running, now)
		s.task = fmt.Sprintf("%d running, %d ended", len(running), ended)
		l.show(s)
		return
	}
	for _, t := range running {
		l.show(t.look(now))
	}
}

func (l *lines) show(v view) {
	if !l.json {
		fmt.Fprintf(l.w, "%s: %s\n", printable(v.task), v.text())
		return
	}
	o := map[string]any{
		"type": "progress", "task": v.task, "state": v.state.String(),
		"bytes_done": v.done, "rate": int64(v.rate),
	}
	if v.total >= 0 {
		o["bytes_total"] = v.total
	}
	if v.files > 0 {
		o["files_done"] = v.files
	}
	if v.parts != "" {
		o["parts_done"], o["parts_total"] = v.endedParts, v.allParts
	}
	if v.counts != "" {
		o["bytes_"+v.counts] = v.counted
	}
	if d, ok := v.left(); ok {
		o["seconds_left"] = int64(d.Seconds())
	}
	l.object(o)
}

func (l *lines) message(lv level, text string) {
	switch {
	case lv < l.least:
	case l.json:
		l.object(map[string]any{"type": "message", "level": lv.String(), "text": text})
	default:
		fmt.Fprintln(l.w, messageText(lv, text))
	}
}

// object prints one line. Nobody can be told when stderr is gone.
func (l *lines) object(o map[string]any) {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err) // only strings and numbers come here
	}
	_, _ = l.w.Write(append(b, '\n'))
}

func (l *lines) close() {}

// messageText is a message as people read it.
func messageText(l level, text string) string {
	if l == levelWarning {
		return "warning: " + text
	}
	return text
}
