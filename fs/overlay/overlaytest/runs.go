package overlaytest

import (
	"os"
	"strconv"
	"testing"
)

// Runs is how often a test of crashes at random runs: HOLDFAST_TEST_OVERLAY_RUNS, or else 1,000, with -short 200.
func Runs(t *testing.T) int {
	t.Helper()
	if s := os.Getenv("HOLDFAST_TEST_OVERLAY_RUNS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if testing.Short() {
		return 200
	}
	return 1000
}
