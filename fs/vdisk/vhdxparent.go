package vdisk

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
)

// Metadata item and locator type of a parent, MS-VHDX §2.6.2 and §2.6.2.6.3.
const (
	vhdxParentLocator = "A8D35F2D-B30B-454D-ABF7-D3D84834AB0C"
	vhdxLocatorType   = "B04AEFB7-D19E-4A81-B789-25B8E9445913"
)

// ParentLocator is what a differencing VHDX says about its parent (MS-VHDX
// §2.6.2.6.3). Paths are to be tried in the order of the fields; what is not
// there is empty. They come from whoever wrote the image.
type ParentLocator struct {
	RelativePath      string // as stored: from the directory of the image, `..\base\disk.vhdx`
	VolumePath        string // `\\?\Volume{GUID}\base\disk.vhdx`
	AbsoluteWin32Path string // `\\?\d:\base\disk.vhdx`
	// Linkage is the DataWriteGUID that the parent must have. While a merge is
	// under way it may be Linkage2 instead, which is zero otherwise.
	Linkage, Linkage2 GUID
}

// Relative is RelativePath as a path of this system, with slashes.
func (l ParentLocator) Relative() string { return strings.ReplaceAll(l.RelativePath, `\`, "/") }

// names are where the parent may be: the relative path, and beside the image
// what paths of the Windows host end in.
func (l ParentLocator) names() []string {
	all := []string{l.Relative()}
	for _, path := range []string{l.VolumePath, l.AbsoluteWin32Path} {
		all = append(all, path[strings.LastIndexAny(path, `/\:`)+1:])
	}
	return slices.DeleteFunc(all, func(name string) bool { return name == "" })
}

// parseLocator, MS-VHDX §2.6.2.6: GUID of the type, u16 reserved, u16 count;
// then per entry u32 key offset, u32 value offset (both from the beginning of
// the item), u16 key length, u16 value length. Strings are UTF-16LE.
func parseLocator(b []byte) (ParentLocator, error) {
	var l ParentLocator
	if len(b) < 20 {
		return l, corrupt("parent locator of %d bytes", len(b))
	}
	if g := GUID(b); g != GUID(guid(vhdxLocatorType)) {
		return l, unsupported("parent of type %v", g)
	}
	n := int(binary.LittleEndian.Uint16(b[18:]))
	if len(b) < 20+12*n {
		return l, corrupt("parent locator of %d bytes with %d entries", len(b), n)
	}
	seen := map[string]bool{}
	for i := range n {
		e := b[20+12*i:]
		le := binary.LittleEndian
		key, ok := utf16At(b, le.Uint32(e), min(le.Uint16(e[8:]), 64)) // no key known here is longer
		if !ok {
			return l, corrupt("key %d of the parent locator", i)
		}
		if !isLocatorKey(key) {
			continue
		}
		value, ok := utf16At(b, le.Uint32(e[4:]), le.Uint16(e[10:]))
		if !ok || seen[key] || !l.set(key, value) {
			return l, corrupt("%s of the parent locator", key)
		}
		seen[key] = true
	}
	if !seen["parent_linkage"] {
		return l, corrupt("parent locator without parent_linkage")
	}
	return l, nil
}

func isLocatorKey(key string) bool {
	switch key {
	case "parent_linkage", "parent_linkage2", "relative_path", "volume_path", "absolute_win32_path":
		return true
	}
	return false
}

func (l *ParentLocator) set(key, value string) (ok bool) {
	switch key {
	case "parent_linkage":
		l.Linkage, ok = vhdxGUID(value)
		return ok
	case "parent_linkage2":
		l.Linkage2, ok = vhdxGUID(value)
		return ok
	case "relative_path":
		l.RelativePath = value
	case "volume_path":
		l.VolumePath = value
	case "absolute_win32_path":
		l.AbsoluteWin32Path = value
	}
	return true
}

// utf16At decodes n bytes at off.
func utf16At(b []byte, off uint32, n uint16) (string, bool) {
	if n == 0 || n%2 != 0 || uint64(off)+uint64(n) > uint64(len(b)) {
		return "", false
	}
	units := make([]uint16, n/2)
	for i := range units {
		if units[i] = binary.LittleEndian.Uint16(b[int(off)+2*i:]); units[i] == 0 {
			return "", false
		}
	}
	return string(utf16.Decode(units)), true
}

// openParent opens the parent and makes sure that it is the one that the image
// was made over.
func (v *VHDXImage) openParent(locator []byte, open func(ParentLocator) (Source, error)) error {
	l, err := parseLocator(locator)
	if err != nil {
		return err
	}
	if open == nil {
		return refused("has the parent %q", l.RelativePath)
	}
	parent, err := open(l)
	if err != nil {
		return wrapParent(l, err)
	}
	p, ok := parent.(interface {
		DataWriteGUID() GUID
		LogicalSectorSize() int64
	})
	if !ok {
		return wrapParent(l, corrupt("is no VHDX"))
	}
	switch id := p.DataWriteGUID(); {
	case id != l.Linkage && (l.Linkage2 == (GUID{}) || id != l.Linkage2):
		return wrapParent(l, corrupt("is another disk or was written to since: its id is %v, not %v", id, l.Linkage))
	case p.LogicalSectorSize() != v.meta.sector:
		return wrapParent(l, corrupt("has sectors of %d bytes, not %d", p.LogicalSectorSize(), v.meta.sector))
	}
	v.backing = parent
	return nil
}

func wrapParent(l ParentLocator, err error) error {
	for _, name := range []string{l.RelativePath, l.VolumePath, l.AbsoluteWin32Path} {
		if name != "" {
			return fmt.Errorf("parent %q: %w", name, err)
		}
	}
	return fmt.Errorf("parent %v: %w", l.Linkage, err)
}
