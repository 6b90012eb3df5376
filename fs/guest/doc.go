// Package guest is what the readers of guest file systems have in common: what a file system can be asked, what
// carries one, and how a reader keeps to its bounds on a disk that somebody else wrote.
//
// A reader lives in a package of its own below this one (ext, xfs, ntfs …) and has a function
//
//	func Open(dev guest.Device, opt guest.Options) (*FS, error)
//
// that gives a [FS]. A disk is never written: what a journal holds is replayed into an [Overlay] in memory, so that
// a disk which was copied while its guest ran shows what the guest's own kernel would show after a crash.
//
// # What a reader promises
//
//   - Everything is asked by inode number, so that a directory of a million names costs no more than its own
//     blocks. Opening reads the superblock, the journal and little else; files are read where they are asked for.
//   - All methods are safe for concurrent use.
//   - Names are bytes, as the disk has them; only those stored as UTF-16 are made UTF-8 (an unpaired surrogate as
//     its three bytes, WTF-8).
//   - A hole, an unwritten extent and what lies behind the valid length read as zeros. Nothing else does: what
//     cannot be read, or does not match its checksum, is [ErrDamaged], and what this package knows that it
//     cannot show is [ErrUnsupported]; never zeros, never data that ends early.
//   - Whatever the disk says, there is no panic, no endless loop and no allocation beyond the bounds of [Options].
//
// # What it does not promise
//
// The bytes of a file system are a guest's, and may lie: a link may name any path, an owner any number. Whoever
// shows them to others (a mount, a restore) decides what is followed and what is allowed.
package guest
