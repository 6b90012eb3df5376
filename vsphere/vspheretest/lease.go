package vspheretest

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// lease is an HttpNfcLease: files of a VM behind addresses that cannot be guessed.
type lease struct {
	mo.HttpNfcLease // first: vcsim finds the properties there

	s     *Server
	vm    *VM
	token string
	files map[string]*leaseFile // name => file
	close func(ok bool)         // when the lease ends

	mu    sync.Mutex // guards following
	state types.HttpNfcLeaseState
	timer *time.Timer
}

// leaseFile is a disk, or another file, of a lease.
type leaseFile struct {
	key, importKey string
	file           string // on this machine; empty for an upload
	disk           *disk  // of an upload
	size           int64  // of the disk

	mu   sync.Mutex // guards following
	sum  string     // SHA-1 of what went through
	n    int64
	err  error
	seen bool
}

// newLease makes a lease in the state initializing.
func (s *Server) newLease(ctx *simulator.Context, vm *VM) *lease {
	l := &lease{s: s, vm: vm, token: newUUID(), files: map[string]*leaseFile{}, state: types.HttpNfcLeaseStateInitializing, close: func(bool) {}}
	l.Self = types.ManagedObjectReference{Type: "HttpNfcLease", Value: "session[" + newUUID() + "]" + l.token}
	l.State, l.InitializeProgress, l.Mode = l.state, 0, string(types.HttpNfcLeaseModePushOrGet)
	ctx.Map.Put(l)
	s.mu.Lock()
	s.leases[l.token] = l
	s.counts.openLeases++
	s.mu.Unlock()
	return l
}

// ready publishes the addresses, in the order of the names. A lease without progress does not live long.
func (l *lease) ready(names []string) {
	info := &types.HttpNfcLeaseInfo{Lease: l.Self, Entity: l.vm.ref, LeaseTimeout: int32(max(1, l.s.opt.LeaseTimeout/time.Second))}
	host := l.s.Host()
	if l.s.opt.ESX {
		host = "*" // the client puts in the name by which it reached the host: HttpNfcLeaseDeviceUrl, vSphere API
	}
	for _, name := range names {
		f := l.files[name]
		u := types.HttpNfcLeaseDeviceUrl{
			Key: f.key, ImportKey: f.importKey, Url: fmt.Sprintf("https://%s/nfc/%s/%s", host, l.token, name),
			TargetId: name, Disk: types.NewBool(strings.HasSuffix(name, ".vmdk")),
		}
		info.DeviceUrl = append(info.DeviceUrl, u)
		info.TotalDiskCapacityInKB += f.size / 1024
	}
	l.mu.Lock()
	l.state = types.HttpNfcLeaseStateReady
	l.timer = time.AfterFunc(l.s.opt.LeaseTimeout, func() { l.end(l.s.context(), &types.Timedout{}) })
	l.mu.Unlock()
	l.update(l.s.context(), types.PropertyChange{Name: "info", Val: info}, types.PropertyChange{Name: "initializeProgress", Val: int32(100)},
		types.PropertyChange{Name: "state", Val: types.HttpNfcLeaseStateReady})
}

func (l *lease) update(ctx *simulator.Context, changes ...types.PropertyChange) {
	ctx.WithLock(l, func() { ctx.Update(l, changes) })
}

// end ends the lease, well if fault is nil.
func (l *lease) end(ctx *simulator.Context, fault types.BaseMethodFault) {
	l.mu.Lock()
	if l.state == types.HttpNfcLeaseStateDone || l.state == types.HttpNfcLeaseStateError {
		l.mu.Unlock()
		return
	}
	l.state = types.HttpNfcLeaseStateDone
	changes := []types.PropertyChange{{Name: "state", Val: l.state}}
	if fault != nil {
		l.state = types.HttpNfcLeaseStateError
		reason := &types.LocalizedMethodFault{Fault: fault, LocalizedMessage: faultText(fault)}
		changes = []types.PropertyChange{{Name: "error", Val: reason}, {Name: "state", Val: l.state}}
	}
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	l.s.mu.Lock()
	delete(l.s.leases, l.token)
	l.s.counts.openLeases--
	l.s.mu.Unlock()
	l.close(fault == nil)
	l.update(ctx, changes...)
}

// HttpNfcLeaseComplete ends a lease well. An upload that could not be read makes it fail.
func (l *lease) HttpNfcLeaseComplete(ctx *simulator.Context, _ *types.HttpNfcLeaseComplete) soap.HasFault {
	body := new(methods.HttpNfcLeaseCompleteBody)
	if !l.isReady() {
		body.Fault_ = simulator.Fault("the lease is not ready", &types.InvalidState{})
		return body
	}
	if fault := l.uploads(); fault != nil {
		l.end(ctx, fault)
		body.Fault_ = simulator.Fault(faultText(fault), fault)
		return body
	}
	l.end(ctx, nil)
	body.Res = new(types.HttpNfcLeaseCompleteResponse)
	return body
}

// uploads says whether one went wrong.
func (l *lease) uploads() types.BaseMethodFault {
	for name, f := range l.files {
		f.mu.Lock()
		err := f.err
		f.mu.Unlock()
		if err != nil {
			return &types.FileFault{File: name}
		}
	}
	return nil
}

// HttpNfcLeaseAbort ends a lease.
func (l *lease) HttpNfcLeaseAbort(ctx *simulator.Context, req *types.HttpNfcLeaseAbort) soap.HasFault {
	var fault types.BaseMethodFault = &types.RequestCanceled{}
	if req.Fault != nil && req.Fault.Fault != nil {
		fault = req.Fault.Fault
	}
	l.end(ctx, fault)
	return &methods.HttpNfcLeaseAbortBody{Res: new(types.HttpNfcLeaseAbortResponse)}
}

// HttpNfcLeaseProgress keeps the lease alive.
func (l *lease) HttpNfcLeaseProgress(ctx *simulator.Context, req *types.HttpNfcLeaseProgress) soap.HasFault {
	body := new(methods.HttpNfcLeaseProgressBody)
	if !l.isReady() {
		body.Fault_ = simulator.Fault("the lease has ended", &types.Timedout{})
		return body
	}
	l.mu.Lock()
	l.timer.Reset(l.s.opt.LeaseTimeout)
	l.mu.Unlock()
	ctx.Update(l, []types.PropertyChange{{Name: "transferProgress", Val: req.Percent}})
	body.Res = new(types.HttpNfcLeaseProgressResponse)
	return body
}

// HttpNfcLeaseGetManifest says what went through so far.
func (l *lease) HttpNfcLeaseGetManifest(_ *simulator.Context, _ *types.HttpNfcLeaseGetManifest) soap.HasFault {
	res := new(types.HttpNfcLeaseGetManifestResponse)
	for name, f := range l.files {
		f.mu.Lock()
		if f.seen {
			res.Returnval = append(res.Returnval, types.HttpNfcLeaseManifestEntry{
				Key: f.key, Sha1: f.sum, Size: f.n, Disk: strings.HasSuffix(name, ".vmdk"), Capacity: f.size,
			})
		}
		f.mu.Unlock()
	}
	return &methods.HttpNfcLeaseGetManifestBody{Res: res}
}

func (l *lease) isReady() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state == types.HttpNfcLeaseStateReady
}

// serveLease is /nfc/TOKEN/FILE. Whoever knows the token may.
func (s *Server) serveLease(w http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		return
	}
	defer s.end()
	token, name := path.Split(strings.TrimPrefix(r.URL.Path, "/nfc/"))
	s.mu.Lock()
	l := s.leases[strings.Trim(token, "/")]
	cut := int64(-1)
	if take(&s.faults.LeaseCuts) {
		cut = s.faults.LeaseCut
	}
	onLease := s.hooks.OnLease
	s.mu.Unlock()
	if l == nil || !l.isReady() || l.files[name] == nil {
		http.NotFound(w, r)
		return
	}
	f := l.files[name]
	up := r.Method == http.MethodPost // PUT is for what the import does not create: OvfFileItem.create
	if !up && r.Method != http.MethodGet {
		http.Error(w, "", http.StatusMethodNotAllowed)
		return
	}
	if onLease != nil {
		onLease(l.vm, name, up)
	}
	switch {
	case up == (f.disk == nil):
		http.Error(w, "", http.StatusMethodNotAllowed)
	case up:
		l.receive(w, r, name, f, cut)
	default:
		l.send(w, name, f, cut)
	}
}

func (l *lease) send(w http.ResponseWriter, name string, f *leaseFile, cut int64) {
	in, err := os.Open(f.file)
	if err != nil {
		http.Error(w, "", http.StatusInternalServerError)
		return
	}
	defer in.Close()
	w.Header().Set("Content-Type", "application/x-vnd.vmware-streamVmdk")
	var from io.Reader = in
	if cut >= 0 {
		from = io.LimitReader(in, cut)
	}
	sum := sha1.New()
	n, err := io.Copy(io.MultiWriter(w, sum), from)
	l.s.count(func(c *counters) { c.lease[name] += n })
	if cut >= 0 || err != nil {
		panic(http.ErrAbortHandler)
	}
	f.done(n, hex.EncodeToString(sum.Sum(nil)), nil)
}

func (f *leaseFile) done(n int64, sum string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n, f.sum, f.err, f.seen = n, sum, err, true
}
