package btrfs

import (
	"sync"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// A guest.Ino has the number of the subvolume above that of the inode, as each subvolume numbers its own:
//
//	 63          40   39    38                              0
//	+--------------+-------+---------------------------------+
//	| subvolume    | empty | inode                           |
//	+--------------+-------+---------------------------------+
//
// The top level (5) is 0. An empty one stands for a subvolume that is not in this place any more, in the directory
// that it names: a snapshot has such where what it was made of has a subvolume.
const (
	inoBits  = 39
	inoEmpty = 1 << inoBits
	maxTree  = 1<<24 - 1
)

func pack(tree, id uint64) (guest.Ino, error) {
	if tree == objectFSTree {
		tree = 0
	}
	if tree > maxTree || id >= inoEmpty {
		return 0, guest.Unsupported("inode %d of subvolume %d: the number", id, tree)
	}
	return guest.Ino(tree<<(inoBits+1) | id), nil
}

// A place is what a guest.Ino names.
type place struct {
	*tree
	ino   uint64
	empty bool // not ino, but a folder in it, empty
}

func (fs *FS) place(ino guest.Ino) (place, error) {
	id := uint64(ino) >> (inoBits + 1)
	if id == 0 {
		id = objectFSTree
	}
	p := place{ino: uint64(ino) & (inoEmpty - 1), empty: uint64(ino)&inoEmpty != 0}
	if p.ino < objectFirst {
		return p, guest.ErrNotExist
	}
	var err error
	p.tree, err = fs.subvolume(id)
	return p, err
}

// roots finds trees in the root tree.
type roots struct {
	root   *tree
	csums  *tree
	top    *tree
	mu     sync.Mutex       // guards following
	opened map[uint64]*tree // by id; those that the log does not change
}

// maxOpened is how many trees are remembered.
const maxOpened = 4096

func (fs *FS) openRoots() (err error) {
	r := &fs.roots
	r.root = &tree{fs: fs, id: objectRootTree, root: want{fs.sb.root, fs.sb.generation, fs.sb.rootLevel}}
	r.opened = map[uint64]*tree{}
	if r.top, err = fs.subvolume(objectFSTree); err != nil {
		return err
	}
	// Without it, files without sums can be read.
	if r.csums, err = fs.tree(objectCsumTree); err != nil {
		fs.warn("the tree of checksums: %v", err)
	}
	return nil
}

// A rootItem is what the root tree says of a tree (BTRFS, On-disk Format, ROOT_ITEM).
type rootItem struct {
	root         want
	refs         uint32
	lastSnapshot uint64
}

const rootItemSize = 239 // of the first version

func parseRoot(b []byte) (rootItem, error) {
	if len(b) < rootItemSize {
		return rootItem{}, guest.Damaged("a root of %d bytes", len(b))
	}
	return rootItem{want{le.Uint64(b[176:]), le.Uint64(b[160:]), int(b[238])}, le.Uint32(b[216:]), le.Uint64(b[200:])}, nil
}

// rootOf reads the item of a tree, which is the last of its id. guest.ErrNotExist.
func (fs *FS) rootOf(in *tree, k key) (rootItem, error) {
	found, b, ok, err := in.floor(k)
	if err != nil {
		return rootItem{}, err
	}
	if !ok || found.id != k.id || found.kind != k.kind {
		return rootItem{}, guest.ErrNotExist
	}
	return parseRoot(b)
}

// tree gives a tree by its number. guest.ErrNotExist.
func (fs *FS) tree(id uint64) (*tree, error) {
	r, err := fs.rootOf(fs.roots.root, key{id, kindRoot, maxID})
	if err != nil {
		return nil, err
	}
	return &tree{fs: fs, id: id, root: r.root}, nil
}

// subvolume gives the tree of a subvolume. guest.ErrNotExist when there is none, or none any more.
func (fs *FS) subvolume(id uint64) (*tree, error) {
	if t := fs.log.trees[id]; t != nil {
		return t, nil
	}
	r := &fs.roots
	r.mu.Lock()
	t := r.opened[id]
	r.mu.Unlock()
	if t != nil {
		return t, nil
	}
	item, err := fs.rootOf(r.root, key{id, kindRoot, maxID})
	if err == nil && item.refs == 0 {
		err = guest.ErrNotExist // being deleted
	}
	if err != nil {
		return nil, err
	}
	t = &tree{fs: fs, id: id, root: item.root}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.opened) >= maxOpened {
		clear(r.opened)
	}
	r.opened[id] = t
	return t, nil
}

// Root implements guest.FS: the top level, whatever a mount would show.
func (fs *FS) Root() guest.Ino { return objectFirst }

// Default is the root of the subvolume that a mount shows which names none: the top level, unless another was set.
func (fs *FS) Default() (guest.Ino, error) {
	const rootDir = 6 // (BTRFS, On-disk Format, Root tree directory)
	e, err := fs.roots.root.entry(rootDir, "default")
	if err == guest.ErrNotExist {
		return fs.Root(), nil
	}
	if err != nil {
		return 0, err
	}
	if e.at.kind != kindRoot {
		return 0, guest.Damaged("the default subvolume")
	}
	if _, err := fs.subvolume(e.at.id); err != nil {
		return 0, err
	}
	return pack(e.at.id, objectFirst)
}
