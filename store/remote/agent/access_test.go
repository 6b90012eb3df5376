package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/wire"
)

func TestTokens(t *testing.T) {
	var ahead atomic.Int64 // of the clock, seconds
	w := newWorld(t, ServerOptions{Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load()) * time.Second) }}, nil)
	good, _ := w.token(store.AgentInfo{})
	removed, info := w.token(store.AgentInfo{})
	brief, _ := w.token(store.AgentInfo{Expires: time.Now().Add(time.Hour)})
	foreign, _ := newWorld(t, ServerOptions{}, nil).token(store.AgentInfo{})
	w.login(good)
	w.login(removed)
	w.login(brief)
	if err := w.repo.RemoveAgent(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	wrong, unknown := good, good
	wrong.Secret[5] ^= 1
	unknown.ID[0] ^= 1
	var answers [][]byte
	for _, token := range []Token{wrong, unknown, removed, foreign} {
		answers = append(answers, w.dial().refused(statusAccess, opHello, hello(token)))
	}
	for _, a := range answers {
		if !bytes.Equal(a, answers[0]) { // whether an id is known is not told
			t.Errorf("answers differ: %q, %q", a, answers[0])
		}
	}
	ahead.Store(3601)
	if a := w.dial().refused(statusAccess, opHello, hello(brief)); !bytes.Contains(a, []byte("expired")) {
		t.Errorf("%q", a)
	}
	w.login(good)

	// Half a token, and something before it.
	if resp := w.dial().ask(opHello, hello(good)[:40]); resp != nil {
		t.Errorf("%q", resp)
	}
	p := w.dial()
	if resp := p.ask(opBegin, vmNamed("x")); resp != nil {
		t.Errorf("%q", resp)
	}
	resp := w.dial().ask(opHello, append(binary.LittleEndian.AppendUint32(nil, 99), hello(good)[4:]...))
	if resp == nil || resp[8] != statusVersion || binary.LittleEndian.Uint32(resp[9:]) != Version {
		t.Errorf("%q", resp)
	}
}

// TestRemovedTokenEndsSessions: at the next map and at commit, and of themselves after a while.
func TestRemovedTokenEndsSessions(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil, func(s *Server) { s.checkEvery = time.Hour })
	other := newWorld(t, ServerOptions{}, nil)
	for name, at := range map[string]uint8{"map": opMap, "commit": opCommit} {
		token, info := w.token(store.AgentInfo{})
		p, _ := w.begin(token, "vm-"+name)
		p.ok(opMap, mapOf(0, chunkSize))
		p.ok(opWrite, entry(0, w.id(noise(1)), p.put(noise(1))))
		root := bytes.Clone(p.ok(opFinish, nil))
		if err := w.repo.RemoveAgent(t.Context(), info.ID); err != nil {
			t.Fatal(err)
		}
		payload := mapOf(0, chunkSize)
		if at == opCommit {
			payload = describe(chunkSize, root)
		}
		if resp := p.ask(at, payload); resp == nil || resp[8] != statusAccess {
			t.Errorf("%s: %q", name, resp)
		}
	}
	token, info := other.token(store.AgentInfo{})
	p, _ := other.begin(token, "vm")
	if err := other.repo.RemoveAgent(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	if resp := p.answer(); resp != nil {
		t.Errorf("%q", resp)
	}
	for _, x := range []*world{w, other} {
		if got := x.points(); got != nil {
			t.Error(got)
		}
	}
}

func TestVMs(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	any, info := w.token(store.AgentInfo{})
	other, _ := w.token(store.AgentInfo{})
	web, _ := w.token(store.AgentInfo{VMs: []string{"web*", "db"}})
	w.local("bank", noise(1))
	w.local("web1", noise(1))
	add := func(token Token, vm string, chunks ...[]byte) {
		p, _ := w.add(token, vm, chunks...)
		p.conn.Close()
	}
	add(any, "mine", noise(2), noise(3))
	add(other, "theirs", noise(4))

	for vm, tokens := range map[string][3]bool{ // any, other, web
		"new": {true, true, false}, "mine": {true, false, false}, "theirs": {false, true, false}, "bank": {false, false, false},
		"web1": {false, false, true}, "web2": {true, true, true}, "db": {true, true, true}, "db2": {true, true, false},
		"": {}, ".": {}, "..": {}, "a/b": {}, "a\\b": {}, "a\nb": {}, " a": {}, strings.Repeat("x", 201): {},
	} {
		for i, token := range []Token{any, other, web} {
			p := w.login(token)
			if tokens[i] {
				p.ok(opBegin, vmNamed(vm))
			} else {
				p.refused(statusAccess, opBegin, vmNamed(vm))
			}
			p.conn.Close()
			w.quiet()
		}
	}
	// What a pattern says is all that its holder learns: the refusal is the same for VMs that exist.
	var answers [][]byte
	for _, vm := range []string{"bank", "nope"} {
		a := w.login(web).refused(statusAccess, opBegin, vmNamed(vm))
		answers = append(answers, bytes.ReplaceAll(a, []byte(vm), []byte("VM")))
	}
	if !bytes.Equal(answers[0], answers[1]) {
		t.Errorf("%q", answers)
	}
	// The parent is one of the same token, though a newer point is there.
	_, parent := w.begin(web, "web1")
	if parent.ID != nil {
		t.Errorf("the parent is somebody else's: %+v", parent)
	}
	add(web, "web1", noise(5))
	w.local("web1", noise(6))
	both, _ := w.token(store.AgentInfo{VMs: []string{"web1"}})
	if _, parent = w.begin(both, "web1"); parent.ID != nil {
		t.Errorf("the parent is another token's: %+v", parent)
	}
	if _, parent = w.begin(web, "web1"); parent.ID == nil {
		t.Error("there is no parent")
	} else if p, err := w.repo.Point(t.Context(), *parent.ID); err != nil || p.Agent != mustID(web) {
		t.Errorf("%+v, %v", p, err)
	}
	// A copy of a point from another repository is nobody's here.
	w.copied("copied", info.ID)
	w.login(any).refused(statusAccess, opBegin, vmNamed("copied"))
	// Somebody else's first point comes while a session is at work.
	p, _ := w.begin(any, "race")
	p.ok(opMap, mapOf(0, 0))
	root := bytes.Clone(p.ok(opFinish, nil))
	w.local("race", noise(1))
	p.refused(statusAccess, opCommit, describe(0, root))
	if s, err := w.repo.PointsOf(t.Context(), "race"); err != nil || len(s) != 1 {
		t.Errorf("%d points, %v", len(s), err)
	}
}

func mustID(t Token) string { return strings.TrimPrefix(t.String(), "token ") }

// copied makes a point that says it was made by a token, in another repository.
func (w *world) copied(vm, agent string) {
	w.t.Helper()
	d, err := w.repo.NewDraft(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	defer d.Close()
	p := &store.Point{VM: store.VM{Name: vm}, Time: time.Now(), Agent: agent, CopiedFrom: &store.Origin{Repository: "00"}}
	if err := d.Commit(w.t.Context(), p); err != nil {
		w.t.Fatal(err)
	}
}

// TestPin: a client shows its token to the server of its repository and to no other.
func TestPin(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := serverTLS(other)
	if err != nil {
		t.Fatal(err)
	}
	genuine, err := serverTLS(w.repo.AgentTLSKey())
	if err != nil {
		t.Fatal(err)
	}
	// One that shows the right certificate without having its key.
	stolen := conf.Clone()
	stolen.Certificates = []tls.Certificate{{Certificate: genuine.Certificates[0].Certificate, PrivateKey: other}}
	old := genuine.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for name, c := range map[string]*tls.Config{"another key": conf, "the certificate alone": stolen, "TLS 1.2": old} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			heard := make(chan int, 1)
			go func() {
				raw, err := ln.Accept()
				if err != nil {
					heard <- -1
					return
				}
				defer raw.Close()
				raw.SetDeadline(time.Now().Add(20 * time.Second))
				n, _ := io.ReadFull(tls.Server(raw, c), make([]byte, 1))
				heard <- n
			}()
			_, err = Client{Addr: ln.Addr().String(), Token: token}.Begin(t.Context(), store.VM{Name: "x"})
			if err == nil || name == "another key" && !errors.Is(err, ErrOtherServer) {
				t.Errorf("%v", err)
			}
			if n := <-heard; n != 0 {
				t.Errorf("the other server read %d bytes", n)
			}
		})
	}
	// The same token at the right one.
	s, err := Client{Addr: w.addr, Token: token}.Begin(t.Context(), store.VM{Name: "x"})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// TestClientErrors: what a client says of servers that do not let it in.
func TestClientErrors(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, info := w.token(store.AgentInfo{VMs: []string{"web"}})
	begin := func(c Client, vm string) error {
		s, err := c.Begin(t.Context(), store.VM{Name: vm})
		if err == nil {
			s.Close()
		}
		return err
	}
	if err := begin(Client{w.addr, token}, "web"); err != nil {
		t.Error(err)
	}
	if err := begin(Client{w.addr, token}, "db"); !errors.Is(err, store.ErrToken) || !strings.Contains(err.Error(), `its patterns do not name "db"`) {
		t.Error(err)
	}
	wrong := token
	wrong.Secret[0] ^= 1
	if err := begin(Client{w.addr, wrong}, "web"); !errors.Is(err, store.ErrToken) {
		t.Error(err)
	}
	if err := begin(Client{"127.0.0.1:1", token}, "web"); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
	// A server that gives another version, and one that is none.
	conf, err := serverTLS(w.repo.AgentTLSKey())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		conf *tls.Config
		say  []byte
		want error
	}{
		"version": {conf, frame(0, statusVersion, []byte{7, 0, 0, 0}), ErrVersion},
		"newer":   {conf, frame(0, statusOK, append([]byte{7, 0, 0, 0}, make([]byte, 52)...)), ErrVersion},
		"nobody":  {nil, []byte("220 mail.example ESMTP\r\n"), ErrUnreachable},
		"silent":  {conf, nil, ErrGone},
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			if c.conf != nil {
				raw = tls.Server(raw, c.conf)
				raw.Read(make([]byte, 100))
			}
			raw.Write(c.say)
			raw.Close()
		}()
		if err := begin(Client{ln.Addr().String(), token}, "web"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		ln.Close()
	}
	if err := w.repo.RemoveAgent(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	if err := begin(Client{w.addr, token}, "web"); !errors.Is(err, store.ErrToken) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (Client{w.addr, token}).Begin(ctx, store.VM{Name: "web"}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestLimits: connections without a token, sessions of a token, bytes and time before one.
func TestLimits(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil, func(s *Server) { s.handshake = time.Second })
	token, _ := w.token(store.AgentInfo{})
	other, _ := w.token(store.AgentInfo{})
	var sessions []*peer
	for range maxOfToken {
		sessions = append(sessions, w.login(token))
	}
	if resp := w.dial().ask(opHello, hello(token)); resp == nil || resp[8] != statusRefused {
		t.Errorf("%q", resp)
	}
	w.login(other)
	sessions[0].conn.Close()
	deadline := time.Now().Add(10 * time.Second)
	for resp := []byte(nil); resp == nil || resp[8] != statusOK; resp = w.dial().ask(opHello, hello(token)) {
		if time.Now().After(deadline) {
			t.Fatal("a session that ended is still counted")
		}
	}
	// Who shows nothing is thrown out, and while many do, nobody else gets in.
	var silent []net.Conn
	for range maxUnproven {
		c, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadAll(c); errors.Is(err, context.DeadlineExceeded) || err != nil && strings.Contains(err.Error(), "timeout") {
			t.Error("it may stay without a token")
		}
	}
	w.login(other)
	// More bytes than a handshake takes.
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	head := []byte{22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff} // a ClientHello of 64 KiB in records of 16
	if _, err := c.Write(append(head, make([]byte, 60<<10)...)); err == nil {
		c.SetReadDeadline(time.Now().Add(700 * time.Millisecond)) // before the time is over
		if _, err := io.ReadAll(c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Error("60 KiB without a token were read")
		}
	}
}

// TestSilence: a peer that is gone without a word holds its leases for a while, one that pings
// for as long as it does.
func TestSilence(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil, func(s *Server) { s.silence = 400 * time.Millisecond })
	token, _ := w.token(store.AgentInfo{})
	w.add(token, "vm", noise(1))
	dead, _ := w.begin(token, "vm")
	alive, _ := w.begin(token, "vm")
	for range 10 {
		time.Sleep(100 * time.Millisecond)
		alive.ok(opPing, nil)
	}
	if resp := dead.answer(); resp != nil {
		t.Errorf("%q", resp)
	}
	until := time.Now().Add(10 * time.Second)
	for {
		live, err := w.leases.Live(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(live) == 2 { // a writer and a reader
			break
		}
		if time.Now().After(until) {
			t.Fatalf("%d leases", len(live))
		}
		alive.ok(opPing, nil)
	}
	alive.ok(opMap, mapOf(0, 0))
}

// TestDescriptions: what a point cannot be.
func TestDescriptions(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	texts := func(n int, s string) string {
		b, _ := json.Marshal(strings.Split(strings.Repeat(s+",", n)[:n*(len(s)+1)-1], ","))
		return string(b)
	}
	disk := `{"key":"k","size":0,"read":"x"}`
	for name, c := range map[string]struct {
		text string
		ok   bool
	}{
		"good":              {`{"consistency":"crash","disks":[` + disk + `],"config":[{"name":"a/b","size":0},{"name":"a.b","size":0}],"tags":["x"]}`, true},
		"no consistency":    {`{"disks":[]}`, false},
		"no JSON":           {`{`, false},
		"nothing":           {``, false},
		"an unknown field":  {`{"consistency":"crash","disks":[],"locked_until":"2000-01-01T00:00:00Z"}`, false},
		"a field of a disk": {`{"consistency":"crash","disks":[{"key":"k","size":0,"name":"disk7"}]}`, false},
		"up":                {`{"consistency":"crash","disks":[],"config":[{"name":"../x","size":0}]}`, false},
		"absolute":          {`{"consistency":"crash","disks":[],"config":[{"name":"/x","size":0}]}`, false},
		"dot":               {`{"consistency":"crash","disks":[],"config":[{"name":".","size":0}]}`, false},
		"no name":           {`{"consistency":"crash","disks":[],"config":[{"name":"","size":0}]}`, false},
		"two of a name":     {`{"consistency":"crash","disks":[],"config":[{"name":"x","size":0},{"name":"x","size":0}]}`, false},
		"file and folder":   {`{"consistency":"crash","disks":[],"config":[{"name":"x","size":0},{"name":"x/y","size":0}]}`, false},
		"a newline":         {`{"consistency":"crash","disks":[],"tags":["a\nb"]}`, false},
		"an escape":         {`{"consistency":"crash","disks":[],"warnings":["\u001b[2J"]}`, false},
		"many tags":         {`{"consistency":"crash","disks":[],"tags":` + texts(65, "x") + `}`, false},
		"a long tag":        {`{"consistency":"crash","disks":[],"tags":` + texts(1, strings.Repeat("x", 257)) + `}`, false},
		"many disks":        {`{"consistency":"crash","disks":[` + strings.Repeat(disk+",", 256) + disk + `]}`, false},
		"a million disks":   {`{"consistency":"crash","disks":[` + strings.Repeat(`{},`, 300_000) + `{}]}`, false},
		"a long key":        {`{"consistency":"crash","disks":[{"key":"` + strings.Repeat("k", 5000) + `","size":0}]}`, false},
		"a short root":      {`{"consistency":"crash","disks":[{"key":"k","size":0,"root":"AAAA"}]}`, false},
		"deep":              {strings.Repeat(`{"disks":[`, 100_000), false},
	} {
		p, _ := w.begin(token, "vm")
		p.ok(opMap, mapOf(0, 0))
		p.ok(opFinish, nil)
		if c.ok {
			p.ok(opCommit, []byte(c.text))
			continue
		}
		used := allocated(func() { p.refused(statusRefused, opCommit, []byte(c.text)) })
		if used > 40<<20 {
			t.Errorf("%s costs %d MiB", name, used>>20)
		}
	}
	if got := w.points(); len(got) != 1 {
		t.Errorf("%q", got)
	}
	w.login(token).refused(statusRefused, opBegin, []byte(`{"name":"x","uuid":"a\nb"}`))
	w.login(token).refused(statusRefused, opBegin, []byte(`{`))
	// What it says of its sums cannot be impossible.
	p, _ := w.begin(token, "sums")
	p.ok(opMap, mapOf(0, chunkSize))
	p.ok(opFinish, nil)
	p.ok(opCommit, fmt.Appendf(nil, `{"consistency":"crash","disks":[{"key":"k","size":%d,"bytes_data":%d,"bytes_read":-5}]}`, chunkSize, 1<<60))
	s, err := w.repo.Latest(t.Context(), "sums")
	if err != nil {
		t.Fatal(err)
	}
	if point, err := w.repo.Point(t.Context(), s.ID); err != nil || point.Stats.Data != chunkSize || point.Stats.Read != 0 || point.Stats.Total != chunkSize {
		t.Errorf("%+v, %v", point.Stats, err)
	}
}

// TestErrorsTellNothing: what fails at the server is in its log, not in the answer.
func TestErrorsTellNothing(t *testing.T) {
	x := &session{}
	for _, err := range []error{errors.New("open /backup/packs/x: bad"), &store.DamageError{Point: "bank/2026", Disk: "disk0", What: "chunk 12ab"}} {
		a, b := net.Pipe()
		x.conn = a
		go x.tell(1, err)
		resp, rerr := wire.ReadFrame(b, nil, 1000)
		if rerr != nil || len(resp) != wire.HeadLen {
			t.Errorf("%q, %v", resp, rerr)
		}
		a.Close()
	}
}

// TestTokenText: a token in the form that users have, and what is none.
func TestTokenText(t *testing.T) {
	w := newWorld(t, ServerOptions{}, nil)
	token, _ := w.token(store.AgentInfo{})
	text := token.Text()
	for _, s := range []string{text, text + "\n", " " + text + "\r\n"} {
		if got, err := ParseToken(s); err != nil || got != token {
			t.Errorf("%q: %v", s, err)
		}
	}
	for i := range text {
		c := byte('A')
		if text[i] == c {
			c = 'B'
		}
		bad := text[:i] + string(c) + text[i+1:]
		if _, err := ParseToken(bad); !errors.Is(err, ErrToken) || strings.Contains(err.Error(), bad[10:20]) {
			t.Errorf("character %d: %v", i, err)
		}
	}
	for _, s := range []string{"", "hfa1_", text[:len(text)-1], text + "A", text[:20] + "\n" + text[20:], "hfa2_" + text[5:]} {
		if _, err := ParseToken(s); !errors.Is(err, ErrToken) {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{fmt.Sprint(token), fmt.Sprintf("%v %+v %#v %s", token, token, token, token)} {
		if strings.Contains(s, fmt.Sprintf("%x", token.Secret[:4])) || strings.Contains(s, fmt.Sprint(token.Secret[:3])[1:8]) {
			t.Errorf("the secret shows in %q", s)
		}
	}
}
