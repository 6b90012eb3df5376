package main

import (
	"bytes"
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func TestSizeText(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB",
		1<<20 - 1: "1.0 MiB", 1<<20 - 60: "1023.9 KiB", 1 << 20: "1.0 MiB",
		1503238554: "1.4 GiB", 10 << 40: "10.0 TiB", math.MaxInt64: "8.0 EiB",
	} {
		if got := sizeText(n); got != want {
			t.Errorf("sizeText(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestDurationText(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.0s", -time.Second: "0s", 440 * time.Millisecond: "0.4s", 9940 * time.Millisecond: "9.9s",
		9960 * time.Millisecond: "10s", 59600 * time.Millisecond: "1m00s", 185 * time.Second: "3m05s",
		59*time.Minute + 59700*time.Millisecond: "1h00m", 2*time.Hour + 7*time.Minute: "2h07m", 76 * time.Hour: "3d04h",
	} {
		if got := durationText(d); got != want {
			t.Errorf("durationText(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestPercentText(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		want        string
	}{{0, 0, "-"}, {1, -1, "-"}, {0, 10, "0%"}, {math.MaxInt64 - 1, math.MaxInt64, "99%"}, {10, 10, "100%"}, {11, 10, "100%"}} {
		if got := percentText(c.done, c.total); got != c.want {
			t.Errorf("percentText(%d, %d) = %q, want %q", c.done, c.total, got, c.want)
		}
	}
}

func TestTimeText(t *testing.T) {
	at := time.Date(2026, 11, 21, 7, 30, 0, 999, time.FixedZone("CET", 3600))
	if got := timeText(at); got != "2026-11-21T06:30:00Z" {
		t.Error(got)
	}
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	r := newResults(&b, false)
	tb := newTable("VM", ">SIZE", "TIME")
	tb.row("web", "1.4 GiB", "now")
	tb.row("dätenbank\n\x1b[31m", "17 B") // a cell is missing
	r.table(tb)
	r.fields([2]string{"Id", "abc"}, [2]string{"Taken", "now"})
	r.line("%d points", 2)
	if err := r.flush(); err != nil {
		t.Fatal(err)
	}
	want := "" +
		"VM                  SIZE  TIME\n" +
		"web              1.4 GiB  now\n" +
		"dätenbank\uFFFD\uFFFD[31m     17 B\n" +
		"Id:     abc\n" +
		"Taken:  now\n" +
		"2 points\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestJSON(t *testing.T) {
	var b bytes.Buffer
	r := newResults(&b, true)
	r.line("for people")
	r.table(newTable("VM"))
	r.fields([2]string{"a", "b"})
	if err := r.object(map[string]string{"vm": "a<b>\n"}); err != nil {
		t.Fatal(err)
	}
	if want := `{"vm":"a<b>\n"}` + "\n"; b.String() != want { // before flush
		t.Errorf("got %q, want %q", b.String(), want)
	}
	if err := r.object(func() {}); err == nil {
		t.Error("a function became JSON")
	}
}

// fullDisk takes n bytes and then no more.
type fullDisk struct{ n int }

func (f *fullDisk) Write(p []byte) (int, error) {
	if len(p) > f.n {
		return 0, errors.New("no space left")
	}
	f.n -= len(p)
	return len(p), nil
}

func TestOutputFails(t *testing.T) {
	r := newResults(&fullDisk{100}, false)
	r.line("%s", strings.Repeat("x", 10_000))
	r.line("more")
	if r.flush() == nil {
		t.Error("a full disk went unnoticed")
	}
}

func TestChunkSize(t *testing.T) {
	for s, want := range map[string]int{
		"128K": 128 << 10, "128k": 128 << 10, "128KiB": 128 << 10, "131072": 128 << 10, "131072B": 128 << 10,
		"1M": 1 << 20, "4MiB": 4 << 20, "4096K": 4 << 20, "64kb": 64 << 10, "65536": 64 << 10,
	} {
		if got, err := chunkSize(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "K", "3K", "32K", "96K", "8M", "1G", "-128K", "+128K", "128 K", "1.5M", "128KK", "128iB",
		"0x20000", "131073", "4194305", "8388608", "18446744073709551616", "4503599627370624K", "1M1", "٦٤K"} {
		if got, err := chunkSize(s); !isType[*usageError](err) {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
}
