package nfs

import "errors"

// RFC 5531 §9.
const (
	rpcVersion = 2

	msgCall  = 0
	msgReply = 1

	msgAccepted = 0
	msgDenied   = 1

	rpcMismatch = 0 // reject_stat
	authError   = 1
)

// An acceptStat is how an accepted call went.
type acceptStat uint32

const (
	acceptSuccess      acceptStat = 0
	acceptProgUnavail  acceptStat = 1
	acceptProgMismatch acceptStat = 2
	acceptProcUnavail  acceptStat = 3
	acceptGarbageArgs  acceptStat = 4
	acceptSystemErr    acceptStat = 5
)

// An authStat says why a caller is not believed.
type authStat uint32

const (
	authOK      authStat = 0
	authBadCred authStat = 1
	authBadVerf authStat = 3
)

// Flavors of authentication, RFC 5531 §8.2.
const (
	flavorNone = 0
	flavorSys  = 1
)

// Programs and the one version of each that is served.
const (
	progPortmap = 100000 // RFC 1833 §3
	progNFS     = 100003 // RFC 1813 §2
	progMount   = 100005 // RFC 1813 §5

	versPortmap = 2
	versNFS     = 3
	versMount   = 3
)

// Bounds of RFC 5531 §8.2 and its appendix A.
const (
	maxAuth        = 400 // bytes of a credential or verifier
	maxMachineName = 255
	maxGroups      = 16
)

// maxHeader is the longest start of a call, bytes: six words, credential and verifier.
const maxHeader = 6*4 + 2*(2*4+maxAuth)

// A cred is who a call comes from, as it says itself.
type cred struct {
	known    bool // AUTH_SYS; else there is nothing more
	uid, gid uint32
	n        int // of groups
	groups   [maxGroups]uint32
}

// A call is the start of a call message.
type call struct {
	xid, rpcVers, prog, vers, proc uint32

	auth  authStat // what is wrong with the credential
	short bool     // the message ends before its arguments
	cred  cred
}

var errNoCall = errors.New("a record that is no RPC call")

// parseCall takes the start of a message apart, and gives what comes after it.
// An error is for what cannot be answered.
func parseCall(c *call, p []byte) ([]byte, error) {
	d := decoder{p: p}
	*c = call{xid: d.u32()}
	if d.u32() != msgCall || d.bad {
		return nil, errNoCall
	}
	c.rpcVers, c.prog, c.vers, c.proc = d.u32(), d.u32(), d.u32(), d.u32()
	flavor, size := d.u32(), d.u32()
	if !d.bad && size > maxAuth {
		c.auth = authBadCred
		return nil, nil
	}
	body := d.fixed(int(size))
	verfFlavor, verfSize := d.u32(), d.u32()
	if !d.bad && verfSize > maxAuth {
		c.auth = authBadVerf
		return nil, nil
	}
	d.fixed(int(verfSize))
	c.short = d.bad
	if c.short {
		return nil, nil
	}
	switch flavor {
	case flavorNone:
	case flavorSys:
		if !c.cred.parse(body) {
			c.auth = authBadCred
		} else if verfFlavor != flavorNone || verfSize != 0 { // RFC 5531 appendix A
			c.auth = authBadVerf
		}
	default:
		c.auth = authBadCred
	}
	return d.p, nil
}

// parse reads the body of an AUTH_SYS credential (RFC 5531 appendix A).
func (c *cred) parse(body []byte) bool {
	d := decoder{p: body}
	d.u32() // stamp
	d.opaque(maxMachineName)
	c.uid, c.gid = d.u32(), d.u32()
	n := d.u32()
	if n > maxGroups {
		return false
	}
	c.n = int(n)
	for i := range c.n {
		c.groups[i] = d.u32()
	}
	c.known = !d.bad
	return c.known
}

// accepted starts the reply to a call that was accepted.
func (w *encoder) accepted(xid uint32, how acceptStat) {
	w.u32(xid)
	w.u32(msgReply)
	w.u32(msgAccepted)
	w.u32(flavorNone)
	w.u32(0)
	w.u32(uint32(how))
}

// progMismatch is the reply to a call of a version that is not served.
func (w *encoder) progMismatch(xid, low, high uint32) {
	w.accepted(xid, acceptProgMismatch)
	w.u32(low)
	w.u32(high)
}

// rpcMismatch is the reply to another version of RPC.
func (w *encoder) rpcMismatch(xid uint32) {
	w.u32(xid)
	w.u32(msgReply)
	w.u32(msgDenied)
	w.u32(rpcMismatch)
	w.u32(rpcVersion)
	w.u32(rpcVersion)
}

// authError is the reply to a caller that is not believed.
func (w *encoder) authError(xid uint32, why authStat) {
	w.u32(xid)
	w.u32(msgReply)
	w.u32(msgDenied)
	w.u32(authError)
	w.u32(uint32(why))
}
