package vspheretest

import "maps"

// gauge is a number per key, and the largest that it ever was.
type gauge struct {
	now, most map[string]int // key => number; "" for all
}

func newGauge() gauge { return gauge{now: map[string]int{}, most: map[string]int{}} }

func (g gauge) add(key string, n int) {
	g.now[key] += n
	g.most[key] = max(g.most[key], g.now[key])
}

// counters are guarded by the server's mu.
type counters struct {
	calls              map[string]int   // method => number
	folder, lease      map[string]int64 // file => bytes
	snapshots          gauge            // by "", datastore and host
	connections, reads gauge
	logins             int
	openLeases         int
}

func newCounters() counters {
	return counters{
		calls: map[string]int{}, folder: map[string]int64{}, lease: map[string]int64{},
		snapshots: newGauge(), connections: newGauge(), reads: newGauge(),
	}
}

// Counts are what has happened so far. Snapshots of AddUserSnapshot do not count.
type Counts struct {
	Calls          map[string]int   // method => how often
	FolderBytes    map[string]int64 // "[datastore] path" => bytes that /folder gave
	LeaseBytes     map[string]int64 // name of the file => bytes through leases, both ways
	Snapshots      int              // that exist now
	MaxSnapshots   map[string]int   // name of a datastore or host, "" for all => at once, at most
	Connections    int              // open now
	MaxConnections int
	MaxReads       int // requests to /folder at once
	Logins         int
	Sessions       int // open now
	OpenLeases     int // neither completed nor aborted
}

// Counts gives a copy.
func (s *Server) Counts() Counts {
	sessions := len(s.sessions())
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &s.counts
	return Counts{
		Calls: maps.Clone(c.calls), FolderBytes: maps.Clone(c.folder), LeaseBytes: maps.Clone(c.lease),
		Snapshots: c.snapshots.now[""], MaxSnapshots: maps.Clone(c.snapshots.most),
		Connections: c.connections.now[""], MaxConnections: c.connections.most[""], MaxReads: c.reads.most[""],
		Logins: c.logins, Sessions: sessions, OpenLeases: c.openLeases,
	}
}

// Sum is the sum of a map of Counts.
func Sum[N int | int64](m map[string]N) N {
	var n N
	for _, v := range m {
		n += v
	}
	return n
}

func (s *Server) count(f func(c *counters)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.counts)
}
