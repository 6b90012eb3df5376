// Package store is the repository: restore points as chunk maps over deduplicated,
// compressed, encrypted chunks in packs, with an index in Badger that can be made
// anew from packs and manifests at any time.
//
//	repo, err := store.Open(ctx, bucket, index, store.OpenOptions{Passphrase: ask})
//	point, err := repo.Find(ctx, "web/latest")
//	manifest, err := repo.Point(ctx, point.ID)
//	image, err := repo.OpenDisk(manifest, "disk0") // io.ReaderAt
//
// It promises: a point whose Commit returned survives a crash at any moment and
// reads back exactly; a read that fails a check is an error naming point, disk and
// offset, never zeros or short data. It does not promise to hide sizes, times and numbers of
// objects from somebody who can list the repository.
//
// # The format, version 1
//
// This is all that a reader needs. Integers are little-endian and unsigned.
// BLAKE3 has 32 bytes of output unless said otherwise; "derive(context, material)" is its
// derive-key mode with a context string, "keyed(key, bytes)" its keyed mode. Hexadecimal is
// in lower case. A repository is a directory (or any flat object store) with these objects:
//
//	config            what the repository is, and its wrapped master key
//	config.copy       the same bytes again; used when config fails its check, or is older
//	packs/<64 hex>    chunks and pages
//	points/<32 hex>   one manifest per restore point
//	gc/state          which packs are about to be removed; no reader needs it
//	verify/state      what is known to be damaged; no reader needs it
//	notes/KIND-NAME   what is known about VMs and points beside what they are; no reader needs them
//
// and, in a local directory, what is not part of the format: index/ (Badger), tmp/
// (objects being written), leases/ (who is at work), config.lock and verify.lock (see below),
// forget.lock (held by a program that decides what to forget, and forgets it, or pins a point), reserve (room for
// what makes room on a full disk), owner.lock and owner.sock (see store/remote).
//
// An object is written under another name, synced, renamed, and its directory synced:
// it is there whole or not at all. Objects are never changed, only added and removed; config
// and its copy, gc/state, verify/state and notes alone are replaced, each in one step. The order of a backup is: packs; index; manifest. The manifest's
// appearance is the commit; packs that no manifest leads to are harmless.
//
// # config
//
//	"holdfast repository\n"
//	JSON object
//	"\nblake3 " <64 hex: BLAKE3 of everything above, without the "\n" of this line> "\n"
//
// This envelope stays the same in every version, so that damage and a newer version
// are told apart: check the sum first, then "version". Fields of the JSON:
//
//	version     1
//	revision    how often the config has been changed; absent for 0
//	id          16 bytes, hexadecimal, random: the repository's id
//	created     RFC 3339
//	chunk_size  bytes, a power of two from 65536 to 4194304
//	cipher      "aes-256-gcm" or "none"
//	master      with "none" only: the 32-byte master key, hexadecimal
//	keys        with "aes-256-gcm": list of key slots, any of which opens the repository
//	agents      list of tokens, see Tokens; may be absent. No reader needs it
//
// A key slot wraps the master key with one passphrase:
//
//	id          text, of no other slot
//	created     RFC 3339
//	kind        "recovery" when the passphrase is a recovery key; else absent
//	label       text for people; may be absent
//	kdf         "argon2id" (RFC 9106, version 0x13), 32 bytes of output
//	time, memory_kib, threads, salt (hexadecimal)     its parameters
//	wrapped     hexadecimal: 12 bytes nonce, 32 bytes encrypted master key, 16 bytes tag
//
// wrapped is AES-256-GCM under the Argon2id output, with the associated data
//
//	"holdfast key <version> <id of the repository, hex> <chunk_size> <cipher>"
//
// with numbers in decimal, so that none of these can be changed without the passphrase.
// The passphrase is taken as its bytes are. One that opens no slot is wrong.
//
// A recovery key is 32 random bytes and the first 3 bytes of their BLAKE3, in base 32 with the
// alphabet 0123456789ABCDEFGHJKMNPQRSTVWXYZ, most significant bit first: 56 characters, and
// these are the bytes of the passphrase. For people it has dashes after every 4 characters. A
// program that is given one takes lower case for upper, O for 0, I and L for 1, leaves out
// white space and dashes, and can tell by the 3 bytes that it was mistyped. As it cannot be
// guessed, its slot has the least parameters of Argon2id.
//
// # Changing keys
//
// Keys are added and removed by replacing the config; chunks stay as they are, because the
// master key does. Who replaces it
//
//  1. takes a lock that excludes all others who do (in a local directory, flock(2) on config.lock),
//  2. reads config and config.copy, and goes on from the one that holds, see below,
//  3. makes the changes, adds 1 to revision, and keeps every field, of slots too, that it does not know,
//  4. writes config.copy, then config, and then reports success.
//
// When both are whole and differ, the one of the higher revision holds if they have the same
// repository id, and config otherwise. So a crash before the first of the two is written leaves the old keys, one
// after it the new ones, and there is never a moment without a whole config. After
// success the old keys are in neither. Whoever writes to the repository next makes the two equal again,
// under the same lock, and from what he reads then. A damaged config brings back old
// keys only if a change was cut off between the two writes, was not reported as done, and nobody has written since.
//
// What this does not do: the master key is the same for the life of a repository. Somebody who has both a
// removed passphrase and a config from before its removal has the master key, and with it
// everything that is stored later. Nor does it keep those who can write to the repository
// from putting an old config back: neither revision nor the list of slots is authenticated.
//
// # Tokens
//
// A token lets a helper on another host add points by way of a server that has the repository
// open (see store/remote/agent). It has an id and a secret of 32 random bytes. Fields of its record:
//
//	id       8 random bytes, hexadecimal
//	created  RFC 3339, whole seconds
//	expires  likewise; absent for never
//	label    text for people; may be absent
//	vms      list of patterns for names of VMs (*, ?, [a-z], as in a shell); may be absent
//	secret   hexadecimal: derive("holdfast repository v1 agent secret", secret)
//	mac      hexadecimal: keyed(agent record key, what follows)
//
// Covered by mac, each text with its length in 4 bytes before it and times as 8 bytes of seconds
// since 1970, 0 for none:
//
//	16 bytes id of the repository | id | created | expires | label | 4 bytes number of vms | each of them | secret
//
// A record whose mac is wrong is refused: who can write the config but not open the repository
// makes no token and changes none. So is one with fields that the program does not know, since
// they may be limits. Records are added and removed like keys, see above. What that says of old
// configs holds here, too: who can write the config can put back the record of a token that was removed, and with it
// the token works again until it expires.
//
// # Keys
//
// All from the master key M (32 bytes); "|" joins bytes:
//
//	chunk id key   derive("holdfast repository v1 chunk id", M)
//	page id key    derive("holdfast repository v1 page id", M)
//	pack key       derive("holdfast repository v1 pack", M | pack id)
//	manifest key   derive("holdfast repository v1 point", M | salt of the manifest)
//	agent record key   derive("holdfast repository v1 agent record", M)
//	agent TLS key      derive("holdfast repository v1 agent tls", M): the seed of an Ed25519 key (RFC 8032)
//
// # Chunks
//
// A disk is cut at multiples of chunk_size; the last chunk is padded with zeros.
// A chunk of zeros is a hole: it has no id and is stored nowhere. The id of any other chunk
// is keyed(chunk id key, the chunk_size bytes of it).
//
// # Packs
//
// A pack's id is 32 random bytes, also the salt of its key; its name is the id.
// Packs are about 64 MiB, at most 1 GiB. Layout:
//
//	+--------+----------+----------+-----+-------+---------+
//	| header | record 0 | record 1 | ... | table | trailer |
//	+--------+----------+----------+-----+-------+---------+
//	0        80                          E
//
// Header, 80 bytes:
//
//	 0   8  "HFPACK\r\n"
//	 8   4  version, 1
//	12   4  1 when bodies are encrypted, else 0
//	16  16  id of the repository
//	32  32  id of the pack
//	64  12  0
//	76   4  CRC-32C of bytes 0..75
//
// Magic and CRC stay where they are in every version: a header that has both right and a
// greater version is of a newer program, not damaged. The same holds for manifests, whose
// magic, version and CRC stay.
//
// Record: a header of 56 bytes, then the body; the next record follows at once.
//
//	 0   4  0x52434648, "HFCR" in the file
//	 4   4  CRC-32C of everything behind this field: bytes 8..55 and the body
//	 8  32  id of the chunk or page
//	40   4  length of the body as stored, with its tag
//	44   4  length of the plaintext, before compression; of a chunk, chunk_size
//	48   1  codec: 0 raw, 1 zstd frames (RFC 8878) one after the other
//	49   1  kind: 0 chunk, 1 page
//	50   2  0
//	52   4  slot: a number that no other record of the pack has
//	56   …  body
//
// A body of zstd has one or more frames, each with its content size in its header
// and no dictionary, whose contents together are the plaintext. This version
// writes a frame for each 65536 bytes of a chunk, so that a small read decodes one of them.
//
// The body is the plaintext, compressed when that is shorter, and then, unless the
// cipher is "none", sealed by AES-256-GCM with the pack key, a nonce of eight zero bytes and
// the slot (4 bytes), and bytes 8..55 of the record as associated data; the tag of 16 bytes
// ends the body.
//
// The table has an entry of 44 bytes for each record, in ascending order of the bytes of
// their ids:
//
//	 0  32  id
//	32   4  offset of the record's header in the pack
//	36   4  length of the body as stored, with its tag
//	40   4  length of the plaintext, with the kind in bit 31
//
// Trailer, the last 64 bytes of the pack:
//
//	 0   4  number of entries in the table
//	 4   4  E, where the table begins
//	 8  16  0
//	24  32  BLAKE3 of the pack's header (80 bytes), the table, and bytes 0..23 of the trailer
//	56   8  "HFFOOT\r\n"
//
// Every byte of a pack is covered by one of these sums or is part of a magic. A record may
// be in more than one pack, after a crash for one: any copy that passes its checks is good. When table or trailer are
// damaged the records are found by going from record to record from byte 80 on, and, past
// damage, by searching for the next magic with a right CRC-32C.
//
// # Chunk maps
//
// The chunk map of a disk is a tree of pages with 256 entries each. A page of
// level 0 has the ids of chunks, a page of level n those of pages of level n-1; an absent entry
// is a hole of its whole range. Entry k of a page at level n, whose first chunk is c, begins
// at chunk c + k·256^n. The root page has the lowest level that covers the disk, level 0
// at least, and its first chunk is 0. Entries past the end of the disk are absent. A disk that
// is one hole has no root page.
//
// A page's id is keyed(page id key, its bytes), and it is stored as a record of
// kind 1, codec 0. Its bytes:
//
//	 0   1  'm'
//	 1   1  1
//	 2   1  level
//	 3   1  0
//	 4  32  bitmap: bit k%8 of byte k/8 says that entry k is present
//	36   …  ids of the present entries, 32 bytes each, in order
//
// Equal content always has equal pages: no page is empty, no id is zero. So points
// share every page that did not change, and equal root ids mean equal disks of one size.
//
// # Manifests
//
//	 0   8  "HFPOINT\n"
//	 8   4  version, 1
//	12   4  1 when the repository is encrypted, else 0
//	16  16  id of the repository
//	32  16  id of the point, also the object's name
//	48  16  salt, random
//	64   8  length of the plaintext, without its tag
//	72   …  the plaintext, sealed
//	 …   4  CRC-32C of everything before
//
// Sealed with AES-256-GCM under the manifest key, a nonce of twelve zero bytes (the
// key is used once) and the first 72 bytes as associated data; the tag follows. With the cipher "none"
// the plaintext is followed by the first 16 bytes of keyed(manifest key, the 72 bytes | plaintext).
//
// The plaintext is one zstd frame of a JSON object, a Point; see there for the
// fields. What a reader needs: "name", "vm"."name", "disks" with "name", "size" (bytes) and "root"
// (id of the root page, hexadecimal; absent for a disk that is one hole), and "config" with
// "name", "size" and "root": configuration files are stored as small disks. Unknown fields are
// ignored.
//
// # gc/state
//
// What a collection leaves for the next one and for an index that is made anew. The
// envelope is that of the config with the first line "holdfast gc\n"; fields of the JSON:
//
//	version  1
//	epoch    16 bytes, hexadecimal, random: another one after every change of packs, and before
//	         the first that held something live is removed, so that an older copy of an index is seen to be one
//	packs    ids of the condemned packs, in order, hexadecimal
//	waits    ids of the leases that the packs wait for; null when nobody has looked yet
//
// A condemned pack is readable and counts like any other for readers. A writer does
// not rely on it: it stores what is only there again. A condemned pack may be removed when
//
//	no lease in waits is left, and then
//	all that the manifests, read after that, and the leases of readers, read after the
//	manifests, lead to in it has been written to other packs.
//
// A damaged pack is condemned and removed in the same way, beside no gc, when every record of it that
// proves right has been written to other packs; then no lease is waited for, since nobody loses anything by it. A
// pack that may hold more than could be read stays, and is no longer condemned.
//
// Whoever adds a manifest has had a lease (see Leases) since before it looked up the first
// chunk, and, to share pages or chunks with an older point without looking them up, a lease of a
// reader on that point since before it saw that the point's manifest is still there.
//
// # verify/state
//
// What verifications leave for each other, for listings, and for an index that is made anew. All
// of it can be found again by verifying; when it is lost or damaged that is all it takes.
//
//	 0   8  "HFVERIFY"
//	 8   4  version, 1
//	12   4  1 when the repository is encrypted, else 0
//	16  16  id of the repository
//	32  16  salt, random, another one each time
//	48   8  length of the plaintext, without its tag
//	56   …  the plaintext, sealed as that of a manifest is, but under the verify key
//	        derive("holdfast repository v1 verify", M | salt), with these 56 bytes as associated data
//	 …   4  CRC-32C of everything before
//
// Magic, version and CRC stay in every version: one that is whole and of a greater version is left as
// it is, and not read. The plaintext is one zstd frame of a JSON object:
//
//	pass      the reading of all packs that is on its way, in the order of their ids; absent when none is:
//	          "began", "after" (id of the last pack read; absent when none was), "packs" and "bytes_read"
//	ended     when the last one that read all packs came to its end; may be absent
//	damage    records that failed a check: "id", "kind" (as in packs), "pack" (its id; absent when the chunk is
//	          nowhere), "offset" (in the pack; absent: wherever it is), "error" (text) and "found" (when)
//	unlisted  how many more there are; may be absent
//	touched   for each disk of each point that needs one of them: "point" (id), "disk" (its name, or
//	          config/NAME), "found", "more" (true when places are left out), and "places": pairs of the
//	          offset on the disk and the number, from 0, of the record in damage
//
// At most 65536 records and 262144 places are kept, and 1000 places of a disk. A record past
// that is unknown to an index that is made anew, until a verification finds it again; of points "more" is
// all that is left. Unknown fields are ignored.
//
// Anybody who verifies, repairs or collects may replace it: under a lock that excludes all others who
// do (in a local directory, flock(2) on verify.lock), and from what he reads then. A record stays as
// long as its pack does, also when its chunk was stored again: an index must not choose it. What is shown of
// a point is what the index has at no other, sound place.
//
// # notes/KIND-NAME
//
// What was learnt of a VM or a point beside what it is: which blocks it reads when it boots, what its screen
// showed. NAME is the first 16 bytes, hexadecimal, of the BLAKE3 of KIND, a zero byte and the name of the thing, keyed with
// derive("holdfast repository v1 note name", M). Header and sealing are those of verify/state, with
// "HFNOTE", two zero bytes, and the key derive("holdfast repository v1 note", M | salt). The plaintext
// is the length of the name of the thing, u16, that name, and the rest as its kind has it.
//
// A note of the kind "pin", by which its point is not to be forgotten, is JSON: "id" (its name), "point", "since", "what" and "host" say
// who needs the point, "machine", "home" and "place" where whoever it is can be looked for. It is written under forget.lock, where the medium has locks, so
// that it never comes between a decision to forget and its end.
//
// # Index
//
// The index (see badger.go) maps ids to places in packs, and caches pages and
// summaries of the points. It is trusted for nothing: records repeat their id, pages are
// compared with theirs, summaries are sealed. It is compared with the objects on opening: the
// names of manifests and the epoch of gc always, the names of packs after a crash, before the
// first write, and when there are points or an epoch that it has never seen.
package store
