package vsphere

import (
	"context"
	"slices"
	"sync"
)

// limits bound how many snapshots there are at once.
type limits struct {
	datastore, host int

	mu   *sync.Mutex              // guards following
	used map[string]chan struct{} // by what is limited
}

// atOnce is how many snapshots there may be at once on a datastore, and on a host, where nothing else is said.
const atOnce = 4

func newLimits(cfg Config) limits {
	l := limits{datastore: cfg.SnapshotsPerDatastore, host: cfg.SnapshotsPerHost, mu: new(sync.Mutex), used: map[string]chan struct{}{}}
	if l.datastore <= 0 {
		l.datastore = atOnce
	}
	if l.host <= 0 {
		l.host = atOnce
	}
	return l
}

// take waits until there may be one more snapshot on a host and on each of these datastores.
func (l *limits) take(ctx context.Context, host string, datastores []string) (release func(), err error) {
	var took []chan struct{}
	release = sync.OnceFunc(func() {
		for _, c := range took {
			<-c
		}
	})
	// In the same order by all, so that no two wait for each other.
	wanted := []chan struct{}{l.of("host "+host, l.host)}
	for _, d := range slices.Compact(slices.Sorted(slices.Values(datastores))) {
		wanted = append(wanted, l.of("datastore "+d, l.datastore))
	}
	for _, c := range wanted {
		select {
		case c <- struct{}{}:
			took = append(took, c)
		case <-ctx.Done():
			release()
			return nil, ctx.Err()
		}
	}
	return release, nil
}

func (l *limits) of(what string, n int) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.used[what] == nil {
		l.used[what] = make(chan struct{}, n)
	}
	return l.used[what]
}
