package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// Place gives the pack and the place of a chunk of a disk.
func (r *Repo) Place(ctx context.Context, p *Point, disk string, n int64) (pack string, loc Loc, err error) {
	img, err := r.OpenDisk(p, disk)
	if err != nil {
		return "", loc, err
	}
	var ids [1]ID
	var locs [1]Loc
	if err := img.IDs(ctx, n, ids[:]); err != nil {
		return "", loc, err
	}
	if err := r.index.Lookup(ctx, ids[:], locs[:]); err != nil {
		return "", loc, err
	}
	info, err := r.index.Pack(ctx, locs[0].Pack)
	return packName(info.ID), locs[0], err
}

// Remembered counts the records and places of damage that are remembered, -1 for an error.
func (r *Repo) Remembered(ctx context.Context) int {
	s, usable, err := r.loadVerifyState(ctx)
	if err != nil || !usable {
		return -1
	}
	n := len(s.Damage)
	for _, t := range s.Touched {
		n += len(t.Places)
	}
	return n
}

// NewerVerifyState makes a state one of a later version, and whole.
func NewerVerifyState(b []byte) ([]byte, error) {
	if len(b) < verifyHeaderLen+sealedCheck {
		return nil, errors.New("no state")
	}
	b = bytes.Clone(b[:len(b)-sealedCheck])
	binary.LittleEndian.PutUint32(b[8:], verifyVersion+1)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)), nil
}

// PagePlace gives the pack and the place of the page of level 0 that has chunk n.
func (r *Repo) PagePlace(ctx context.Context, p *Point, disk string, n int64) (pack string, loc Loc, err error) {
	img, err := r.OpenDisk(p, disk)
	if err != nil {
		return "", loc, err
	}
	id := img.root.Page
	for level := img.top; level > 0; level-- {
		l, err := img.page(ctx, id, level)
		if err != nil {
			return "", loc, err
		}
		id = l.ids[(n/span(level))%PageEntries]
	}
	var locs [1]Loc
	if err := r.index.Lookup(ctx, []ID{id}, locs[:]); err != nil {
		return "", loc, err
	}
	info, err := r.index.Pack(ctx, locs[0].Pack)
	return packName(info.ID), locs[0], err
}
