package fs

import "github.com/holdfast-backup/holdfast/fs/guest"

// GuestVolume is a volume of a point, by itself or as one of the guest's own views has it.
type GuestVolume struct {
	side *guestSide
	vol  int // of the machine's volumes
}

// Key is the same for the same volume of the same point and view.
func (v GuestVolume) Key() uint64 { return v.side.seed + uint64(v.vol)*0x9e3779b97f4a7c15 }

// GuestID says what a node of a guest is, in so few bytes that it may be kept for each of many files. The zero GuestID is none.
type GuestID struct {
	Volume GuestVolume
	Ino    guest.Ino
}

// IsZero reports whether it is none.
func (g GuestID) IsZero() bool { return g.Volume.side == nil }

func (g GuestID) node() guestNode { return guestNode{g.Volume.side, g.Volume.vol, g.Ino} }

// Node gives the node, Dir, File and Link as what it is known to be. Nothing is read for that.
func (g GuestID) Node() Xattrer { return &guestSpecial{g.node()} }
func (g GuestID) Dir() Lister   { return &guestDir{g.node()} }
func (g GuestID) File() File    { return &guestFile{g.node()} }
func (g GuestID) Link() Link    { return &guestLink{g.node()} }

// GuestIDOf gives what a node is made of; the zero GuestID for one that is not a guest's directory, file, link or special file.
func GuestIDOf(n Node) GuestID {
	switch n := n.(type) {
	case *guestDir:
		return n.id()
	case *guestFile:
		return n.id()
	case *guestLink:
		return n.id()
	case *guestSpecial:
		return n.id()
	}
	return GuestID{}
}

func (n *guestNode) id() GuestID { return GuestID{GuestVolume{n.side, n.vol}, n.ino} }
