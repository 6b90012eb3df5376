// Package folder shows a local directory by NFS, with files among the others whose contents lie elsewhere: the folder of a VM that boots from a
// restore point has its description, logs and lock files on the local disk, and its disks in overlays.
//
//	f, err := folder.Open(dir, []folder.Placed{{Path: "vm/disk0-flat.vmdk", Key: "disk0", Content: overlay}}, folder.Options{})
//	…
//	defer f.Close()
//	server := nfs.Server{…} // f is an nfs.WritableFS
//
// dir is made when it is missing. In it are
//
//	data/   what is shown; others may put files there while the folder is open, Lookup and ReadDir find them
//	new/    files that are being made; emptied by Open
//	state   what is known of the placed files, see below; state.new while it is being written
//	lock    held by the process that has the folder open
//
// # What is shown
//
// Files, directories and symbolic links of data/. Devices, FIFOs, sockets and what other file systems are mounted there are not shown, and
// are never opened. Links are shown and never followed: every system call names one entry of one open directory.
//
// A placed file hides whatever has its name in data/. It can be renamed, replaced and removed as any other, and its times, mode and owner can
// be set. Its size cannot: SetAttr and Create give EINVAL for another one (RFC 1813 §2.6: an unsupported argument of an operation), a write past
// its end gives EFBIG and writes nothing. Without an io.WriterAt its content gives EROFS. A removed one is gone for good, whatever Open is
// given later; Removed lists them. What is done with their contents is the caller's business.
//
// # Identity
//
// The ID of a file of data/ is its inode number, and as Generation a hash of its birth time and of the handle that name_to_handle_at(2) gives,
// which has the file system's own generation in it. Open refuses a file system that has neither; with a birth time alone, a file
// made in the inode of another within the same tick of the clock (4 ms) would be taken for it. The ID of a placed file is a hash of its Key, with the highest bit set.
// So IDs are the same after a restart. Open walks data/ to know where each of them is: about 200 bytes of memory for a file.
// What others rename while the folder is open is ESTALE until a Lookup or ReadDir finds it.
//
// It takes Linux 5.8 (utimensat(2) of an open file), /proc, and a file system with renameat2(2)'s RENAME_NOREPLACE, such as ext4, XFS, btrfs and tmpfs. Who
// is not root may set what the system lets them, and cannot open what they have no right to.
//
// # What is durable
//
// What changes names or attributes is on the disk when it returns: the file and its directories are synced. A file is made in new/ and moved to
// its place when it is whole, so no crash leaves half of one. The mark of an EXCLUSIVE creation is in an extended attribute
// of the file, "user.holdfast.exclusive", before the file has its name; the first SetAttr takes it away (RFC 1813 §3.3.8: the client must issue one). It
// survives writes, renames and restarts, which times of the file would not. A file system without such attributes gives EOPNOTSUPP.
//
// Sync is fdatasync(2) of a file, or the Flush of a content. A file that is closed to make room for others is synced first; an error of that is the answer of its next Sync.
//
// The time of a placed file moves with writes. That is not written down each time: the state says up to when it may have moved, half a
// minute ahead, and after a crash that is its time. So it never goes back; it may be half a minute ahead. If that cannot be written down, the disk being full, the
// write gives the error.
//
// # Names in two places
//
// To rename a file of data/ to the name of a placed one changes data/ and the state. The state first says that the placed file yields to the
// file of that ID; if Open finds that one at the name, the placed file is gone. The other way round, the state says that the
// placed file lies over the file of that ID, which Open removes.
//
// # state
//
// Little-endian; written to state.new, synced and renamed:
//
//	+-------------+----------------+-----------------+----------------------+
//	| "HFFOLD1\n" | length of body | CRC-32C of body | body: entries, one   |
//	| 8 bytes     | u32            | u32             | after the other      |
//	+-------------+----------------+-----------------+----------------------+
//
// An entry, with strings as u16 length and bytes, times in nanoseconds since 1970, an ID as two u64:
//
//	key | flags u8: 1 removed | directory ID | name | path of directory | over ID | yields ID | mode, uid, gid u32 |
//	accessed, modified, changed, ceiling i64
//
// The directory counts by its ID; by its path when there is none of that ID, as in a copy of the folder. ceiling is up to when the file may have been
// modified since the entry was written; 0 for not at all.
package folder
