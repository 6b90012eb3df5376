package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// All integers are big-endian (proto, "Conventions").
var be = binary.BigEndian

// Magic numbers (proto, "Handshake" and "Transmission").
const (
	magicGreeting    = 0x4e42444d41474943 // NBDMAGIC
	magicOption      = 0x49484156454f5054 // IHAVEOPT
	magicOldstyle    = 0x00420281861253
	magicOptionReply = 0x3e889045565a9
	magicRequest     = 0x25609513
	magicSimple      = 0x67446698
	magicStructured  = 0x668e33ef
)

// Handshake flags, the same bits from server and client.
const (
	handFixedNewstyle = 1 << 0
	handNoZeroes      = 1 << 1
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Option replies.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repError      = 1 << 31 // set in every error
	repErrUnsup   = repError + 1
	repErrPolicy  = repError + 2
	repErrInvalid = repError + 3
	repErrTLSReqd = repError + 5
	repErrUnknown = repError + 6
	repErrTooBig  = repError + 9
)

// Information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// commandNames maps a command to its name in messages.
var commandNames = [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "zero", "block status"}

// Command flags.
const (
	flagFUA      = 1 << 0
	flagNoHole   = 1 << 1
	flagDF       = 1 << 2
	flagReqOne   = 1 << 3
	flagFastZero = 1 << 4
)

// Structured replies.
const (
	chunkDone = 1 << 0 // flag

	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkBlockStatus = 5
	chunkErrorBit    = 1 << 15 // set in every error
	chunkError       = chunkErrorBit + 1
	chunkErrorOffset = chunkErrorBit + 2
)

// Lengths in bytes.
const (
	requestLen     = 28
	simpleLen      = 16
	structuredLen  = 20
	dataHeaderLen  = structuredLen + 8
	holeChunkLen   = structuredLen + 12
	optionLen      = 16
	optionReplyLen = 20

	maxString  = 4096    // of a name or message (proto, "Conventions")
	maxPayload = 1 << 25 // of a request: what any server should take (proto, "Size constraints")
	maxExtents = 1 << 20 // in a block status reply (proto, NBD_REPLY_TYPE_BLOCK_STATUS)
)

// baseAllocation is the one metadata context that the protocol itself defines.
const baseAllocation = "base:allocation"

// Flags of base:allocation.
const (
	StateHole = 1 << 0 // nothing is allocated there
	StateZero = 1 << 1 // reads as zeros
)

// Flags say what a server can do with an export (proto, "Transmission flags").
type Flags uint16

const (
	HasFlags        Flags = 1 << 0
	ReadOnly        Flags = 1 << 1
	SendFlush       Flags = 1 << 2
	SendFUA         Flags = 1 << 3
	Rotational      Flags = 1 << 4
	SendTrim        Flags = 1 << 5
	SendWriteZeroes Flags = 1 << 6
	SendDF          Flags = 1 << 7
	CanMultiConn    Flags = 1 << 8
	SendCache       Flags = 1 << 10
	SendFastZero    Flags = 1 << 11
)

// Errno is an error as the protocol carries it (proto, "Error values").
type Errno uint32

const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "operation not permitted"
	case EIO:
		return "input/output error"
	case ENOMEM:
		return "cannot allocate memory"
	case EINVAL:
		return "invalid argument"
	case ENOSPC:
		return "no space left on device"
	case EOVERFLOW:
		return "value too large"
	case ENOTSUP:
		return "operation not supported"
	case ESHUTDOWN:
		return "server is shutting down"
	}
	return fmt.Sprintf("error %d", uint32(e))
}

// errnoOf is what a client is told about an error of a Disk.
func errnoOf(err error) Errno {
	var e Errno
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return ENOSPC
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EROFS):
		return EPERM
	case errors.Is(err, syscall.ENOMEM):
		return ENOMEM
	}
	return EIO
}

// putSimple writes the header of a simple reply.
func putSimple(p []byte, cookie uint64, e Errno) {
	be.PutUint32(p, magicSimple)
	be.PutUint32(p[4:], uint32(e))
	be.PutUint64(p[8:], cookie)
}

// putChunk writes the header of a structured reply chunk with n bytes of payload.
func putChunk(p []byte, flags, typ uint16, cookie uint64, n uint32) {
	be.PutUint32(p, magicStructured)
	be.PutUint16(p[4:], flags)
	be.PutUint16(p[6:], typ)
	be.PutUint64(p[8:], cookie)
	be.PutUint32(p[16:], n)
}
