package nbd

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
)

// Bounds on what a server may say in answer to one option.
const (
	maxOptionReply = 64 << 10 // bytes of one reply
	maxReplies     = 16 << 20 // bytes of all of them, with their headers
)

// A hello is the client's side of the handshake.
type hello struct {
	nc     net.Conn
	br     *bufio.Reader
	export string
	fixed  bool
	zeroes bool // 124 of them follow NBD_OPT_EXPORT_NAME

	// What has been agreed on.
	secure     bool
	structured bool
	contexts   map[uint32]string // id => metadata context
	info       info
}

// info is what a server says of an export.
type info struct {
	size                 int64
	flags                Flags
	description          string
	minimum, pref, large uint32 // block sizes, bytes
}

// errUnsupported is the answer to an option that the server does not know.
var errUnsupported = errors.New("the server does not support it")

// greet reads the server's greeting and answers it.
func (h *hello) greet() error {
	var p [18]byte
	if _, err := io.ReadFull(h.br, p[:16]); err != nil {
		return noEOF(err)
	}
	switch {
	case be.Uint64(p[:]) != magicGreeting:
		return errors.New("this is not an NBD server")
	case be.Uint64(p[8:]) == magicOldstyle:
		return errors.New("the server speaks oldstyle NBD, which is not supported")
	case be.Uint64(p[8:]) != magicOption:
		return errors.New("this is not an NBD server")
	}
	if _, err := io.ReadFull(h.br, p[16:]); err != nil {
		return noEOF(err)
	}
	flags := be.Uint16(p[16:])
	h.fixed, h.zeroes = flags&handFixedNewstyle != 0, flags&handNoZeroes == 0
	_, err := h.nc.Write(be.AppendUint32(nil, uint32(flags&(handFixedNewstyle|handNoZeroes))))
	return err
}

// negotiate goes from the greeting to transmission.
func (h *hello) negotiate(contexts []string, conf *tls.Config) error {
	if err := h.greet(); err != nil {
		return err
	}
	if !h.fixed {
		if conf != nil {
			return errors.New("the server is too old for TLS")
		}
		return h.exportName()
	}
	if err := h.startTLS(conf); err != nil {
		return err
	}
	if err := h.structuredReplies(); err != nil {
		return err
	}
	if h.structured && len(contexts) > 0 {
		if err := h.setContexts(contexts); err != nil {
			return err
		}
	}
	err := h.ask(optGo)
	if errors.Is(err, errUnsupported) {
		return h.exportName()
	}
	return err
}

func (h *hello) send(opt uint32, data []byte) error {
	p := be.AppendUint64(nil, magicOption)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, uint32(len(data)))
	_, err := h.nc.Write(append(p, data...))
	return err
}

// option sends an option and calls f with every reply to it but the last.
func (h *hello) option(opt uint32, data []byte, f func(typ uint32, data []byte) error) error {
	if err := h.send(opt, data); err != nil {
		return err
	}
	for total := 0; total < maxReplies; {
		typ, data, err := h.reply(opt)
		total += optionReplyLen + len(data)
		switch {
		case err != nil:
			return err
		case typ == repAck:
			return nil
		case typ == repErrUnsup:
			return errUnsupported
		case typ&repError != 0:
			return optionError(typ, data)
		}
		if err := f(typ, data); err != nil {
			return err
		}
	}
	return fmt.Errorf("more than %d bytes of replies to option %d", maxReplies, opt)
}

// reply reads one reply to opt.
func (h *hello) reply(opt uint32) (typ uint32, data []byte, err error) {
	var p [optionReplyLen]byte
	if _, err := io.ReadFull(h.br, p[:]); err != nil {
		return 0, nil, noEOF(err)
	}
	n := be.Uint32(p[16:])
	switch {
	case be.Uint64(p[:]) != magicOptionReply:
		return 0, nil, errors.New("option reply without its magic number")
	case be.Uint32(p[8:]) != opt:
		return 0, nil, fmt.Errorf("a reply to option %d instead of %d", be.Uint32(p[8:]), opt)
	case n > maxOptionReply:
		return 0, nil, fmt.Errorf("an option reply of %d bytes", n)
	}
	data = make([]byte, n)
	_, err = io.ReadFull(h.br, data)
	return be.Uint32(p[12:]), data, noEOF(err)
}

func optionError(typ uint32, message []byte) error {
	var what string
	switch typ {
	case repErrPolicy:
		what = "the server's policy forbids it"
	case repErrInvalid:
		what = "the server finds the request invalid"
	case repErrTLSReqd:
		what = "the server wants TLS"
	case repErrUnknown:
		what = "there is no such export"
	default:
		what = fmt.Sprintf("the server answers with error %d", typ&^repError)
	}
	if len(message) == 0 {
		return errors.New(what)
	}
	return fmt.Errorf("%s: %q", what, message[:min(len(message), 256)])
}

func unexpected(typ uint32, data []byte) error {
	return fmt.Errorf("unexpected option reply of type %d with %d bytes", typ, len(data))
}

// startTLS goes on over TLS, if there is a configuration for it.
func (h *hello) startTLS(conf *tls.Config) error {
	if conf == nil {
		return nil
	}
	if err := h.option(optStartTLS, nil, unexpected); err != nil {
		return fmt.Errorf("starting TLS: %w", err)
	}
	if h.br.Buffered() > 0 {
		return errors.New("data between the start of TLS and TLS") // would be taken for encrypted
	}
	t := tls.Client(h.nc, conf)
	if err := t.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.nc, h.secure = t, true
	h.br.Reset(t)
	return nil
}

func (h *hello) structuredReplies() error {
	err := h.option(optStructuredReply, nil, unexpected)
	if errors.Is(err, errUnsupported) {
		return nil
	}
	h.structured = err == nil
	return err
}

// setContexts selects metadata contexts; those that the server does not have are left out.
func (h *hello) setContexts(contexts []string) error {
	p := appendString(nil, h.export)
	p = be.AppendUint32(p, uint32(len(contexts)))
	for _, s := range contexts {
		p = appendString(p, s)
	}
	h.contexts = make(map[uint32]string)
	err := h.option(optSetMetaContext, p, func(typ uint32, data []byte) error {
		if typ != repMetaContext || len(data) < 5 {
			return unexpected(typ, data)
		}
		if len(h.contexts) == len(contexts) {
			return errors.New("more metadata contexts than were asked for")
		}
		name := string(data[4:])
		if !slices.Contains(contexts, name) {
			return fmt.Errorf("metadata context %.100q, which was not asked for", name)
		}
		h.contexts[be.Uint32(data)] = name
		return nil
	})
	if errors.Is(err, errUnsupported) {
		h.contexts = nil
		return nil
	}
	return err
}

// ask asks about the export (NBD_OPT_INFO) or for it (NBD_OPT_GO).
func (h *hello) ask(opt uint32) error {
	p := appendString(nil, h.export)
	p = be.AppendUint16(p, 2)
	p = be.AppendUint16(p, infoBlockSize)
	p = be.AppendUint16(p, infoDescription)
	told := false
	err := h.option(opt, p, func(typ uint32, data []byte) error {
		if typ != repInfo || len(data) < 2 {
			return unexpected(typ, data)
		}
		told = told || be.Uint16(data) == infoExport
		return h.info.set(be.Uint16(data), data[2:])
	})
	if err == nil && !told {
		return errors.New("the server did not tell the size")
	}
	return err
}

// set takes one piece of information.
func (i *info) set(kind uint16, p []byte) error {
	switch kind {
	case infoExport:
		if len(p) != 10 {
			return fmt.Errorf("information about the export of %d bytes", len(p))
		}
		return i.setExport(p)
	case infoDescription:
		i.description = strings.ToValidUTF8(string(p), "\uFFFD")
	case infoBlockSize:
		if len(p) != 12 {
			return fmt.Errorf("information about block sizes of %d bytes", len(p))
		}
		i.minimum, i.pref, i.large = be.Uint32(p), be.Uint32(p[4:]), be.Uint32(p[8:])
		// proto, "Size constraints"
		if i.minimum == 0 || i.minimum&(i.minimum-1) != 0 || i.minimum > 1<<16 || i.large < i.minimum {
			return fmt.Errorf("block sizes of %d to %d bytes", i.minimum, i.large)
		}
	}
	return nil
}

func (i *info) setExport(p []byte) error {
	size := be.Uint64(p)
	if size > 1<<63-1 {
		return fmt.Errorf("an export of %d bytes", size)
	}
	i.size, i.flags = int64(size), Flags(be.Uint16(p[8:]))
	return nil
}

// exportName asks for the export in the old way.
func (h *hello) exportName() error {
	if err := h.send(optExportName, []byte(h.export)); err != nil {
		return err
	}
	n := 10
	if h.zeroes {
		n += 124
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(h.br, p); err != nil {
		return fmt.Errorf("the server hangs up, perhaps it has no such export: %w", noEOF(err))
	}
	return h.info.setExport(p)
}

// exports lists the server's exports.
func (h *hello) exports(each func(name, description string)) error {
	return h.option(optList, nil, func(typ uint32, data []byte) error {
		name, rest, ok := cutString(data)
		if typ != repServer || !ok {
			return unexpected(typ, data)
		}
		each(name, strings.ToValidUTF8(string(rest), "\uFFFD"))
		return nil
	})
}

func appendString(p []byte, s string) []byte {
	return append(be.AppendUint32(p, uint32(len(s))), s...)
}

// noEOF: an end where more was promised is not a good one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
