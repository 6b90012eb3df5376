package vspheretest

import (
	"crypto/subtle"
	"net/http"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// vmObject is what a session sees of a VM: the simulator's, with methods of ours before those.
//
// A wrapper is planted in the registry of the session, where vcsim looks for the object of a call; in the registry of the server,
// where vcsim asserts the concrete type, the object stays as it is. No wrapper may be a mo.Entity: planting one would write to
// the object under it. That is what the methods Entity are for, which have another signature.
type vmObject struct {
	*simulator.VirtualMachine
	vm *VM
}

// Entity hides that of the embedded object.
func (*vmObject) Entity() {}

type snapshotObject struct {
	*simulator.VirtualMachineSnapshot
	s *Server
}

// Entity hides that of the embedded object.
func (*snapshotObject) Entity() {}

type folderObject struct {
	*simulator.Folder
	s *Server
}

// Entity hides that of the embedded object.
func (*folderObject) Entity() {}

// dispatch is called before each call. It never gives another object: for sessions vcsim ignores that.
func (s *Server) dispatch(ctx *simulator.Context, m *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	if !s.up.Load() {
		return nil, nil
	}
	s.count(func(c *counters) { c.calls[m.Name]++ })
	notAuthenticated := &types.NotAuthenticated{NoPermission: types.NoPermission{Object: &m.This, PrivilegeId: "System.View"}}
	anonymous := map[string]bool{"Login": true, "RetrieveServiceContent": true, "RetrieveInternalContent": true}[m.Name]
	if ctx.Session != nil && s.forgotten(ctx, m.Name) && !anonymous {
		return nil, notAuthenticated
	}
	if ctx.Session == nil {
		if anonymous {
			return nil, nil
		}
		return nil, notAuthenticated
	}
	if fault := s.denies(m); fault != nil {
		return nil, fault
	}
	s.mu.Lock()
	delay, onCall, onAny, fault := s.faults.MethodDelay[m.Name], s.hooks.OnCall, s.hooks.OnAny, next(s.faults.Calls, m.Name)
	s.mu.Unlock()
	if onAny != nil {
		onAny(m.Name)
	}
	if fault != nil {
		return nil, fault
	}
	s.sleep(delay)
	if onCall != nil {
		if vm := s.vm(m.This); vm != nil {
			onCall(m.Name, vm)
		}
	}
	if ref := s.hidden(m); ref != nil {
		return nil, &types.NoPermission{Object: ref, PrivilegeId: "System.Read"}
	}
	s.plant(ctx.Session.Registry, m.This)
	return nil, nil
}

// hidden finds an object that a call asks for by itself, and that is hidden.
func (s *Server) hidden(m *simulator.Method) *types.ManagedObjectReference {
	var specs []types.PropertyFilterSpec
	switch req := m.Body.(type) {
	case *types.RetrieveProperties:
		specs = req.SpecSet
	case *types.RetrievePropertiesEx:
		specs = req.SpecSet
	}
	for _, spec := range specs {
		for _, o := range spec.ObjectSet {
			if s.lies(func(f *Faults) bool { return f.Hidden[o.Obj.Value] }) {
				return &o.Obj
			}
		}
	}
	return nil
}

// plant puts a wrapper where the session looks first.
func (s *Server) plant(session *simulator.Registry, ref types.ManagedObjectReference) {
	if session.Get(ref) != nil {
		return
	}
	w := s.wrap(s.model.Map().Get(ref))
	if w == nil {
		return
	}
	s.mu.Lock()
	s.planted[ref] = append(s.planted[ref], session)
	s.mu.Unlock()
	session.Put(w)
}

func (s *Server) wrap(obj mo.Reference) mo.Reference {
	switch obj := obj.(type) {
	case *simulator.VirtualMachine:
		if vm := s.vm(obj.Self); vm != nil {
			return &vmObject{obj, vm}
		}
	case *simulator.VirtualMachineSnapshot:
		return &snapshotObject{obj, s}
	case *simulator.Folder:
		return &folderObject{obj, s}
	case *simulator.ResourcePool:
		return &poolObject{obj, s}
	case *simulator.HostDatastoreSystem:
		return &storageObject{obj, s}
	case *simulator.AuthorizationManager:
		return &authorizationObject{obj, s}
	}
	return nil
}

// watcher learns of changes in the registry: vcsim tells it.
type watcher struct {
	s    *Server
	self types.ManagedObjectReference
}

// Reference implements mo.Reference.
func (w *watcher) Reference() types.ManagedObjectReference { return w.self }

// PutObject implements simulator.RegisterObject.
func (w *watcher) PutObject(*simulator.Context, mo.Reference) {}

// UpdateObject implements simulator.RegisterObject. It keeps the power state, for /folder to know what is locked.
func (w *watcher) UpdateObject(_ *simulator.Context, obj mo.Reference, changes []types.PropertyChange) {
	for _, c := range changes {
		if c.Name != "runtime.powerState" {
			continue
		}
		if vm := w.s.vm(obj.Reference()); vm != nil {
			state, _ := c.Val.(types.VirtualMachinePowerState)
			vm.powered(state == types.VirtualMachinePowerStatePoweredOn)
		}
	}
}

// RemoveObject implements simulator.RegisterObject: the wrappers go with the object.
func (w *watcher) RemoveObject(ctx *simulator.Context, ref types.ManagedObjectReference) {
	w.s.mu.Lock()
	sessions := w.s.planted[ref]
	delete(w.s.planted, ref)
	w.s.mu.Unlock()
	for _, session := range sessions {
		session.Remove(ctx, ref)
	}
}

func (s *Server) validLogin(req *types.Login) bool {
	if !s.validPassword(req.UserName, req.Password) {
		return false
	}
	s.count(func(c *counters) { c.logins++ })
	return true
}

func (s *Server) validPassword(user, password string) bool {
	return user == s.User && subtle.ConstantTimeCompare([]byte(password), []byte(s.Password)) == 1
}

// sessions are the keys of those that are open.
func (s *Server) sessions() []string {
	ctx := s.context()
	sm, ok := ctx.Session.Get(s.model.Map().SessionManager().Self).(*simulator.SessionManager)
	if !ok {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []string
	for _, u := range sm.SessionList {
		if !s.lost[u.Key] {
			keys = append(keys, u.Key)
		}
	}
	return keys
}

// LoseSessions forgets all sessions, as a vCenter does that was restarted or that waited too long.
func (s *Server) LoseSessions() {
	keys := s.sessions()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range keys {
		s.lost[key] = true
	}
}

// maybeLose forgets the sessions when the faults say so.
func (s *Server) maybeLose() {
	s.mu.Lock()
	lose := take(&s.faults.LoseSessions)
	s.mu.Unlock()
	if lose {
		s.LoseSessions()
	}
}

// forgotten ends the session of a call if it was lost.
func (s *Server) forgotten(ctx *simulator.Context, method string) bool {
	if method != "Login" && method != "Logout" {
		s.maybeLose()
	}
	s.mu.Lock()
	lost := s.lost[ctx.Session.Key]
	s.mu.Unlock()
	if lost {
		ctx.Map.SessionManager().Logout(ctx, &types.Logout{})
		ctx.Session = nil // a Login is refused within a session
	}
	return lost
}

// authenticated says whether a request without SOAP may be answered: it has the cookie of a session, or user and password.
func (s *Server) authenticated(r *http.Request) bool {
	if user, password, ok := r.BasicAuth(); ok {
		return s.validPassword(user, password)
	}
	s.maybeLose()
	cookie, err := r.Cookie(soap.SessionCookieName)
	if err != nil {
		return false
	}
	for _, key := range s.sessions() {
		if key == cookie.Value {
			return true
		}
	}
	return false
}
