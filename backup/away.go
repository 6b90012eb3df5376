package backup

import (
	"context"

	"github.com/holdfast-backup/holdfast/store/remote/agent"
)

// Away is the repository behind a server on another host as a Target. What a run reports as
// new and stored is what it sent: the server does not tell what it had.
func Away(c agent.Client) Target { return away{c} }

type away struct{ client agent.Client }

// awayDraft is a session as a Draft. It is no Locker: the server locks points.
type awayDraft struct{ *agent.Session }

var (
	_ Target = away{}
	_ Draft  = awayDraft{}
	_ Base   = (*agent.Base)(nil)
	_ Map    = (*agent.Map)(nil)
	_ Writer = (*agent.Writer)(nil)
)

// Begin implements Target.
func (a away) Begin(ctx context.Context, vm VM) (Draft, error) {
	s, err := a.client.Begin(ctx, vm)
	if err != nil {
		return nil, err
	}
	return awayDraft{s}, nil
}

// Base implements Draft.
func (d awayDraft) Base(ctx context.Context, disk string) (Base, error) {
	b, err := d.Session.Base(ctx, disk)
	if err != nil || b == nil {
		return nil, err
	}
	return b, nil
}

// Map implements Draft.
func (d awayDraft) Map(ctx context.Context, base Base, size int64) (Map, error) {
	b, _ := base.(*agent.Base)
	m, err := d.Session.Map(ctx, b, size)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Writer implements Draft.
func (d awayDraft) Writer() (Writer, error) { return d.Session.Writer() }
