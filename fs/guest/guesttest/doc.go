// Package guesttest checks a reader of a guest file system against somebody who is not us: the kernel, or ntfs-3g.
//
// [Fill] makes a tree with everything that readers get wrong, in a mounted file system; [Walk] writes down what a mounted file
// system shows, and [WalkFS] what a reader shows, in the same words; [Diff] compares. What fills is not what judges:
// the judge is a fresh mount of the same bytes.
//
// [BitLocker] makes what no program here can make.
package guesttest
