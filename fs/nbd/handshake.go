package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// maxOption bounds an option's data, bytes; the rest is skipped and refused. A longer one
// than maxSkipped ends the connection.
const (
	maxOption  = 64 << 10
	maxSkipped = 16 << 20
)

// errGone says that a client has left in good order.
var errGone = errors.New("nbd: client is gone")

// handshake lets the client choose an export. Afterwards the connection is in transmission.
func (c *conn) handshake() error {
	hello := be.AppendUint64(nil, magicGreeting)
	hello = be.AppendUint64(hello, magicOption)
	hello = be.AppendUint16(hello, handFixedNewstyle|handNoZeroes)
	if _, err := c.nc.Write(hello); err != nil {
		return err
	}
	var p [4]byte
	if _, err := io.ReadFull(c.br, p[:]); err != nil {
		return err
	}
	flags := be.Uint32(p[:])
	if flags&^(handFixedNewstyle|handNoZeroes) != 0 {
		return fmt.Errorf("unknown client flags %#x", flags)
	}
	c.fixed, c.noZeroes = flags&handFixedNewstyle != 0, flags&handNoZeroes != 0
	for c.export == nil {
		if err := c.option(); err != nil {
			return err
		}
	}
	return nil
}

// option answers one option.
func (c *conn) option() error {
	var p [optionLen]byte
	if _, err := io.ReadFull(c.br, p[:]); err != nil {
		return err
	}
	opt, n := be.Uint32(p[8:]), be.Uint32(p[12:])
	if be.Uint64(p[:]) != magicOption {
		return errors.New("option without its magic number")
	}
	if n > maxOption {
		return c.skipOption(opt, n)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.br, data); err != nil {
		return err
	}
	if opt == optExportName {
		return c.optExportName(string(data))
	}
	out := optionReply{opt: opt}
	err := c.reply(&out, data)
	if _, e := c.nc.Write(out.mem); e != nil {
		return e
	}
	if err == nil && opt == optStartTLS && out.last == repAck {
		return c.startTLS()
	}
	return err
}

func (c *conn) skipOption(opt, n uint32) error {
	if n > maxSkipped || opt == optExportName {
		return fmt.Errorf("option %d of %d bytes", opt, n)
	}
	if _, err := io.CopyN(io.Discard, c.br, int64(n)); err != nil {
		return err
	}
	out := optionReply{opt: opt}
	out.fail(repErrTooBig, "option is too long")
	_, err := c.nc.Write(out.mem)
	return err
}

// reply puts the reply to an option into out. An error ends the connection after it.
func (c *conn) reply(out *optionReply, data []byte) error {
	early := out.opt == optStartTLS || out.opt == optAbort // proto, "FORCEDTLS mode"
	if c.srv.RequireTLS && !c.secure && !early {
		out.fail(repErrTLSReqd, "this server wants TLS")
		return nil
	}
	switch out.opt {
	case optAbort:
		out.add(repAck, nil)
		return errGone
	case optList:
		c.optList(out, data)
	case optStartTLS:
		c.optStartTLS(out, data)
	case optInfo, optGo:
		c.optInfo(out, data)
	case optStructuredReply:
		c.optStructuredReply(out, data)
	case optListMetaContext, optSetMetaContext:
		c.optMetaContext(out, data)
	default:
		out.fail(repErrUnsup, "unknown option")
	}
	return nil
}

// optionReply collects the replies to an option.
type optionReply struct {
	opt  uint32
	mem  []byte
	last uint32 // type of the last reply
}

func (o *optionReply) add(typ uint32, data []byte) {
	o.mem = be.AppendUint64(o.mem, magicOptionReply)
	o.mem = be.AppendUint32(o.mem, o.opt)
	o.mem = be.AppendUint32(o.mem, typ)
	o.mem = be.AppendUint32(o.mem, uint32(len(data)))
	o.mem = append(o.mem, data...)
	o.last = typ
}

func (o *optionReply) fail(typ uint32, message string) { o.add(typ, []byte(message)) }

func (o *optionReply) info(kind uint16, data []byte) {
	o.add(repInfo, append(be.AppendUint16(nil, kind), data...))
}

// optExportName has no way to refuse but to end the connection (proto, NBD_OPT_EXPORT_NAME).
func (c *conn) optExportName(name string) error {
	if c.srv.RequireTLS && !c.secure {
		return errors.New("export asked for without TLS")
	}
	e := c.srv.export(name)
	if e == nil {
		return fmt.Errorf("no export %.200q", name)
	}
	c.choose(e, name)
	p := be.AppendUint64(nil, uint64(c.size))
	p = be.AppendUint16(p, uint16(c.flags()))
	if !c.noZeroes {
		p = append(p, make([]byte, 124)...)
	}
	_, err := c.nc.Write(p)
	return err
}

func (c *conn) optList(out *optionReply, data []byte) {
	if len(data) != 0 {
		out.fail(repErrInvalid, "a list takes no data")
		return
	}
	for _, e := range c.srv.Exports {
		p := be.AppendUint32(nil, uint32(len(e.Name)))
		p = append(p, e.Name...)
		out.add(repServer, append(p, e.Description...))
	}
	out.add(repAck, nil)
}

func (c *conn) optStartTLS(out *optionReply, data []byte) {
	switch {
	case len(data) != 0:
		out.fail(repErrInvalid, "starting TLS takes no data")
	case c.secure:
		out.fail(repErrInvalid, "TLS has been started")
	case c.srv.TLS == nil || !c.fixed: // the latter: proto, "Server-side requirements"
		out.fail(repErrPolicy, "this server has no TLS")
	default:
		out.add(repAck, nil)
	}
}

// startTLS goes on over TLS, and forgets what was said before it.
func (c *conn) startTLS() error {
	if c.br.Buffered() > 0 {
		return errors.New("data between the start of TLS and TLS") // would be taken for encrypted
	}
	t := tls.Server(c.raw, c.srv.TLS)
	if err := t.Handshake(); err != nil {
		return err
	}
	c.nc, c.secure = t, true
	c.br.Reset(t)
	c.structured, c.statusOf = false, nil
	return nil
}

func (c *conn) optStructuredReply(out *optionReply, data []byte) {
	if len(data) != 0 {
		out.fail(repErrInvalid, "structured replies take no data")
		return
	}
	c.structured = true
	out.add(repAck, nil)
}

// optInfo answers NBD_OPT_INFO and NBD_OPT_GO.
func (c *conn) optInfo(out *optionReply, data []byte) {
	name, data, ok := cutString(data)
	if !ok || len(data) < 2 || len(data) != 2+2*int(be.Uint16(data)) {
		out.fail(repErrInvalid, "malformed request")
		return
	}
	e := c.srv.export(name)
	if e == nil {
		out.fail(repErrUnknown, "no such export")
		return
	}
	c.choose(e, name)
	if out.opt == optInfo {
		defer func() { c.export = nil }()
	}
	out.info(infoExport, be.AppendUint16(be.AppendUint64(nil, uint64(c.size)), uint16(c.flags())))
	for kinds := data[2:]; len(kinds) > 0; kinds = kinds[2:] {
		switch be.Uint16(kinds) {
		case infoName:
			out.info(infoName, []byte(e.Name))
		case infoDescription:
			out.info(infoDescription, []byte(e.Description))
		case infoBlockSize:
			p := be.AppendUint32(nil, 1)
			p = be.AppendUint32(p, 64<<10)
			out.info(infoBlockSize, be.AppendUint32(p, maxPayload))
		}
	}
	out.add(repAck, nil)
}

// choose takes e, which the client called name, as the export of the connection.
func (c *conn) choose(e *Export, name string) {
	c.export, c.disk, c.size = e, e.Disk, e.Disk.Size()
	c.writable, c.prefetch = nil, nil
	if e.Writable {
		c.writable = e.Disk.(WritableDisk)
	}
	c.prefetch, _ = e.Disk.(prefetcher)
	c.status = c.structured && c.statusOf != nil && *c.statusOf == name
}

func (c *conn) flags() Flags {
	f := HasFlags | SendFlush | SendFUA | CanMultiConn
	if c.writable == nil {
		f |= ReadOnly
	} else {
		f |= SendTrim | SendWriteZeroes
	}
	if c.structured {
		f |= SendDF
	}
	if c.prefetch != nil {
		f |= SendCache
	}
	return f
}

// optMetaContext lists the metadata contexts, of which there is one, or selects from them.
func (c *conn) optMetaContext(out *optionReply, data []byte) {
	set := out.opt == optSetMetaContext
	if set {
		c.statusOf = nil // replaced even by a request that fails (proto, NBD_OPT_SET_META_CONTEXT)
	}
	name, queries, ok := metaQueries(data)
	switch {
	case !ok || !c.structured:
		out.fail(repErrInvalid, "malformed request, or no structured replies")
		return
	case c.srv.export(name) == nil:
		out.fail(repErrUnknown, "no such export")
		return
	}
	found := !set && len(queries) == 0
	for _, q := range queries {
		if !strings.Contains(q, ":") {
			out.fail(repErrInvalid, "metadata context without a namespace")
			return
		}
		found = found || q == baseAllocation || !set && q == "base:"
	}
	if found {
		id := uint32(0) // in a list: proto, NBD_OPT_LIST_META_CONTEXT
		if set {
			id, c.statusOf = allocationID, &name
		}
		out.add(repMetaContext, append(be.AppendUint32(nil, id), baseAllocation...))
	}
	out.add(repAck, nil)
}

// allocationID stands for base:allocation in replies.
const allocationID = 1

// metaQueries splits a request for metadata contexts.
func metaQueries(p []byte) (name string, queries []string, ok bool) {
	name, p, ok = cutString(p)
	if !ok || len(p) < 4 {
		return "", nil, false
	}
	n := be.Uint32(p)
	p = p[4:]
	for ; n > 0; n-- {
		var q string
		if q, p, ok = cutString(p); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(p) == 0
}

// cutString takes a string with its length in front off p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 || uint64(be.Uint32(p)) > uint64(len(p)-4) || be.Uint32(p) > maxString {
		return "", nil, false
	}
	n := be.Uint32(p)
	return string(p[4 : 4+n]), p[4+n:], true
}

// quiet reports whether err says no more than that the client went away.
func quiet(err error) bool {
	return errors.Is(err, errGone) || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || isReset(err)
}

// withTimeout runs the handshake within its time.
func (c *conn) withTimeout(d time.Duration) error {
	if err := c.raw.SetDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	c.rearm()
	if err := c.handshake(); err != nil {
		return err
	}
	err := c.raw.SetDeadline(time.Time{})
	c.rearm()
	return err
}
