package ntfs

import (
	"bytes"
	"errors"
	"fmt"
	"unicode"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// FS is an NTFS volume. It implements guest.FS, guest.Streamer, guest.Freer and guest.Locator.
type FS struct {
	dev     guest.Device
	geo     geometry
	info    guest.Info
	root    guest.Ino
	records int64
	mirror  [mirrored]record // copies of the first records, or nil
	upcase  upcase
	secure  *inode // $Secure, or nil

	pieces *guest.Cache
	inodes *guest.Recent[int64, *inode] // record => file
	runs   *guest.Recent[runKey, []run]
	nodes  *guest.Recent[blockKey, node]
	units  *guest.Recent[unitKey, []byte] // decompressed
	acls   *guest.Recent[uint32, []byte]  // id in $Secure => descriptor
}

var (
	_ guest.FS       = (*FS)(nil)
	_ guest.Streamer = (*FS)(nil)
	_ guest.Freer    = (*FS)(nil)
	_ guest.Locator  = (*FS)(nil)
)

const (
	mirrored     = 4 // records at least that $MFTMirr has
	defaultCache = 16 << 20
	maxMFTRuns   = 1 << 20
)

// Open opens the volume on dev. ErrUnknown: it is none.
func Open(dev guest.Device, opt guest.Options) (*FS, error) {
	f := &FS{dev: dev}
	var warning string
	var err error
	if f.geo, warning, err = readBoot(dev); err != nil {
		return nil, fmt.Errorf("ntfs: %w", err)
	}
	f.warn(warning)
	size := opt.Cache
	if size <= 0 {
		size = defaultCache
	}
	f.inodes, f.runs = guest.NewRecent[int64, *inode](size/4), guest.NewRecent[runKey, []run](size/8)
	f.nodes, f.units = guest.NewRecent[blockKey, node](size/4), guest.NewRecent[unitKey, []byte](size/8)
	f.acls = guest.NewRecent[uint32, []byte](size / 16)
	if err := f.openMFT(size / 4); err != nil {
		return nil, fmt.Errorf("ntfs: %w", err)
	}
	root, err := f.inode(recordRoot)
	if err == nil {
		f.root = guest.Ino(recordRoot) | guest.Ino(root.sequence)<<48
		_, err = f.directory(f.root)
	}
	if err != nil {
		return nil, fmt.Errorf("ntfs: the root directory: %w", err)
	}
	f.describe()
	return f, nil
}

func (f *FS) warn(text string) {
	if text != "" {
		f.info.Warnings = append(f.info.Warnings, text)
	}
}

// openMFT finds all of the MFT, which is a file that its own first record describes.
func (f *FS) openMFT(size int64) error {
	f.readMirror()
	r := make(record, f.geo.record)
	if err := guest.ReadFull(f.dev, r, f.geo.mft*f.geo.cluster); err != nil {
		return err
	}
	if !r.whole() || fixup(r) != nil {
		if r = f.mirror[0]; r == nil {
			return guest.Damaged("the first record of the MFT and its copy")
		}
	}
	i := &inode{}
	if err := i.parse(r); err != nil {
		return err
	}
	data := i.find(attrData, "")
	if list := i.find(attrList, ""); list != nil && data != nil {
		var err error
		if data, err = f.listedMFT(list, data); err != nil {
			return err
		}
	}
	if data == nil || data.resident || len(data.parts) == 0 {
		return guest.Damaged("$MFT has no data")
	}
	s := f.stream(data)
	var err error
	if s.mft, err = f.runsMFT(data); err != nil {
		return err
	}
	valid := min(data.size, data.valid)
	f.records = valid / f.geo.record
	f.pieces = guest.NewCache(mftDevice{s, valid}, pieceSize, size)
	for n := range min(f.records, mirrored) {
		if r, err := f.own(n); err == nil && !r.whole() && f.mirror[n] != nil {
			f.warn(fmt.Sprintf("record %d of the MFT is damaged: its copy in $MFTMirr is used", n))
		}
	}
	return nil
}

// listedMFT adds to data, the first part of $MFT's data, where the list says that the others are.
func (f *FS) listedMFT(list, data *attr) (*attr, error) {
	b, err := f.stream(list).all(maxList)
	if err != nil {
		return nil, err
	}
	rest := further{}
	for len(b) >= listEntry {
		n := int(le.Uint16(b[4:]))
		if n < listEntry || n > len(b) {
			return nil, guest.Damaged("$MFT: an entry of %d bytes in its attribute list", n)
		}
		if le.Uint32(b) == attrData && le.Uint64(b[8:]) != 0 {
			if err := rest.add(b[:n]); err != nil {
				return nil, err
			}
		}
		b = b[n:]
	}
	all := []attr{*data}
	return &all[0], rest.attach(all)
}

// runsMFT collects the runs of $MFT: what a part says is in a record that the parts before it have.
func (f *FS) runsMFT(data *attr) ([]run, error) {
	var all []run
	for n, p := range data.parts {
		if n > 0 {
			r := make(record, f.geo.record)
			s := &stream{fs: f, a: data, mft: all}
			if err := s.raw(r, p.record*f.geo.record); err != nil {
				return nil, err
			}
			if !r.whole() || fixup(r) != nil || r.base() != 0 {
				return nil, guest.Damaged("record %d of the MFT, of its own", p.record)
			}
			h, err := r.attribute(attrData, p.id)
			if err == nil {
				p, err = h.part(p.record)
			}
			if err != nil {
				return nil, err
			}
		}
		next := int64(0)
		if len(all) > 0 {
			next = all[len(all)-1].vcn + all[len(all)-1].n
		}
		runs, err := decodeRuns(p.pairs, p.low, p.high, f.geo.clusters)
		if err != nil {
			return nil, fmt.Errorf("$MFT: %w", err)
		}
		if p.low != next || len(all)+len(runs) > maxMFTRuns {
			return nil, guest.Damaged("$MFT: %d runs, then from %d on and not %d", len(all), p.low, next)
		}
		all = append(all, runs...)
	}
	return all, nil
}

// readMirror reads the copies of the first records, as far as they are good.
func (f *FS) readMirror() {
	if f.geo.mirror <= 0 || f.geo.mirror >= f.geo.clusters {
		return
	}
	for n := range f.mirror {
		r := make(record, f.geo.record)
		if guest.ReadFull(f.dev, r, f.geo.mirror*f.geo.cluster+int64(n)*f.geo.record) == nil && r.whole() && fixup(r) == nil {
			f.mirror[n] = r
		}
	}
}

// describe reads what Info tells. What of it is damaged becomes a warning.
func (f *FS) describe() {
	f.info.Type, f.info.Block = "ntfs", f.geo.cluster
	f.info.Size = f.geo.sectors * f.geo.sector
	f.info.UUID = fmt.Sprintf("%016X", f.geo.serial)
	for _, look := range []struct {
		what string
		at   func() error
	}{
		{"$UpCase", f.readUpcase}, {"$Volume", f.readVolume}, {"$LogFile", f.readLog}, {"$Secure", f.readSecure}, {"hiberfil.sys", f.readHibernation},
	} {
		if err := look.at(); err != nil {
			f.warn(fmt.Sprintf("%s: %v", look.what, err))
		}
	}
	if f.info.Size > f.dev.Size() {
		f.warn(fmt.Sprintf("the volume is %d bytes, and its device %d", f.info.Size, f.dev.Size()))
	}
}

// system reads an attribute of a system file.
func (f *FS) system(n int64, kind uint32, name string, limit int64) ([]byte, error) {
	i, err := f.inode(guest.Ino(n))
	if err != nil {
		return nil, err
	}
	a := i.find(kind, name)
	if a == nil {
		return nil, nil
	}
	return f.stream(a).all(limit)
}

// readUpcase reads how the volume makes letters large, without which no name is found.
func (f *FS) readUpcase() error {
	b, err := f.system(recordUpcase, attrData, "", 128<<10)
	if err == nil && len(b) != 128<<10 {
		err = guest.Damaged("%d bytes", len(b))
	}
	f.upcase = make(upcase, 1<<16)
	for n := range f.upcase {
		if err == nil {
			f.upcase[n] = le.Uint16(b[2*n:])
		} else if r := unicode.ToUpper(rune(n)); r < 1<<16 {
			f.upcase[n] = uint16(r)
		}
	}
	return err
}

// readVolume reads label and state: $VOLUME_INFORMATION (NTFS doc) has the version at 8, and flags at 10.
func (f *FS) readVolume() error {
	label, err := f.system(recordVolume, attrVolName, "", 1<<10)
	if err != nil {
		return err
	}
	f.info.Label = text(label)
	b, err := f.system(recordVolume, attrVolInfo, "", 1<<10)
	if err != nil {
		return err
	}
	if len(b) < 12 {
		return guest.Damaged("%d bytes of information", len(b))
	}
	const dirty = 1
	if le.Uint16(b[10:])&dirty != 0 {
		f.warn("the volume is marked as dirty: Windows would check it")
	}
	return nil
}

func (f *FS) readSecure() error {
	i, err := f.inode(recordSecure)
	if err == nil && i.find(attrIndexRoot, "$SII") != nil {
		f.secure = i
	}
	if errors.Is(err, guest.ErrNotExist) {
		return nil
	}
	return err
}

// readHibernation looks whether Windows sleeps on this volume: then it has changes in memory that the disk does not have.
func (f *FS) readHibernation() error {
	ino, err := f.Lookup(f.Root(), "hiberfil.sys")
	if errors.Is(err, guest.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	head := make([]byte, 4)
	content, err := f.Open(ino)
	if err == nil && content.Size() >= int64(len(head)) {
		_, err = content.ReadAt(head, 0)
	}
	if bytes.EqualFold(head, []byte("hibr")) {
		f.warn("Windows was hibernated on this volume: changes that it had in memory are not on the disk")
	}
	return err
}

// Info implements guest.FS.
func (f *FS) Info() guest.Info { return f.info }

// Root implements guest.FS.
func (f *FS) Root() guest.Ino { return f.root }
