package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net"
	"time"

	"github.com/holdfast-backup/holdfast/fs/boot"
)

// AgentSocket is where QEMU's guest agent can be asked.
const AgentSocket = "agent.sock"

var _ boot.Pinger = (*guest)(nil)

// Ping asks the guest agent for a number: qemu-ga-ref(7), guest-sync. One that is there answers at once.
func (g *guest) Ping(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", g.agent)
	if err != nil {
		return err
	}
	defer conn.Close()
	limit, ok := ctx.Deadline()
	if !ok {
		limit = time.Now().Add(5 * time.Second)
	}
	conn.SetDeadline(limit)
	want := rand.Int64N(1 << 52)
	if err := json.NewEncoder(conn).Encode(object{"execute": "guest-sync", "arguments": object{"id": want}}); err != nil {
		return err
	}
	for in := json.NewDecoder(conn); ; {
		var got struct {
			Return json.Number `json:"return"`
		}
		if err := in.Decode(&got); err != nil {
			return errors.Join(errors.New("no answer of the guest agent"), err)
		}
		if n, err := got.Return.Int64(); err == nil && n == want { // others are answers to who asked before
			return nil
		}
	}
}
