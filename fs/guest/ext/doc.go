// Package ext reads ext2, ext3 and ext4 file systems.
//
//	f, err := ext.Open(partition, guest.Options{})
//	ino, err := f.Lookup(f.Root(), "etc")
//
// It knows every incompatible feature that Linux writes: extents and block maps, 64bit, meta_bg, flex_bg, bigalloc,
// inline_data, ea_inode, large_dir, metadata_csum_seed, casefold, mmp; and refuses, by name, what it does not
// know. A directory that ignores case finds names as Linux does. All metadata checksums are verified where they are read: what does not
// match is guest.ErrDamaged, and everything else goes on being readable.
//
// A journal that holds changes is replayed into memory, with revoked blocks, escaped blocks and all three kinds of
// checksums, up to the last transaction that is whole, and fast commits behind it. What could not be replayed is a
// warning in Info: an external journal, or one that is damaged.
//
// # What it does not show
//
// Names in an encrypted directory, contents of an encrypted file and the targets of encrypted links are guest.ErrUnsupported; what stat
// tells is there. Compressed files (e2compr), Lustre's data in directories and journal devices are refused.
//
// Sources: the Linux kernel's "ext4 Data Structures and Algorithms" (docs.kernel.org/filesystems/ext4), cited below as
// ext4 doc with the chapter; FreeBSD's sys/fs/ext2fs for which hashes directories have; and observation of what Linux 6.18 and
// e2fsprogs 1.47 write, where the documents say nothing.
package ext
