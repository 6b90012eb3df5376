package main

import (
	"context"
	"fmt"
	"net"

	"github.com/holdfast-backup/holdfast/backup"
	"github.com/holdfast-backup/holdfast/store"
	"github.com/holdfast-backup/holdfast/store/remote/agent"
)

func checkServe(c *call) error {
	addr := c.String("listen")
	if addr == "" {
		return usagef("serve: where? --listen is missing")
	}
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
		return withHint(usagef("serve: --listen: %q is no address", addr), "write --listen HOST:PORT, or :PORT for all addresses of this host")
	}
	return nil
}

// runServe lets helpers on other hosts add points until SIGINT or SIGTERM.
func runServe(ctx context.Context, c *call) error {
	return c.withRepo(ctx, func(r *store.Repo) error {
		lock := c.cfg.backup.lockFor
		opt := agent.ServerOptions{
			Note: func(text string) { c.progress.note("%s", text) },
			Warn: func(text string) { c.progress.warn("%s", text) },
			Now:  c.clock.now,
		}
		if !lock.IsZero() {
			opt.Lock = func(ctx context.Context, p *store.Point) error { return backup.Lock(ctx, r, p, lock, c.clock.now()) }
		}
		srv, err := agent.NewServer(r, opt)
		if err != nil {
			return err
		}
		defer srv.Close()
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", c.String("listen"))
		if err != nil {
			return fmt.Errorf("serve: %w", err)
		}
		defer ln.Close()
		tokens, err := r.Agents(ctx)
		if err != nil {
			return err
		}
		if len(tokens) == 0 {
			c.progress.note("the repository has no token yet: 'holdfast agent-token add' makes one, also while this runs")
		}
		c.out.line("listening on %s", ln.Addr())
		err = c.out.object(struct {
			Type    string `json:"type"`
			Address string `json:"address"`
		}{"serve", ln.Addr().String()})
		if err == nil {
			err = c.out.flush()
		}
		if err != nil {
			return err
		}
		defer context.AfterFunc(ctx, func() { srv.Close() })()
		return srv.Serve(ln)
	})
}
