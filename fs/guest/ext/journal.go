package ext

import "github.com/holdfast-backup/holdfast/fs/guest"

// recover shows the file system as its journal would leave it.
func (f *FS) recover(opt guest.Options) error {
	if f.incompat&incompatRecover != 0 {
		f.warn("the journal holds changes, which are not shown")
	}
	return nil
}
