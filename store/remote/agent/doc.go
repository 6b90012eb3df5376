// Package agent lets helpers on other hosts add restore points to a repository: over TLS,
// with a token that can do nothing else.
//
//	srv := agent.NewServer(repo, agent.ServerOptions{})          // where the repository is
//	go srv.Serve(listener)
//
//	c := agent.Client{Addr: "backup.example:7411", Token: token} // on the other host
//	session, err := c.Begin(ctx, store.VM{Name: "web"})
//
// The helper reads disks, names and compresses their chunks, and sends those that it may not
// take for granted. The server believes none of it: it decodes each chunk and names it by what it
// holds, makes the chunk maps and the manifest itself, and takes time, name and lock of the
// point from its own host.
//
// # Who is who
//
// The server's key is an Ed25519 key that follows from the repository's master key (store/doc.go,
// "Keys"), in a certificate that signs itself and is made at every start. A token has the
// SHA-256 of that public key, so a client knows the server of its repository from every other
// one without any certificate file, and shows the token to no other. Text of a token:
//
//	"hfa1_" and in base64url without padding: id 8 | secret 32 | SHA-256 of the server's
//	SubjectPublicKeyInfo 32 | the first 4 bytes of the BLAKE3 of all this
//
// TLS is version 1.3 only, without session tickets.
//
// # What a token can do
//
// Add points. There is no request that reads a chunk, lists, forgets or collects anything. Points
// may be added to VMs whose names match the token's patterns; without patterns, to VMs that nobody
// else has points of. A new point may share chunks with what the same token has put there before, and
// with nothing else:
//
// For each chunk that the client has sent in this session, or that a point consists of which
// the same token made and which the session holds, it has a receipt: the first 16 bytes of
// keyed(session key, id of the chunk), with a random key that lives as long as the connection. In a map
// chunks stand with their receipts. An id with any other receipt ends the session, and nothing is looked up for it: so the answer
// is the same whether such a chunk is stored or not. What the client sends is deduplicated without telling
// it: the receipts go out before the repository is asked.
//
// # What a holder of a token learns and can do all the same
//
//   - Chunk size, id, and chunk id key of the repository. With that key and a copy of the
//     repository's packs or index somebody can test whether a chunk that he knows is stored; without such a copy
//     it is good for nothing.
//   - By the time that many chunks, the end of a map, or a commit take, or by an error while the
//     repository's disk is full, roughly whether what it has sent was new: so whether somebody has stored the same,
//     if it has all of it. A single chunk is answered before that is known.
//   - Without patterns, by the refusal, that a VM of some name has points of others. The same for a VM that is named by a
//     pattern is never told.
//   - It can fill the disk, as far as the server lets backups (64 MiB stay free), hold chunks back
//     from gc for as long as it is connected, keep the sessions of its token busy, and write points
//     that say anything within the bounds below into its VMs: bogus content, wrong labels, poorly compressed chunks.
//     Nobody else's point is touched by that, nor takes its changes from such a point.
//   - Its points cannot be forgotten by it, and have the lock that the server's config says.
//
// # Protocol, version 1
//
// Frames as in package wire, requests from the client, responses from the server. u8, u32 and u64 are little-endian; bytes
// is a u32 length and as many bytes. The bound is that of the length in the frame.
//
//	op            bound    request                                    response
//	hello   0x40  128      u32 version, id 8, secret 32               u32 version, repository 16, u32 chunk size, chunk id key 32
//	begin   0x41  4 KiB    JSON {"name","uuid","source"} of the VM    JSON, see parentMessage: what it is compared with
//	base    0x42  64       u32 disk of the parent                     u8: 1 when the point may share what is in it
//	ids     0x43  64       u32 disk, u64 first chunk, u32 number      for each: 0, or 1, id 32, receipt 16
//	put     0x44  see      u32 number, each: u8 codec, bytes body     for each: receipt 16
//	map     0x45  64       u32 disk of the parent + 1 or 0, u64 size  nothing
//	write   0x46  256 KiB  list of: 0, u64 chunk, id 32, receipt 16;  nothing
//	                       or 1, u64 from, u64 to: holes
//	finish  0x47  64       nothing                                    root 32
//	commit  0x48  1 MiB    JSON, see pointMessage                     JSON {"id","name","time"}
//	ping    0x49  64       nothing                                    nothing
//
// A put is as long as one chunk or 1 MiB, whichever is more, and 64 KiB. Body and codec are as in a record of a pack
// (store/doc.go), before encryption. A map begins out of a hole, or out of the map of a disk of the parent
// for which base said 1; chunks and holes come in ascending order; the point is made of
// maps that were finished. The connection is the session: it makes one point, and when it ends without a
// commit nothing of it shows. Pings may come at any time, put at any time after begin; all other
// requests are carried out in their order.
//
// Statuses: 0 done; 1 the request is not one, and the connection ends; 2 refused: token or VM; 3 another
// version, followed by the u32 of the server's; 4 the repository's disk is full; 5 what the
// parent consists of cannot be read; 6 failed, and the server's log says why. A text follows.
//
// # Bounds
//
// Before the token was found right: 8 KiB, 10 seconds, 32 connections at a time. After it: 32
// sessions in all and 4 of one token, each with at most 4 puts at work and 4 further requests
// waiting, so about 10 MiB of memory with chunks of the usual size, and up to 80 MiB with those of 4 MiB. A side that hears nothing for two minutes
// hangs up; a client sends a ping every 20 seconds. A token that was removed, or has expired, is noticed at
// commit, and within 10 seconds anyway, which ends its sessions.
package agent
