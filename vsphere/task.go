package vsphere

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// How often a task is asked whether it is over. It is asked, not waited for: what waits is lost with its session.
const (
	firstLook = 50 * time.Millisecond
	lastLook  = 2 * time.Second
)

// wait waits for a task and gives its result. A failed one gives its fault as an error that fault.Is and fault.As know.
func (s *Source) wait(ctx context.Context, ref types.ManagedObjectReference) (types.AnyType, error) {
	for pause := firstLook; ; pause = min(pause*3/2, lastLook) {
		var t mo.Task
		if err := s.c.retrieve(ctx, ref, []string{"info"}, &t); err != nil {
			return nil, err
		}
		switch t.Info.State {
		case types.TaskInfoStateSuccess:
			return t.Info.Result, nil
		case types.TaskInfoStateError:
			if t.Info.Error == nil {
				return nil, errors.New("the task failed and does not say why")
			}
			return nil, task.Error{LocalizedMethodFault: t.Info.Error}
		}
		if err := s.cfg.Sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// missing names the privilege when that is what is missing.
func missing(err error) error {
	var no *types.NoPermission
	if _, ok := fault.As(err, &no); ok {
		return fmt.Errorf("%w: %s on %s: %w", ErrNoPrivilege, no.PrivilegeId, objectText(no.Object), err)
	}
	return err
}

func objectText(ref *types.ManagedObjectReference) string {
	if ref == nil {
		return "the object"
	}
	return ref.Value
}
