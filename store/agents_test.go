package store_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/bucket"
)

// agentID is the id of a token as CheckAgent takes it.
func agentID(t *testing.T, info store.AgentInfo) []byte {
	t.Helper()
	var id store.PointID
	if err := id.UnmarshalText([]byte(info.ID + info.ID)); err != nil {
		t.Fatal(err)
	}
	return id[:store.AgentIDLen]
}

func TestAgents(t *testing.T) {
	m := newKeysRepo(t)
	repo := mustOpen(t, m, "first")
	secret, a, err := repo.AddAgent(t.Context(), store.AgentInfo{Label: "hv1", VMs: []string{"web*", "db"}, Expires: keysTime.Add(time.Hour)}, keysTime)
	if err != nil {
		t.Fatal(err)
	}
	other, b, err := repo.AddAgent(t.Context(), store.AgentInfo{}, keysTime)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(object(t, m, "config"), []byte(a.ID)) == false || bytes.Contains(object(t, m, "config"), secret) {
		t.Error("the config has not the id, or has the secret")
	}
	again := mustOpen(t, m, "first")
	if list, err := again.Agents(t.Context()); err != nil || len(list) != 2 || list[0].ID != a.ID || list[0].Label != "hv1" || list[0].Forged || list[1].Forged {
		t.Fatalf("%+v, %v", list, err)
	}
	check := func(info store.AgentInfo, secret []byte, now time.Time, want error) {
		t.Helper()
		got, err := again.CheckAgent(t.Context(), agentID(t, info), secret, now)
		if !errors.Is(err, want) || err == nil && got.ID != info.ID {
			t.Errorf("%+v, %v; want %v", got, err, want)
		}
	}
	check(a, secret, keysTime, nil)
	check(b, other, keysTime.AddDate(100, 0, 0), nil)
	check(a, other, keysTime, store.ErrToken)
	check(a, nil, keysTime, store.ErrToken)
	check(a, secret, keysTime.Add(time.Hour), store.ErrToken)
	check(store.AgentInfo{ID: "0011223344556677"}, secret, keysTime, store.ErrToken)
	for vm, want := range map[string][2]bool{"web1": {true, true}, "db": {true, true}, "db2": {false, true}, "": {false, true}} {
		if ok, decided := a.May(vm); ok != want[0] || decided != want[1] {
			t.Errorf("%q: %v, %v", vm, ok, decided)
		}
	}
	if _, decided := b.May("web"); decided {
		t.Error("no patterns decide")
	}

	// A change of keys keeps them; removing one ends it.
	if _, err := again.AddKey(t.Context(), []byte("second"), "", keysTime); err != nil {
		t.Fatal(err)
	}
	if err := again.RemoveAgent(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	check(a, secret, keysTime, store.ErrToken)
	check(b, other, keysTime, nil)
	if err := again.AgentValid(t.Context(), a.ID, keysTime); !errors.Is(err, store.ErrToken) {
		t.Error(err)
	}
	if err := again.AgentValid(t.Context(), b.ID, keysTime); err != nil {
		t.Error(err)
	}
	if err := again.RemoveAgent(t.Context(), a.ID); !errors.Is(err, store.ErrNotExist) {
		t.Error(err)
	}
	for _, bad := range []store.AgentInfo{{Label: "a\nb"}, {VMs: []string{"["}}, {VMs: []string{""}}, {VMs: []string{"a/b"}}, {VMs: make([]string, 40)}} {
		if _, _, err := again.AddAgent(t.Context(), bad, keysTime); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

// TestForgedAgents: whoever can write the config, but has no key, can neither make a
// token nor change one.
func TestForgedAgents(t *testing.T) {
	for what, pair := range map[string][2]string{
		"pattern":     {`"db"`, `"*"`},
		"no pattern":  {`"vms": [` + "\n        \"db\"\n      ],", ``},
		"label":       {`"hv1"`, `"hv2"`},
		"expiry":      {`"expires": "2`, `"expires": "3`},
		"no expiry":   {`"expires": "`, `"later_expires": "`},
		"a new field": {`"label": "hv1"`, `"label": "hv1", "max_bytes": 5`},
		"mac":         {`"mac": "`, `"mac": "00`},
	} {
		t.Run(what, func(t *testing.T) {
			m := newKeysRepo(t)
			repo := mustOpen(t, m, "first")
			secret, a, err := repo.AddAgent(t.Context(), store.AgentInfo{Label: "hv1", VMs: []string{"db"}, Expires: keysTime.AddDate(1, 0, 0)}, keysTime)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"config", "config.copy"} {
				rewrite(t, m, name, pair[0], pair[1])
			}
			if _, err := repo.CheckAgent(t.Context(), agentID(t, a), secret, keysTime); !errors.Is(err, store.ErrToken) {
				t.Errorf("it is taken: %v", err)
			}
			if list, err := repo.Agents(t.Context()); err != nil || len(list) != 1 || !list[0].Forged {
				t.Errorf("%+v, %v", list, err)
			}
			// It stays as it is when others change the config, and can be removed.
			if _, _, err := repo.AddAgent(t.Context(), store.AgentInfo{}, keysTime); err != nil {
				t.Fatal(err)
			}
			if pair[1] != "" && !strings.Contains(string(object(t, m, "config")), strings.TrimSpace(pair[1][strings.LastIndex(pair[1], ",")+1:])) {
				t.Errorf("%q is gone", pair[1])
			}
			if err := repo.RemoveAgent(t.Context(), a.ID); err != nil {
				t.Error(err)
			}
		})
	}
	// A record of another repository.
	m, from := newKeysRepo(t), newKeysRepo(t)
	secret, a, err := mustOpen(t, from, "first").AddAgent(t.Context(), store.AgentInfo{}, keysTime)
	if err != nil {
		t.Fatal(err)
	}
	text := string(object(t, from, "config"))
	begin := strings.Index(text, `"agents"`)
	record := text[begin:strings.LastIndex(text, "]")]
	for _, name := range []string{"config", "config.copy"} {
		rewrite(t, m, name, `"chunk_size": 131072`, `"chunk_size": 131072, `+record+`]`)
	}
	repo := mustOpen(t, m, "first")
	if list, err := repo.Agents(t.Context()); err != nil || len(list) != 1 || !list[0].Forged {
		t.Fatalf("%+v, %v", list, err)
	}
	if _, err := repo.CheckAgent(t.Context(), agentID(t, a), secret, keysTime); !errors.Is(err, store.ErrToken) {
		t.Error(err)
	}
}

// TestCodedChunks: what a coder makes is stored and read back, and what it cannot
// have made is refused.
func TestCodedChunks(t *testing.T) {
	b := bucket.NewMemory()
	if err := store.Init(t.Context(), b, store.InitOptions{Passphrase: []byte("secret")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo := mustOpenMemory(t, b)
	cs := repo.ChunkSize()
	coder, err := store.NewChunkCoder(repo.ChunkIDKey())
	if err != nil {
		t.Fatal(err)
	}
	defer coder.Close()
	d, err := repo.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	w, err := d.Writer()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	text := bytes.Repeat([]byte("holdfast"), cs/8)
	noise := make([]byte, cs)
	for i, x := 0, uint64(1); i < cs; i++ {
		x = x*6364136223846793005 + 1442695040888963407
		noise[i] = byte(x >> 56)
	}
	m, err := d.Map(t.Context(), store.Root{}, 2*int64(cs))
	if err != nil {
		t.Fatal(err)
	}
	var all []store.CodedChunk
	for i, chunk := range [][]byte{text, noise} {
		c := store.CodedChunk{}
		c.Body, c.Codec = coder.Append(nil, chunk)
		if int(c.Codec) != 1-i {
			t.Errorf("codec %d", c.Codec)
		}
		if err := w.Decode(&c); err != nil || c.ID != coder.ID(chunk) {
			t.Fatalf("%v, %v", c.ID, err)
		}
		if err := m.Set(t.Context(), int64(i), c.ID); err != nil {
			t.Fatal(err)
		}
		all = append(all, c, c) // the same one twice
	}
	for i, want := range []int64{2, 0} {
		got, err := w.WriteCoded(t.Context(), all)
		if err != nil || got.New != want*int64(cs) {
			t.Errorf("time %d: %+v, %v", i, got, err)
		}
	}
	root, err := m.Finish(t.Context(), 2*int64(cs))
	if err != nil {
		t.Fatal(err)
	}
	p := &store.Point{VM: store.VM{Name: "vm"}, Time: time.Now(), Disks: []store.Disk{{Name: "disk0", Size: root.Size, Root: root.Page[:]}}}
	if err := d.Commit(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	img, err := mustOpenMemory(t, b).OpenDisk(p, "disk0")
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2*cs)
	if n, _ := img.Checked().ReadAt(got, 0); n != len(got) || !bytes.Equal(got, append(bytes.Clone(text), noise...)) {
		t.Error("it does not read back")
	}
	part := make([]byte, 100) // across two frames: the layout is ours
	if _, err := img.ReadAt(part, 64<<10-50); err != nil || !bytes.Equal(part, text[:100]) && !bytes.Equal(part, got[64<<10-50:64<<10+50]) {
		t.Error(err)
	}

	enc := func(plain []byte, o ...zstd.EOption) []byte {
		e, err := zstd.NewWriter(nil, append(o, zstd.WithEncoderConcurrency(1))...)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		return e.EncodeAll(plain, nil)
	}
	half, good := cs/2, all[0].Body
	bomb := make([]byte, 64<<20)
	for name, c := range map[string]store.CodedChunk{
		"one frame for all":    {Codec: 1, Body: enc(text)},
		"too little":           {Codec: 1, Body: good[:len(good)/2]},
		"one frame":            {Codec: 1, Body: enc(text[:half])},
		"three frames":         {Codec: 1, Body: append(bytes.Clone(good), enc(text[:half])...)},
		"rest":                 {Codec: 1, Body: append(bytes.Clone(good), 0)},
		"other cuts":           {Codec: 1, Body: append(enc(text[:half-1]), enc(text[:half+1])...)},
		"bomb":                 {Codec: 1, Body: enc(bomb)},
		"two bombs":            {Codec: 1, Body: append(enc(bomb[:1<<20]), enc(bomb[:1<<20])...)},
		"zeros":                {Codec: 0, Body: make([]byte, cs)},
		"zeros, compressed":    {Codec: 1, Body: append(enc(bomb[:half]), enc(bomb[:half])...)},
		"nothing":              {Codec: 1},
		"nothing, raw":         {Codec: 0},
		"raw and short":        {Codec: 0, Body: noise[:cs-1]},
		"raw and long":         {Codec: 0, Body: append(bytes.Clone(noise), 1)},
		"noise for compressed": {Codec: 1, Body: noise[:cs-1]},
		"another codec":        {Codec: 2, Body: noise},
		"longer than the chunk": {Codec: 1, Body: append(append(enc(noise[:half], zstd.WithEncoderLevel(zstd.SpeedFastest)),
			enc(noise[half:])...), make([]byte, 100)...)},
	} {
		if err := w.Decode(&c); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// TestRecheckAfterFullDisk: a failure to write ends the drafts of that time and no later one.
func TestRecheckAfterFullDisk(t *testing.T) {
	full := &fullBucket{Memory: bucket.NewMemory()}
	if err := store.Init(t.Context(), full, store.InitOptions{Passphrase: []byte("secret")}, time.Now()); err != nil {
		t.Fatal(err)
	}
	repo := mustOpenMemory(t, full)
	try := func() error {
		d, err := repo.NewDraft(t.Context())
		if err != nil {
			return err
		}
		defer d.Close()
		w, err := d.Writer()
		if err != nil {
			return err
		}
		defer w.Close()
		ids := make([]store.ID, 1)
		data := bytes.Repeat([]byte(time.Now().String()+"."), 10_000)[:repo.ChunkSize()]
		if _, err := w.Write(t.Context(), data, make([]store.ID, 1), ids); err != nil {
			return err
		}
		return d.Commit(t.Context(), &store.Point{VM: store.VM{Name: "vm"}, Time: time.Now()})
	}
	if err := try(); err != nil {
		t.Fatal(err)
	}
	full.is = true
	if err := try(); !errors.Is(err, bucket.ErrFull) {
		t.Fatal(err)
	}
	full.is = false
	open, err := repo.NewDraft(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	repo.Recheck() // one is still at work that may rely on what was lost
	if err := try(); !errors.Is(err, bucket.ErrFull) {
		t.Fatal(err)
	}
	if err := open.Close(); !errors.Is(err, bucket.ErrFull) {
		t.Fatal(err)
	}
	repo.Recheck()
	if err := try(); err != nil {
		t.Fatal(err)
	}
}

// fullBucket has no room for packs while is.
type fullBucket struct {
	*bucket.Memory
	is bool
}

func (b *fullBucket) Create(ctx context.Context, name string) (bucket.Writer, error) {
	if b.is && strings.HasPrefix(name, "packs/") {
		return nil, bucket.ErrFull
	}
	return b.Memory.Create(ctx, name)
}

func mustOpenMemory(t *testing.T, b bucket.Bucket) *store.Repo {
	t.Helper()
	r, err := store.Open(t.Context(), b, store.MemoryIndex(), store.OpenOptions{Passphrase: func() ([]byte, error) { return []byte("secret"), nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}
