// Package iso9660 reads the file system of CDs and installation images as Linux shows it.
//
// It reads ISO 9660 with blocks of 512 to 2048 bytes, files of several extents, and either of its usual extensions: Rock Ridge where the
// volume has it (names, owners, links, devices, directories moved because they were too deep, files compressed by zisofs), else
// Joliet, else plain names, in lower case and without their version.
//
// As Linux does it, each name is a file of its own, also where several names have the same content. Hidden files are shown, associated
// ones are not. It does not read files that are interleaved or sparse, nor zisofs 2, nor sessions behind the first; it knows
// nothing of El Torito and UDF. Extended attribute records are skipped, and there are no extended attributes.
//
// A directory is taken for damaged when it says itself that it is in another than the one that names it: directories cannot go in a
// circle.
//
// Sources: ECMA-119, 4th edition; Microsoft's Joliet specification of 1995; SUSP 1.12 and RRIP 1.12 (IEEE P1281 and P1282 drafts);
// zisofs_format.txt of libisofs.
package iso9660
