package vspheretest

import (
	"net/http"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// Faults are what the server does wrong. A number says how often; it counts down. Zero is a server that works.
type Faults struct {
	// Snapshots.
	QuiesceFails       int // CreateSnapshot with quiesce ends with ApplicationQuiesceFault, as a task
	SnapshotDelay      time.Duration
	SnapshotFault      types.BaseMethodFault // what SnapshotFails fail with
	SnapshotFails      int
	DatastoreFull      bool // CreateSnapshot ends with NoDiskSpace
	MaxSnapshots       int  // in a chain; 0 for 32, as ESXi has it
	RemoveDelay        time.Duration
	RemoveFault        types.BaseMethodFault // what RemoveFails fail with; nil for GenericVmConfigFault
	RemoveFails        int
	LeaveConsolidation int // RemoveSnapshot leaves the delta, and consolidationNeeded
	ConsolidationFails int
	MethodDelay        map[string]time.Duration // method => before each call of it

	// Hidden has the ids of objects whose properties the user may not read.
	Hidden map[string]bool

	// What the next VMs that are switched on by a task ask, all of them.
	Questions []Question

	// Any method: what the next calls of it fail with, in order. A nil lets one call pass.
	Calls map[string][]types.BaseMethodFault // as the answer to the call
	Tasks map[string][]types.BaseMethodFault // as the end of the task; the name of the method has _Task at its end
	// Requests to /sdk that get a status instead, such as 503, or a connection that is dropped.
	SDKStatus, SDKFails int
	SDKDrops            int

	// Changed block tracking.
	AreasPerPage       int                   // instead of the option
	EmptyPages         bool                  // a page without areas between those with some
	AreasFault         types.BaseMethodFault // what AreasFails fail with; nil for FileFault
	AreasFails         int
	WrongStart         bool // the answer begins somewhere else
	NoProgress         bool // the answer covers nothing
	WholeDisk          bool // "*" answers the whole disk, as on NFS
	NoAllocated        bool // "*" is a FileFault
	HideChange         bool // the last changed block is left out
	HideAllocated      bool // and in the answer to "*" too
	KeepTracking       bool // of a VM that is off is not dropped when it is switched off
	MoveResetsTracking bool // a move to another datastore begins the tracking anew

	// Sessions and files.
	LoseSessions  int   // before this many calls or requests all sessions are forgotten
	FolderCut     int64 // the connection is dropped after this many bytes of a body, FolderCuts times
	FolderCuts    int
	FolderStatus  int // such as 500 or 503, FolderFails times
	FolderFails   int
	FolderShort   int             // this many bodies end early, and the length says so
	WrongRange    int             // this many Content-Range say another place
	FolderIgnores int             // this many requests for a range get the whole file, 200
	FolderDelay   time.Duration   // before each answer
	NoFolder      map[string]bool // names of datastores whose disks /folder does not have, as with vSAN: 404

	// Leases.
	LeaseFault types.BaseMethodFault // the lease ends in the state error; LeaseFails times
	LeaseFails int
	LeaseCut   int64 // the connection is dropped after this many bytes, LeaseCuts times
	LeaseCuts  int
	// As the plain vcsim does: devices are called "/vm-12/disk:1" in leases, and a VM whose import was aborted stays.
	LeaseNumbers, LeaseKeeps bool
}

// Misbehave changes the faults. It may be called at any moment.
func (s *Server) Misbehave(change func(f *Faults)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.faults)
}

// take counts a fault down, and says whether it is on.
func take(n *int) bool {
	if *n <= 0 {
		return false
	}
	*n--
	return true
}

// fault gives what f picks.
func (s *Server) fault(f func(f *Faults) types.BaseMethodFault) types.BaseMethodFault {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f(&s.faults)
}

// lies reports whether the server misbehaves in a way.
func (s *Server) lies(how func(f *Faults) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return how(&s.faults)
}

type areasLies struct {
	fault                                                    types.BaseMethodFault
	perPage                                                  int
	emptyPages, wrongStart, noProgress, whole, hide, hideAll bool
}

func (s *Server) areasFaults(changeID string) areasLies {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.faults
	l := areasLies{perPage: s.opt.AreasPerPage, emptyPages: f.EmptyPages, wrongStart: f.WrongStart, noProgress: f.NoProgress, whole: f.WholeDisk, hide: f.HideChange, hideAll: f.HideAllocated}
	if f.AreasPerPage > 0 {
		l.perPage = f.AreasPerPage
	}
	switch {
	case take(&f.AreasFails):
		l.fault = orFault(f.AreasFault, &types.FileFault{File: "[datastore] disk.vmdk"})
	case changeID == "*" && f.NoAllocated:
		l.fault = &types.FileFault{File: "[datastore] disk.vmdk"}
	}
	return l
}

func orFault(f, otherwise types.BaseMethodFault) types.BaseMethodFault {
	if f != nil {
		return f
	}
	return otherwise
}

// snapshotFault is why a snapshot cannot be made.
func (s *Server) snapshotFault(quiesce bool, depth int, datastore types.ManagedObjectReference) types.BaseMethodFault {
	return s.fault(func(f *Faults) types.BaseMethodFault {
		limit := 32
		if f.MaxSnapshots > 0 {
			limit = f.MaxSnapshots
		}
		switch {
		case take(&f.SnapshotFails):
			return orFault(f.SnapshotFault, &types.GenericVmConfigFault{Reason: "a snapshot cannot be made"})
		case f.DatastoreFull:
			return &types.NoDiskSpace{FileFault: types.FileFault{File: "delta"}, Datastore: datastore.Value}
		case depth >= limit:
			return &types.TooManySnapshotLevels{}
		case quiesce && take(&f.QuiesceFails):
			return &types.ApplicationQuiesceFault{}
		}
		return nil
	})
}

// next takes the next fault for a method.
func next(queue map[string][]types.BaseMethodFault, method string) types.BaseMethodFault {
	faults := queue[method]
	if len(faults) == 0 {
		return nil
	}
	queue[method] = faults[1:]
	return faults[0]
}

// front stands before all else that the server answers.
func (s *Server) front(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, s.model.Map().Path) {
			s.mu.Lock()
			f := &s.faults
			drop, fail, status := take(&f.SDKDrops), take(&f.SDKFails), f.SDKStatus
			s.mu.Unlock()
			switch {
			case drop:
				panic(http.ErrAbortHandler)
			case fail:
				http.Error(w, "", status)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}
