package overlay

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
)

// live is the file with the bits of writes that were answered and not flushed. See the
// package's comment.

const liveMagic = "HFLIVE1\x00"

// liveAt is where the bits of a sector of the map are in live.
func liveAt(sector int64) int64 { return (sector+1)*mapSector + mapHeader }

// bootID is another one after each start of the operating system: random(4).
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(b), err
}

// adopt takes what live holds of this start of the system into the map. When it reports false live is of another one, and is to be begun anew by forget.
func (m *blockMap) adopt(live file, boot string) (bool, error) {
	b := make([]byte, mapSector)
	if _, err := live.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	m.live = live
	if string(b) != string(liveHead(boot)) {
		return false, nil
	}
	return true, m.merge(live)
}

func liveHead(boot string) []byte {
	b := make([]byte, mapSector)
	copy(b, liveMagic+boot)
	return b
}

// merge sets the bits that live has.
func (m *blockMap) merge(live file) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	buf := make([]byte, mapAtATime*mapSector)
	end := int64(len(m.sectors)+1) * mapSector
	for off := int64(mapSector); off < end; {
		from, to, err := live.Data(off, end)
		if err != nil {
			return err
		}
		from = max(off, from-from%mapSector)
		to = min(to, from+int64(len(buf)), end)
		if from >= end {
			break
		}
		n, err := live.ReadAt(buf[:to-from], from)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(buf[n:])
		for i := from/mapSector - 1; (i+1)*mapSector < to; i++ {
			m.mergeSector(i, buf[(i+1)*mapSector-from:][:mapSector])
		}
		off = roundTo(to, mapSector)
	}
	return nil
}

func (m *blockMap) mergeSector(i int64, b []byte) {
	for w := range int64(mapWords) {
		now := binary.LittleEndian.Uint64(b[mapHeader+8*w:])
		for bit := range int64(64) {
			block := i*mapBlocks + w*64 + bit
			if now&(1<<bit) != 0 && block < m.blocks && !m.has(block) {
				m.change(block, block+1, true)
			}
		}
	}
}

// forget begins live anew. Nobody else is there.
func (m *blockMap) forget(boot string) error {
	if err := m.live.Truncate(0); err != nil {
		return err
	}
	_, err := m.live.WriteAt(liveHead(boot), 0)
	return err
}

func roundTo(n, unit int64) int64 { return (n + unit - 1) / unit * unit }
