package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// stillClock moves only when it is told to.
type stillClock struct {
	mu sync.Mutex // guards following
	t  time.Time

	every   time.Duration // of the only tick
	ticks   chan time.Time
	stopped bool
}

func newStillClock() *stillClock {
	return &stillClock{t: time.Unix(1_800_000_000, 0), ticks: make(chan time.Time)}
}

func (c *stillClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *stillClock) tick(every time.Duration) (<-chan time.Time, func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.every = every
	return c.ticks, func() { c.mu.Lock(); c.stopped = true; c.mu.Unlock() }
}

func (c *stillClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// beat moves the clock by one tick and returns when everything that the tick
// started is over. It needs a synctest bubble.
func (c *stillClock) beat() {
	c.advance(c.every)
	c.ticks <- c.now()
	synctest.Wait()
}

func TestLines(t *testing.T) { synctest.Test(t, testLines) }

func testLines(t *testing.T) {
	var b bytes.Buffer
	c := newStillClock()
	p := newProgress(c, choosePrinter(&b, options{}))
	take := func() string { // what was printed since
		p.mu.Lock()
		defer p.mu.Unlock()
		s := b.String()
		b.Reset()
		return s
	}
	one := p.task("web/disk0", "new", 4<<30)
	if c.every != 30*time.Second {
		t.Fatalf("a line every %v", c.every)
	}
	one.add(1 << 30)
	one.count(300 << 20)
	c.beat()
	if got, want := take(), "web/disk0: 25% 1.0 GiB of 4.0 GiB, 300.0 MiB new, 34.1 MiB/s, 1m30s left\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	two := p.task("web/disk1", "new", 1<<30)
	two.add(1 << 20)
	c.beat()
	if got := take(); !strings.HasPrefix(got, "2 running, 0 ended: 20% 1.0 GiB of 5.0 GiB, 300.0 MiB new, ") {
		t.Errorf("got %q", got)
	}
	one.add(3 << 30)
	one.end(nil)
	one.end(errors.New("late")) // does not count
	if got, want := take(), "web/disk0: 4.0 GiB, 300.0 MiB new, 68.3 MiB/s, in 1m00s\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	unknown := p.task("db/disk0", "", -1)
	two.end(fmt.Errorf("read: %w", context.Canceled))
	take()
	unknown.add(7)
	c.beat()
	if got, want := take(), "db/disk0: 7 B\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	unknown.setTotal(14)
	c.beat()
	if got, want := take(), "db/disk0: 50% 7 B of 14 B\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	p.close()
	p.close()
	if got, want := take(), "db/disk0: stopped after 7 B\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !c.stopped {
		t.Error("the ticks go on")
	}
	unknown.end(nil)
	p.task("late", "", 1).end(nil)
	p.warn("late\x1b[2J")
	if got, want := take(), "warning: late\uFFFD[2J\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := p.warned(); len(got) != 1 || got[0] != "late\uFFFD[2J" {
		t.Errorf("warnings %q", got)
	}
}

func TestInTotal(t *testing.T) { synctest.Test(t, testInTotal) }

// testInTotal: what disks add is added to the whole, and one line says how far that is.
func testInTotal(t *testing.T) {
	var b bytes.Buffer
	c := newStillClock()
	p := newProgress(c, choosePrinter(&b, options{}))
	early := p.task("early", "new", 10)
	all := p.inTotal("VMs", 2, "new", 4<<30)
	disk := p.task("web/disk0", "new", 1<<30)
	disk.add(512 << 20)
	disk.count(1 << 20)
	early.add(5) // no part of it
	c.beat()
	all.part(512 << 20)
	c.beat()
	early.end(nil)
	disk.end(errors.New("lost"))
	all.end(nil)
	p.close()
	want := []string{
		"in total: 0 of 2 VMs, 12% 512.0 MiB of 4.0 GiB, 1.0 MiB new, 17.1 MiB/s, 3m30s left",
		"in total: 1 of 2 VMs, 25% 1.0 GiB of 4.0 GiB, 1.0 MiB new, 17.1 MiB/s, 3m00s left",
		"early: 5 B, 0 B new, in 1m00s",
		"web/disk0: failed after 512.0 MiB, 1.0 MiB new, 8.5 MiB/s",
		"in total: 1 of 2 VMs, 1.0 GiB, 1.0 MiB new, 17.1 MiB/s, in 1m00s",
	}
	if got := strings.Split(strings.TrimSpace(b.String()), "\n"); !slices.Equal(got, want) {
		t.Errorf("got\n%s", b.String())
	}
}

func TestJSONLines(t *testing.T) { synctest.Test(t, testJSONLines) }

func testJSONLines(t *testing.T) {
	var b bytes.Buffer
	c := newStillClock()
	p := newProgress(c, choosePrinter(&b, options{json: true, verbose: true}))
	d := p.task("web/disk0", "written", 200)
	if c.every != 5*time.Second {
		t.Fatalf("a line every %v", c.every)
	}
	d.add(100)
	d.count(7)
	p.task("web/disk1", "", -1)
	c.beat()
	p.warn("a \"warning\"")
	p.close()
	want := []string{
		`{"bytes_done":100,"bytes_total":200,"bytes_written":7,"rate":20,"seconds_left":5,"state":"running","task":"web/disk0","type":"progress"}`,
		`{"bytes_done":0,"rate":0,"state":"running","task":"web/disk1","type":"progress"}`,
		`{"level":"warning","text":"a \"warning\"","type":"message"}`,
		`{"bytes_done":100,"bytes_total":200,"bytes_written":7,"rate":20,"state":"stopped","task":"web/disk0","type":"progress"}`,
		`{"bytes_done":0,"rate":0,"state":"stopped","task":"web/disk1","type":"progress"}`,
	}
	if got := strings.Split(strings.TrimSpace(b.String()), "\n"); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s", b.String())
	}
}

// TestRate: the rate follows a change of speed, and a stall makes it fall.
func TestRate(t *testing.T) {
	c := newStillClock()
	p := newProgress(c, &lines{w: new(bytes.Buffer)})
	d := p.task("d", "", 1<<40)
	var rate float64
	step := func(n int64, d2 time.Duration) {
		c.advance(d2)
		d.add(n)
		rate = d.look(c.now()).rate
	}
	for range 100 {
		step(1000, time.Second)
	}
	if rate < 990 || rate > 1010 {
		t.Errorf("steady 1000 B/s: %v", rate)
	}
	for range 40 {
		step(5000, time.Second)
	}
	if rate < 4800 || rate > 5010 {
		t.Errorf("40 s after 5000 B/s: %v", rate)
	}
	before := rate
	d.look(c.now())
	c.advance(time.Millisecond) // too short to measure
	if rate = d.look(c.now()).rate; rate != before {
		t.Errorf("after a moment: %v, before %v", rate, before)
	}
	for range 300 {
		step(0, time.Second)
	}
	if _, ok := d.look(c.now()).left(); ok || rate > 1 {
		t.Errorf("stalled: rate %v, and a time left", rate)
	}
}

func TestChoosePrinter(t *testing.T) {
	for _, c := range []struct {
		o    options
		want lines
	}{
		{options{}, lines{least: levelNote, interval: 30 * time.Second}},
		{options{verbose: true}, lines{least: levelDetail, interval: 30 * time.Second}},
		{options{quiet: true}, lines{least: levelWarning}},
		{options{quiet: true, verbose: true}, lines{least: levelWarning}},
		{options{noProgress: true}, lines{least: levelNote}},
		{options{json: true}, lines{least: levelNote}},
		{options{json: true, verbose: true}, lines{least: levelDetail, json: true, interval: 5 * time.Second}},
		{options{json: true, verbose: true, noProgress: true}, lines{least: levelDetail, json: true}},
		{options{json: true, verbose: true, quiet: true}, lines{least: levelWarning}},
	} {
		if got := choosePrinter(nil, c.o).(*lines); *got != c.want {
			t.Errorf("%+v: %+v, want %+v", c.o, *got, c.want)
		}
	}
}

// TestProgressRace feeds one progress from everywhere at once; the race detector
// and the sums at the end judge.
func TestProgressRace(t *testing.T) {
	var b bytes.Buffer
	c := newStillClock()
	p := newProgress(c, choosePrinter(&b, options{json: true, verbose: true}))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			d := p.task(fmt.Sprint("vm/disk", i), "new", 100_000)
			var readers sync.WaitGroup
			for range 4 {
				readers.Go(func() {
					for range 25_000 {
						d.add(1)
						d.count(1)
					}
				})
			}
			readers.Wait()
			p.warn("disk %d", i)
			d.end(nil)
		})
	}
	for range 20 {
		select {
		case c.ticks <- c.now():
		case <-time.After(10 * time.Millisecond): // nothing runs yet
		}
	}
	wg.Wait()
	p.close()
	done := 0
	for line := range strings.Lines(b.String()) {
		var o struct {
			Type, State string
			Done        int64 `json:"bytes_done"`
			New         int64 `json:"bytes_new"`
		}
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("torn line %q", line)
		}
		if o.State == "done" {
			done++
			if o.Done != 100_000 || o.New != 100_000 {
				t.Errorf("last line of a task: %s", line)
			}
		}
	}
	if done != 8 || len(p.warned()) != 8 {
		t.Errorf("%d tasks done, %d warnings", done, len(p.warned()))
	}
}

func BenchmarkTaskAdd(b *testing.B) {
	p := newProgress(newStillClock(), &lines{w: new(bytes.Buffer)})
	d := p.task("d", "new", 1<<40)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			d.add(1)
		}
	})
}
