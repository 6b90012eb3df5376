package store

import (
	"encoding/hex"
	"reflect"
	"testing"
	"time"
)

// TestSummaryFormats: what an older program put into an index is still read, and
// what a newer one put there is not guessed at.
func TestSummaryFormats(t *testing.T) {
	// As the encoder of format 1 wrote it.
	old, err := hex.DecodeString("010377656212323032362d31312d3231543036333030305a00d0e989b00d04808080808040d8040e0202076e696768746c7900")
	if err != nil {
		t.Fatal(err)
	}
	want := Summary{VM: "web", Name: "2026-11-21T063000Z", Time: time.Unix(1795242600, 0).UTC(), Disks: 2, Total: 1 << 40,
		New: 300, Stored: 7, Warnings: 1, Tags: []string{"nightly", ""}}
	if got, err := decodeSummary(old); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("format 1: %+v, %v", got, err)
	}
	for _, locked := range []time.Time{{}, time.Unix(1e9, 0).UTC(), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)} {
		want.LockedUntil = locked
		b := want.encode()
		if got, err := decodeSummary(b); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v", got, err)
		}
		for _, format := range []byte{0, 1, summaryFormat + 1} {
			b[0] = format
			if got, err := decodeSummary(b); err == nil {
				t.Errorf("format 2 read as %d: %+v", format, got)
			}
		}
	}
}
