package vdisk

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
)

const (
	vmdkTextMagic  = "# Disk DescriptorFile"
	vmdkMaxText    = mib  // bytes of a descriptor
	vmdkMaxExtents = 4096 // 8 TiB in extents of 2 GiB
	vmdkMaxDisk    = 1 << 53 / sector
	vmdkNoParent   = math.MaxUint32 // as parentCID
)

// vmdkText is what a descriptor says: VMware Virtual Disk Format 5.0, "The
// Descriptor File".
type vmdkText struct {
	createType string
	cid        uint32
	parentCID  uint32
	parent     string // parentFileNameHint
	extents    []vmdkExtent
}

// vmdkExtent is a line of the extent description. Extents follow each other on
// the disk.
type vmdkExtent struct {
	sectors int64
	kind    string // upper case
	file    string // "" for ZERO
	offset  int64  // in the file, sectors
}

// parseVMDKText reads a descriptor. What it does not know it leaves out.
func parseVMDKText(b []byte) (t vmdkText, err error) {
	if i := bytes.IndexByte(b, 0); i >= 0 { // an embedded one fills whole sectors
		b = b[:i]
	}
	if !isVMDKText(b) {
		return t, corrupt("no VMDK descriptor")
	}
	t.parentCID = vmdkNoParent
	seen := map[string]bool{} // key; the first counts
	for line := range bytes.Lines(b) {
		line := strings.TrimSpace(string(line))
		if line == "" || line[0] == '#' {
			continue
		}
		if e, ok, err := parseVMDKExtent(line); err != nil {
			return t, err
		} else if ok {
			if len(t.extents) == vmdkMaxExtents {
				return t, unsupported("more than %d extents", vmdkMaxExtents)
			}
			t.extents = append(t.extents, e)
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		key = strings.ToLower(strings.TrimSpace(key))
		if seen[key] {
			continue
		}
		if err := t.set(key, strings.Trim(strings.TrimSpace(value), `"`)); err != nil {
			return t, err
		}
		seen[key] = true
	}
	return t, t.check(seen["cid"])
}

func isVMDKText(b []byte) bool {
	return bytes.HasPrefix(bytes.TrimLeft(b, " \t\r\n"), []byte(vmdkTextMagic))
}

func (t *vmdkText) set(key, value string) (err error) {
	hex := func() uint32 {
		n, e := strconv.ParseUint(value, 16, 32)
		if e != nil {
			err = corrupt("%s is %q", key, value)
		}
		return uint32(n)
	}
	switch key {
	case "version":
		if value != "1" && value != "2" && value != "3" {
			return unsupported("descriptor version %q", value)
		}
	case "cid":
		t.cid = hex()
	case "parentcid":
		t.parentCID = hex()
	case "parentfilenamehint":
		t.parent = value
	case "createtype":
		t.createType = value
	}
	return err
}

// flat reports whether no extent is sparse.
func (t *vmdkText) flat() bool {
	return !slices.ContainsFunc(t.extents, func(e vmdkExtent) bool { return e.kind != "FLAT" && e.kind != "VMFS" && e.kind != "ZERO" })
}

func (t *vmdkText) check(hasCID bool) error {
	switch strings.ToLower(t.createType) {
	case "monolithicsparse", "monolithicflat", "streamoptimized", "sesparse",
		"twogbmaxextentsparse", "twogbmaxextentflat", "2gbmaxextentsparse", "2gbmaxextentflat",
		"vmfs", "vmfssparse", "vmfsthin", "vmfspreallocated", "vmfseagerzeroedthick":
	case "":
		return corrupt("the descriptor has no createType")
	case "fulldevice", "partitioneddevice", "vmfsraw", "vmfsrdm", "vmfsrdmp", "vmfsrawdevicemap", "vmfspassthroughrawdevicemap":
		return unsupported("createType %q stands for a physical disk, whose data is not in files", t.createType)
	default:
		return unsupported("createType %q", t.createType)
	}
	if !hasCID {
		return corrupt("the descriptor has no CID")
	}
	// govmomi (vmdk.Descriptor) writes 0. A flat extent holds all bytes, so no parent could be seen through it.
	if t.parentCID == 0 && t.parent == "" && t.flat() {
		t.parentCID = vmdkNoParent
	}
	if t.parentCID != vmdkNoParent && t.parent == "" {
		return corrupt("parentCID is %08x, but there is no parentFileNameHint", t.parentCID)
	}
	if len(t.extents) == 0 {
		return corrupt("the descriptor has no extents")
	}
	total := int64(0)
	for _, e := range t.extents {
		if total += e.sectors; total > vmdkMaxDisk { // each is smaller than that, so no overflow
			return corrupt("the extents have %d sectors and more", total)
		}
	}
	return nil
}

var errVMDKExtentLine = errors.New("not understood")

// parseVMDKExtent reads a line such as
//
//	RW 4192256 SPARSE "disk-s001.vmdk"
//	RW 63 FLAT "disk-flat.vmdk" 1024
//	RW 100 ZERO
//
// ok is false for a line of another sort.
func parseVMDKExtent(line string) (e vmdkExtent, ok bool, err error) {
	access, rest := cutField(line)
	switch strings.ToUpper(access) {
	case "RW", "RDONLY":
	case "NOACCESS":
		return e, false, unsupported("extent without access: %q", line)
	default:
		return e, false, nil
	}
	number, rest := cutField(rest)
	kind, rest := cutField(rest)
	e.kind = strings.ToUpper(kind)
	if e.sectors, err = parseSectors(number); err == nil && e.kind != "ZERO" {
		err = e.parseFile(rest)
	}
	if err != nil {
		return e, false, corrupt("extent line %q (%v)", line, err)
	}
	return e, true, nil
}

// cutField cuts the first word off.
func cutField(s string) (field, rest string) {
	s = strings.TrimLeft(s, " \t")
	if i := strings.IndexAny(s, " \t"); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

func parseSectors(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err == nil && (n < 0 || n > vmdkMaxDisk) {
		err = strconv.ErrRange
	}
	return n, err
}

// parseFile reads the quoted name and the offset behind it, if any. A device
// has more fields, and is refused later by its createType.
func (e *vmdkExtent) parseFile(s string) (err error) {
	_, s, ok := strings.Cut(s, `"`)
	if !ok {
		return errVMDKExtentLine
	}
	e.file, s, ok = strings.Cut(s, `"`)
	if !ok || e.file == "" {
		return errVMDKExtentLine
	}
	if offset, _ := cutField(s); offset != "" {
		e.offset, err = parseSectors(offset)
	}
	return err
}
