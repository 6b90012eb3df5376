package main

import "time"

// clock tells the time, so that tests can hold it still.
type clock interface {
	now() time.Time
	// tick delivers the time again and again until stop is called.
	tick(every time.Duration) (c <-chan time.Time, stop func())
}

// wallClock is the time as it is.
type wallClock struct{}

func (wallClock) now() time.Time { return time.Now() }

func (wallClock) tick(every time.Duration) (<-chan time.Time, func()) {
	t := time.NewTicker(every)
	return t.C, t.Stop
}
