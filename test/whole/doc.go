// Package whole tests the holdfast program as a user meets it: the real binary
// on real disks, checked by tools that are not ours (qemu-img, cmp, the kernel's own mounts).
//
// The binary is built once, without the race detector. What needs root, FUSE or qemu
// skips with a reason, and fails instead when HOLDFAST_TEST_ALL is 1. With -short everything
// skips. HOLDFAST_TEST_DIR names a directory on a disk for the scratch files (default
// /var/tmp; they are sparse), HOLDFAST_KILL_TIME how long each of the five kill -9 tests
// goes on (default 30s; they run in parallel).
package whole
