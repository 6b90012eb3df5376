// Package overlay kills a process that serves an overlay over NBD, at random moments, and looks at what the next
// process finds. HOLDFAST_TEST_OVERLAY_RUNS says how often, 1,000 when it is not set. Power cuts are
// tested beside the package itself, fs/overlay.
package overlay
