// Package reader reads a Holdfast repository with nothing but the description of the
// format in the package comment of store, from which it was written.
//
//	repo, err := reader.Open(os.DirFS("/backup"), reader.Options{Passphrase: "secret"})
//	for _, p := range repo.Points {
//		for _, d := range p.Disks {
//			err := repo.ReadDisk(d, file)
//		}
//	}
//
// It imports no other package of this module, so that it is an oracle for the tests: what
// it reads is what the document says is there. It is strict, also where a reader could
// go on, and makes no attempt to be fast or to use little memory: the index is a map.
package reader
