package store

import (
	"bytes"
	"os"
	"testing"
	"time"
)

// TestConfigFields: every field that this program writes is one that it knows, else
// it would stand there twice after a change; and a config of before is written as it was.
func TestConfigFields(t *testing.T) {
	c, _, err := newConfig(InitOptions{ChunkSize: MinChunkSize, Passphrase: []byte("x")}, time.Unix(1e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	c.Revision, c.Master, c.Keys[0].Kind, c.Keys[0].Label = 1, hexBytes{1}, "kind", "label"
	b, err := c.encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := decodeConfig(b)
	if err != nil || len(again.unknown) > 0 || len(again.Keys[0].unknown) > 0 {
		t.Fatalf("%v, %v, %v", again.unknown, again.Keys[0].unknown, err)
	}
	for _, golden := range []string{"v1/encrypted", "v1/plain", "v1-program/encrypted", "v1-program/plain"} {
		old, err := os.ReadFile("../test/reader/testdata/" + golden + "/config")
		if err != nil {
			t.Fatal(err)
		}
		c, err := decodeConfig(old)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := c.encode(); err != nil || !bytes.Equal(b, old) {
			t.Errorf("%s is written as %s, %v", golden, b, err)
		}
	}
}
