package fuse

import (
	"context"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfast-backup/holdfast/fs"
)

type fakeNode struct{ inode uint64 }

func (n *fakeNode) Attr(context.Context) (fs.Attr, error) { return fs.Attr{Inode: n.inode}, nil }

// TestNodes: the kernel may be told of a node many times, and forgets it as often.
func TestNodes(t *testing.T) {
	root := &fakeNode{1}
	nodes := newNodes(root)
	a, b := &fakeNode{7}, &fakeNode{8}
	first := nodes.add(a, fs.Attr{Inode: 7})
	if again := nodes.add(&fakeNode{7}, fs.Attr{Inode: 7}); again != first {
		t.Errorf("the same node has the numbers %d and %d", first, again)
	}
	other := nodes.add(b, fs.Attr{Inode: 8, Immutable: true})
	if other == first || nodes.node(other) != fs.Node(b) || nodes.node(first) != fs.Node(a) {
		t.Errorf("numbers %d and %d", first, other)
	}
	if nodes.immutable(first) || !nodes.immutable(other) {
		t.Error("which of them can change is mixed up")
	}
	nodes.forget(first, 1)
	if nodes.node(first) == nil {
		t.Error("forgotten after one of two lookups")
	}
	nodes.forget(first, 1)
	if nodes.node(first) != nil {
		t.Error("still known after as many forgets as lookups")
	}
	if again := nodes.add(a, fs.Attr{Inode: 7}); again == first {
		t.Error("a number was used again")
	}
	nodes.forget(fuse.FUSE_ROOT_ID, 5)
	if nodes.node(fuse.FUSE_ROOT_ID) != fs.Node(root) {
		t.Error("the root is gone")
	}
	for _, id := range []uint64{0, 99, ofGuest, ofGuest | 5<<32 | 3} {
		nodes.forget(id, 1)
		if nodes.node(id) != nil || nodes.dir(id) != nil || nodes.file(id) != nil || nodes.link(id) != nil {
			t.Errorf("%#x is a node", id)
		}
	}
}
