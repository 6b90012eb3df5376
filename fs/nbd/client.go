package nbd

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"
)

// ClientOptions say how to use a server.
type ClientOptions struct {
	Export string // overrides that of a URI; empty for the default export
	// TLS, when it is set, must be used; with a URI nbds:// it may be nil for
	// the system's certificates. Versions below 1.2 are never spoken.
	TLS *tls.Config
	// MetaContexts are asked for with the export; nil for base:allocation. Those
	// that the server does not have are left out: see Client.Contexts.
	MetaContexts []string
	// Connections is how many to use if the server allows several; 0 stands for 1.
	Connections int
	// Handshake is how long that of a connection may take, besides the context; 0 stands for 30 seconds. A server that
	// opens the export only then may be slow.
	Handshake time.Duration
}

// Client is an export of a server, as a disk. It is safe for concurrent use:
// requests of several goroutines are in flight together. When one of its
// connections ends, so does the Client: all that wait get an error, and so does all that comes
// later.
type Client struct {
	server   string
	export   string
	info     info
	secure   bool
	contexts []string
	links    []*link
	next     atomic.Uint32 // link
}

var _ WritableDisk = (*Client)(nil)

// handshakeTime is the default of ClientOptions.Handshake.
const handshakeTime = 30 * time.Second

// Dial connects to an export. The server is an NBD URI, unix:PATH or HOST[:PORT].
// Afterwards ctx plays no role.
func Dial(ctx context.Context, server string, o ClientOptions) (*Client, error) {
	t, err := parseTarget(server)
	if err != nil {
		return nil, err
	}
	if o.Export != "" {
		t.export = o.Export
	}
	if o.MetaContexts == nil {
		o.MetaContexts = []string{baseAllocation}
	}
	c := &Client{server: server, export: t.export}
	for i := 0; i == 0 || i < o.Connections && c.info.flags&CanMultiConn != 0; i++ {
		if err := c.connect(ctx, t, o); err != nil {
			c.Close()
			return nil, fmt.Errorf("nbd: %s: export %q: %w", server, t.export, err)
		}
	}
	return c, nil
}

// connect adds a connection.
func (c *Client) connect(ctx context.Context, t target, o ClientOptions) error {
	h, err := meet(ctx, t, o.Handshake, func(h *hello) error { return h.negotiate(o.MetaContexts, t.config(o.TLS)) })
	if err != nil {
		return err
	}
	if len(c.links) == 0 {
		c.info, c.secure = h.info, h.secure
		for _, name := range h.contexts {
			c.contexts = append(c.contexts, name)
		}
	} else if h.info.size != c.info.size || h.info.flags != c.info.flags {
		h.nc.Close()
		return errors.New("the export is another one on the next connection")
	}
	c.links = append(c.links, newLink(h))
	return nil
}

// meet connects to t and runs talk on the connection, within that time.
func meet(ctx context.Context, t target, within time.Duration, talk func(*hello) error) (*hello, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(within, handshakeTime))
	defer cancel()
	var d net.Dialer
	nc, err := d.DialContext(ctx, t.network, t.addr)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	h := &hello{nc: nc, br: bufio.NewReaderSize(nc, 32<<10), export: t.export}
	err = talk(h)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return h, nil
}

// ExportInfo is an export in a server's list.
type ExportInfo struct {
	Name, Description string
}

// List asks a server for its exports. Of the options it uses TLS and Handshake alone.
func List(ctx context.Context, server string, o ClientOptions) ([]ExportInfo, error) {
	t, err := parseTarget(server)
	if err != nil {
		return nil, err
	}
	var all []ExportInfo
	h, err := meet(ctx, t, o.Handshake, func(h *hello) error {
		if err := h.greet(); err != nil {
			return err
		}
		if !h.fixed {
			return errors.New("the server is too old to list its exports")
		}
		if err := h.startTLS(t.config(o.TLS)); err != nil {
			return err
		}
		return h.exports(func(name, description string) { all = append(all, ExportInfo{name, description}) })
	})
	if err != nil {
		return nil, fmt.Errorf("nbd: %s: listing exports: %w", server, err)
	}
	_ = h.send(optAbort, nil)
	return all, h.nc.Close()
}

// Size is the size of the export in bytes.
func (c *Client) Size() int64 { return c.info.size }

// Flags are what the server says of the export.
func (c *Client) Flags() Flags { return c.info.flags }

// Description is the server's, for people; it may be empty.
func (c *Client) Description() string { return c.info.description }

// Contexts are the metadata contexts that BlockStatus can be asked about.
func (c *Client) Contexts() []string { return c.contexts }

// Connections is how many are in use.
func (c *Client) Connections() int { return len(c.links) }

// Secure reports whether the connections are encrypted.
func (c *Client) Secure() bool { return c.secure }

// Close ends the connections. Requests in flight get an error.
func (c *Client) Close() error {
	for _, l := range c.links {
		l.close()
	}
	return nil
}

// link picks a connection.
func (c *Client) link() *link {
	if len(c.links) == 1 {
		return c.links[0]
	}
	return c.links[c.next.Add(1)%uint32(len(c.links))]
}

// do sends a request and waits for its reply.
func (c *Client) do(ctx context.Context, k *call, data []byte) error {
	err := c.link().do(ctx, k, data)
	if err == nil {
		return nil
	}
	for _, l := range c.links { // one for all: see Client
		if dead := l.dead(); dead != nil {
			for _, other := range c.links {
				other.kill(dead)
			}
			break
		}
	}
	return fmt.Errorf("nbd: %s: export %q: %s of %d bytes at %d: %w", c.server, c.export, commandNames[k.cmd], k.n, k.off, err)
}
