package ntfs

import (
	"bytes"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// readLog looks whether $LogFile was closed. It starts with two restart pages (NTFS doc, "$LogFile"), each in a system page:
//
//	0x00  "RSTR", or "CHKD" after a check   0x04  update sequence: offset, words
//	0x10  system page size (4)   0x14  log page size (4)   0x18  offset of the restart area (2)
//	restart area:  0x00  current LSN (8)   0x08  clients (2)   0x0c  first client in use, or 0xffff (2)   0x0e  flags (2): 2 the volume was closed
//
// One that was wiped, which is what ntfs-3g does with it, is all ones.
func (f *FS) readLog() error {
	i, err := f.inode(recordLog)
	if err != nil {
		return err
	}
	a := i.find(attrData, "")
	if a == nil || a.size < 8<<10 {
		return guest.Damaged("no data")
	}
	s := f.stream(a)
	head := make([]byte, 4<<10)
	if err := s.read(head, 0); err != nil {
		return err
	}
	if bytes.Count(head, []byte{0xff}) == len(head) {
		return nil
	}
	first, ok := restartArea(head)
	second, also := first, false
	if page := int64(le.Uint32(head[0x10:])); ok && page >= 4<<10 && page <= 64<<10 && a.size >= 2*page {
		if err := s.read(head, page); err != nil {
			return err
		}
		second, also = restartArea(head)
	} else if !ok {
		if err := s.read(head, 4<<10); err != nil {
			return err
		}
		second, also = restartArea(head)
	}
	if !ok && !also {
		return guest.Damaged("no restart page")
	}
	if !ok || also && second.lsn > first.lsn {
		first = second
	}
	if first.open {
		f.warn("the volume was not shut down cleanly: its log ($LogFile) may hold changes, and is not replayed")
	}
	return nil
}

type restart struct {
	lsn  uint64
	open bool
}

// restartArea reads the first 4 KiB of a restart page.
func restartArea(b []byte) (restart, bool) {
	if !bytes.Equal(b[:4], []byte("RSTR")) && !bytes.Equal(b[:4], []byte("CHKD")) {
		return restart{}, false
	}
	off := int(le.Uint16(b[0x18:]))
	if off < 0x1e || off > stride-2-0x10 { // within the first sector, which the update sequence leaves alone but for its end
		return restart{}, false
	}
	area := b[off:]
	const closed = 2
	return restart{le.Uint64(area), le.Uint16(area[0x0c:]) != 0xffff && le.Uint16(area[0x0e:])&closed == 0}, true
}
