package volume

import "github.com/holdfast-backup/holdfast/fs/guest"

type thinPool struct{}

func (b *builder) raid(lv *logical, s segment, kind string) (device, error) {
	return nil, guest.Unsupported("LVM2: %s", kind)
}
func (b *builder) thin(lv *logical, s segment) (device, error) {
	return nil, guest.Unsupported("LVM2: thin")
}
func (b *builder) snapshotOf(name string) (*segment, int64, bool)                { return nil, 0, false }
func (b *builder) snapshot(s *segment, chunk int64, lv *logical) (device, error) { return nil, nil }
func (b *builder) markOrigin(name string, dev device) device                     { return dev }
