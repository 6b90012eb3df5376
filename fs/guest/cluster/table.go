package cluster

import "encoding/binary"

// Links32 makes Table.Links of a table of 32-bit numbers, which lies at off of the device: link makes of a cluster's number what Links gives.
func (c *Cached) Links32(off int64, link func(uint32) (uint32, error)) func() func(uint32) (uint32, error) {
	return c.links(off, 4, func(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }, link)
}

// Links16 is Links32 for 16-bit numbers.
func (c *Cached) Links16(off int64, link func(uint32) (uint32, error)) func() func(uint32) (uint32, error) {
	return c.links(off, 2, func(b []byte) uint32 { return uint32(binary.LittleEndian.Uint16(b)) }, link)
}

func (c *Cached) links(off, width int64, number func([]byte) uint32, link func(uint32) (uint32, error)) func() func(uint32) (uint32, error) {
	return func() func(uint32) (uint32, error) {
		var block []byte // the last one, which has the next number too, most of the time
		var start int64
		return func(n uint32) (uint32, error) {
			at := off + int64(n)*width
			if block == nil || at < start || at+width > start+int64(len(block)) {
				var err error
				if block, start, err = c.Block(at); err != nil {
					return 0, err
				}
			}
			if at+width > start+int64(len(block)) { // the device ends here
				return 0, errEnd
			}
			return link(number(block[at-start:]))
		}
	}
}
