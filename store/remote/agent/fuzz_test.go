package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
)

// conversation gives one end of a connection whose other end says data and then ends.
func conversation(data []byte) (end net.Conn, over func()) {
	a, b := net.Pipe()
	said := make(chan struct{})
	go func() {
		defer close(said)
		go io.Copy(io.Discard, b)
		b.Write(data)
		b.Close()
	}()
	return a, func() { a.Close(); <-said }
}

// FuzzServerBeforeToken: whatever comes first, nobody without a token gets in.
func FuzzServerBeforeToken(f *testing.F) {
	w := newWorld(f, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	good := frame(0, opHello, hello(token))
	f.Add(good[:20])
	f.Add(frame(0, opBegin, vmNamed("x")))
	f.Add(frame(0, opHello, append([]byte{9, 0, 0, 0}, make([]byte, 40)...)))
	f.Add(frame(0, opHello, append([]byte{Version, 0, 0, 0}, make([]byte, 40)...)))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, opHello})
	f.Fuzz(func(t *testing.T, data []byte) {
		conn, over := conversation(data)
		defer over()
		if _, err := w.srv.prove(conn, bufio.NewReader(conn)); err == nil && !bytes.HasPrefix(data, good) {
			t.Error("it got in")
		}
	})
}

// FuzzServerSession: after a token, and after begin, a session ends without a crash and
// gives up all that it held. The receipts are those of a key that the seeds know.
func FuzzServerSession(f *testing.F) {
	w := newWorld(f, ServerOptions{}, nil)
	token, info := w.token(store.AgentInfo{})
	p, _ := w.add(token, "vm", noise(1), noise(2))
	p.conn.Close()
	w.quiet()
	var key receiptKey
	receipt := key.of(w.id(noise(1)))
	u32 := func(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
	begin := frame(1, opBegin, vmNamed("vm"))
	upload := bytes.Join([][]byte{frame(3, opMap, mapOf(0, 3*chunkSize)), frame(4, opWrite, append(hole(0, 1), entry(1, w.id(noise(1)), receipt[:])...)), frame(5, opFinish, nil)}, nil)
	f.Add(upload, true)
	f.Add(append(bytes.Clone(upload), frame(6, opCommit, describe(3*chunkSize, make([]byte, 32)))...), true)
	f.Add(begin, false)
	f.Add(append(frame(2, opBase, u32(0)), frame(3, opIDs, bytes.Join([][]byte{u32(0), make([]byte, 8), u32(2)}, nil))...), true)
	f.Add(append(frame(2, opBase, u32(0)), append(frame(3, opMap, mapOf(1, chunkSize)), frame(5, opFinish, nil)...)...), true)
	f.Add(frame(2, opPut, raw(make([]byte, 10))), true)
	f.Add(frame(2, opPut, append([]byte{1, 0, 0, 0, 1, 4, 0, 0, 0}, 0x28, 0xb5, 0x2f, 0xfd)), true)
	f.Add(append(frame(2, opPing, nil), frame(3, opCommit, []byte(`{"consistency":"crash","disks":[],"config":[{"name":"a","size":0}]}`))...), true)
	f.Fuzz(func(t *testing.T, data []byte, begun bool) {
		if begun {
			data = append(bytes.Clone(begin), data...)
		}
		conn, over := conversation(data)
		x := w.srv.newSession(conn, info)
		x.serve(bufio.NewReader(conn))
		over()
		if live, err := w.leases.Live(context.Background()); err != nil || len(live) != 0 {
			t.Fatalf("leases are left: %d, %v", len(live), err)
		}
	})
}

// FuzzClient: whatever a server answers, a client ends, and does not take more than it asked for.
func FuzzClient(f *testing.F) {
	welcome := append(append([]byte{Version, 0, 0, 0}, make([]byte, 16)...), append([]byte{0, 0, 1, 0}, make([]byte, 32)...)...)
	parent, err := json.Marshal(parentMessage{ID: &store.PointID{1}, Disks: []parentDisk{{Name: "disk0", Key: "k", Size: 5 * chunkSize, ChangeID: "1"}}})
	if err != nil {
		f.Fatal(err)
	}
	ids := append([]byte{0, 0, 0, 0, 1}, make([]byte, 48)...)
	say := func(answers ...[]byte) (b []byte) {
		for i, a := range answers {
			b = append(b, frame(uint64(i+1), statusOK, a)...)
		}
		return b
	}
	f.Add(welcome, say(parent, []byte{1}, ids, nil, make([]byte, receiptLen), nil, make([]byte, 32), []byte(`{"id":"00112233445566778899aabbccddeeff","name":"x"}`)))
	f.Add(welcome, say(parent, []byte{0}))
	f.Add(welcome, frame(1, statusVersion, nil))
	f.Add(welcome[:10], frame(0, statusRefused, []byte("no")))
	f.Add(welcome, append(say(parent), 0xff, 0xff, 0x7f, 0, 1))
	f.Fuzz(func(t *testing.T, first, data []byte) {
		conn, over := conversation(data)
		defer over()
		s := newSession(conn)
		if s.welcome(append(make([]byte, 9), first...)) != nil {
			s.chunkSize = chunkSize
		}
		go s.receive(conn)
		defer s.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if s.chunkSize != chunkSize || s.begin(ctx, store.VM{Name: "vm"}) != nil {
			return
		}
		var base *Base
		got := make([]store.ID, 4)
		if s.Parent() != nil && len(s.Parent().Disks) > 0 {
			if base, err = s.Base(ctx, s.Parent().Disks[0].Name); err == nil && base != nil {
				base.IDs(ctx, 1, got)
			}
		}
		m, err := s.Map(ctx, base, 5*chunkSize)
		if err != nil {
			return
		}
		w, err := s.Writer()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		chunk := make([]byte, chunkSize)
		chunk[5] = 1
		id := make([]store.ID, 1)
		if _, err := w.Write(ctx, chunk, make([]store.ID, 1), id); err != nil {
			return
		}
		if m.Set(ctx, 0, id, make([]store.ID, 1)) != nil {
			return
		}
		root, err := m.Finish(ctx, 5*chunkSize)
		if err != nil {
			return
		}
		s.Commit(ctx, &store.Point{Disks: []store.Disk{{Name: "disk0", Size: root.Size, Root: root.Page[:]}}})
		if ctx.Err() != nil {
			t.Error("it hangs")
		}
	})
}

// FuzzToken: what is read as a token is written the same.
func FuzzToken(f *testing.F) {
	f.Add(Token{ID: [8]byte{1}, Secret: [32]byte{2}, Pin: [32]byte{3}}.Text())
	f.Add(Token{}.Text() + "\n")
	f.Add("hfa1_")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		if again, err := ParseToken(token.Text()); err != nil || again != token || !bytes.Contains([]byte(text), []byte(token.Text())) {
			t.Errorf("%q: %v", text, err)
		}
	})
}
