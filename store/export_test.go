package store

// SetPackSize makes r seal packs after n bytes, so that tests with small disks
// fill many of them. Call it before anything is written.
func (r *Repo) SetPackSize(n uint32) { r.packer.target = n }

// CheapKeys makes Init choose the least parameters of Argon2id, for tests that
// open a repository a thousand times, and gives back what undoes it.
func CheapKeys() (undo func()) {
	old := defaultKDF
	defaultKDF = kdfParams{Time: 1, MemoryKiB: 8, Threads: 1}
	return func() { defaultKDF = old }
}
