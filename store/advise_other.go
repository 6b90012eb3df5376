//go:build !linux

package store

const adviseEvery = 1 << 12

type tableFile struct{}

func (x *badgerIndex) advise() {}

func (x *badgerIndex) readAhead(_, _ []byte) {}
