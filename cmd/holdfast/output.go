package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// results prints what a command found, on stdout: text for people or, with
// --json, one object per line. The first write error sticks; flush returns it.
// Not safe for concurrent use.
type results struct {
	w    *bufio.Writer
	json bool
}

func newResults(w io.Writer, json bool) *results {
	return &results{bufio.NewWriter(w), json}
}

// object prints v as one line of JSON and flushes it, so that a reader on a pipe
// sees every object as soon as it is there. Without --json it does nothing.
func (r *results) object(v any) error {
	if !r.json {
		return nil
	}
	e := json.NewEncoder(r.w)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	return r.w.Flush()
}

// line prints one line of text. With --json it does nothing.
func (r *results) line(format string, a ...any) {
	if !r.json {
		fmt.Fprintln(r.w, printable(fmt.Sprintf(format, a...)))
	}
}

// fields prints names and values, aligned. With --json it does nothing.
func (r *results) fields(pairs ...[2]string) {
	t := newTable("", "")
	for _, p := range pairs {
		t.row(p[0]+":", p[1])
	}
	r.table(t)
}

// table prints t. With --json it does nothing.
func (r *results) table(t *table) {
	if !r.json {
		t.print(r.w)
	}
}

// flush prints what is still buffered and returns the first error of all writes.
func (r *results) flush() error { return r.w.Flush() }

// table is text in columns. It is held in memory until it is printed.
type table struct {
	header []string
	right  []bool // per column: aligned to the right
	rows   [][]string
}

// newTable names the columns; a name that begins with ">" makes its column
// aligned to the right. If all names are empty, no header is printed.
func newTable(columns ...string) *table {
	t := &table{}
	for _, c := range columns {
		name, right := strings.CutPrefix(c, ">")
		t.header = append(t.header, name)
		t.right = append(t.right, right)
	}
	return t
}

// row adds a row, of one cell per column.
func (t *table) row(cells ...string) {
	row := make([]string, len(t.header))
	for i := range row {
		if i < len(cells) {
			row[i] = printable(cells[i])
		}
	}
	t.rows = append(t.rows, row)
}

func (t *table) print(w io.Writer) {
	rows := t.rows
	if strings.Join(t.header, "") != "" {
		rows = append([][]string{t.header}, rows...)
	}
	width := make([]int, len(t.header)) // runes
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	var line strings.Builder
	for _, row := range rows {
		line.Reset()
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if i > 0 {
				line.WriteString("  ")
			}
			if t.right[i] {
				line.WriteString(pad + cell)
			} else {
				line.WriteString(cell + pad)
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

// sizeText is a number of bytes in binary units: "17 B", "1.4 GiB".
func sizeText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	// 1023.95 would be printed as "1024.0", which is 1.0 of the next unit.
	for v >= 1023.95 && unit < 5 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[unit])
}

// durationText is a duration as people read it: "0.4s", "12s", "3m05s", "2h07m", "3d04h".
func durationText(d time.Duration) string {
	s := int64(d.Round(time.Second) / time.Second)
	switch {
	case d < 0:
		return "0s"
	case d < 9950*time.Millisecond:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 24*3600:
		return fmt.Sprintf("%dh%02dm", s/3600, s%3600/60)
	}
	return fmt.Sprintf("%dd%02dh", s/86400, s%86400/3600)
}

// timeText is a time in UTC, to the second, as RFC 3339.
func timeText(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// percentText is done of total, "-" when there is no total. It says 100% only
// when all is done.
func percentText(done, total int64) string {
	if total <= 0 {
		return "-"
	}
	p := math.Floor(100 * float64(done) / float64(total))
	if done < total {
		p = min(p, 99)
	}
	return fmt.Sprintf("%.0f%%", min(max(p, 0), 100))
}

// printable replaces what could move the cursor or break a line: file names and
// text from a repository are shown on terminals, and others may have chosen them.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && r != '\t' {
			return '\uFFFD'
		}
		return r
	}, s)
}
