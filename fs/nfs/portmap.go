package nfs

var portmapProgram = program{id: progPortmap, version: versPortmap, procs: []procedure{
	{name: "PMAP NULL", serve: func(*request) {}},
	{name: "PMAP SET", serve: (*request).refuseMapping},
	{name: "PMAP UNSET", serve: (*request).refuseMapping},
	{name: "PMAP GETPORT", serve: (*request).getport},
	{name: "PMAP DUMP", serve: (*request).dumpPorts},
	{name: "PMAP CALLIT", serve: func(r *request) { r.silent = true }}, // what goes wrong there is not answered: RFC 1833 §3.2
}}

// Protocols of mappings, RFC 1833 §3.1.
const (
	protoTCP = 6
	protoUDP = 17
)

// A mapping says where a version of a program is served, RFC 1833 §3.1.
type mapping struct {
	prog, vers, proto, port uint32
}

// mappings are those of all listeners.
func (s *Server) mappings() []mapping {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []mapping
	for _, l := range s.listeners {
		for _, p := range l.programs {
			list = append(list, mapping{p.id, p.version, protoTCP, l.port()})
		}
		if l.udp == nil {
			continue
		}
		for _, p := range l.overUDP {
			list = append(list, mapping{p.id, p.version, protoUDP, l.port()})
		}
	}
	return list
}

// refuseMapping says false: other programs have no business here.
func (r *request) refuseMapping() {
	r.args.fixed(4 * 4)
	if !r.garbage() {
		r.w.boolean(false)
	}
}

func (r *request) getport() {
	want := mapping{prog: r.args.u32(), vers: r.args.u32(), proto: r.args.u32()}
	r.args.u32() // the port means nothing
	if r.garbage() {
		return
	}
	for _, m := range r.srv.mappings() {
		if m.prog == want.prog && m.vers == want.vers && m.proto == want.proto {
			r.w.u32(m.port)
			return
		}
	}
	r.w.u32(0)
}

func (r *request) dumpPorts() {
	for _, m := range r.srv.mappings() {
		r.w.boolean(true)
		r.w.u32(m.prog)
		r.w.u32(m.vers)
		r.w.u32(m.proto)
		r.w.u32(m.port)
	}
	r.w.boolean(false)
}
