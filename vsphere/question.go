package vsphere

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// powerOn starts a VM that is off. While it starts the host may ask something, and waits for the answer. Whether files were moved or copied is answered, keep for
// moved: the VM keeps its identity. What else is asked nobody here can know: the question stays, and is the error.
func (s *Source) powerOn(ctx context.Context, vm types.ManagedObjectReference, name string, keep bool) error {
	res, err := methods.PowerOnVM_Task(ctx, s.c, &types.PowerOnVM_Task{This: vm})
	if err == nil {
		waiting, cancel := context.WithCancelCause(ctx)
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			if err := s.answer(waiting, vm, name, keep); err != nil {
				cancel(err) // the task waits for an answer that it does not get
			}
		}()
		_, err = s.wait(waiting, res.Returnval)
		if cause := context.Cause(waiting); cause != nil && err != nil {
			undo, done := context.WithTimeout(context.WithoutCancel(ctx), verifyTime)
			_, _ = methods.CancelTask(undo, s.c, &types.CancelTask{This: res.Returnval})
			done()
			err = cause
		}
		cancel(nil)
		<-answered
	}
	var was *types.InvalidPowerState
	if _, ok := fault.As(err, &was); ok && was.ExistingState == types.VirtualMachinePowerStatePoweredOn {
		return nil
	}
	return err
}

// askedEvery is how often the VM is looked at for a question, while it is switched on.
const askedEvery = 200 * time.Millisecond

// answer answers questions about the identity of the VM until ctx ends; another question is an error.
func (s *Source) answer(ctx context.Context, ref types.ManagedObjectReference, name string, keep bool) error {
	last := ""  // question that was answered; it may be seen once more
	tried := "" // question whose answer was refused
	for {
		var vm mo.VirtualMachine
		err := s.c.retrieve(ctx, ref, []string{"runtime.question"}, &vm) // of an error the task tells, or the next look
		if q := vm.Runtime.Question; err == nil && q != nil && q.Id != last {
			choice := choiceOf(q, keep)
			if choice == "" {
				return fmt.Errorf("the host asks, and waits for somebody to answer it there: %s", q.Text)
			}
			_, err := methods.AnswerVM(ctx, s.c, &types.AnswerVM{This: ref, QuestionId: q.Id, AnswerChoice: choice})
			switch {
			case err == nil:
				last = q.Id
				s.logf("%s: answered %q with %q", name, q.Text, choice)
			case q.Id == tried && ctx.Err() == nil:
				return err
			default: // somebody else may have answered it
				tried = q.Id
			}
		}
		if s.cfg.Sleep(ctx, askedEvery) != nil {
			return nil
		}
	}
}

// choiceOf is the key of the answer to the question whether a VM was moved or copied, msg.uuid.altered; empty for another question. Keys are numbers or names
// such as button.uuid.movedTheVM, and so are labels; summaries, "I _moved it", are in the language of the server.
func choiceOf(q *types.VirtualMachineQuestionInfo, keep bool) string {
	const about = "msg.uuid."
	if !strings.Contains(q.Text, about) && !slices.ContainsFunc(q.Message, func(m types.VirtualMachineMessage) bool { return strings.HasPrefix(m.Id, about) }) {
		return ""
	}
	want := "copied"
	if keep {
		want = "moved"
	}
	for _, c := range q.Choice.ChoiceInfo {
		if d := c.GetElementDescription(); strings.Contains(strings.ToLower(d.Key+" "+d.Label+" "+d.Summary), want) {
			return d.Key
		}
	}
	return ""
}
