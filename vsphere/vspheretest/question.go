package vspheretest

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Question is what a VM asks while it is switched on: the task does not go on until it has an answer (VirtualMachine.runtime.question, vSphere API).
type Question struct {
	Message, Text string // "msg.uuid.altered", "This virtual machine might have been moved or copied. …"
	Choices       []Choice
	Default       int           // index of a choice
	Gone          bool          // it has been answered by somebody else when an answer comes
	Lingers       time.Duration // it is shown so long after the answer
}

// Choice is an answer: key, label and summary. "Cancel" ends the task; one whose key or label has "copied" gives the VM another BIOS UUID.
type Choice [3]string

// MovedOrCopied is what ESXi asks about a VM whose files are not where they were: keys are numbers there, the label is the key of the text.
func MovedOrCopied() Question {
	return Question{Message: "msg.uuid.altered", Default: 2,
		Text:    "This virtual machine might have been moved or copied. If you don't know, answer \"button.uuid.copiedTheVM\".",
		Choices: []Choice{{"0", "Cancel", "Cancel"}, {"1", "button.uuid.movedTheVM", "I _moved it"}, {"2", "button.uuid.copiedTheVM", "I _copied it"}}}
}

func (q *Question) info(id string) *types.VirtualMachineQuestionInfo {
	info := &types.VirtualMachineQuestionInfo{Id: id, Text: q.Message + ":" + q.Text, Message: []types.VirtualMachineMessage{{Id: q.Message, Text: q.Text}}}
	info.Choice.DefaultIndex = int32(q.Default)
	for _, c := range q.Choices {
		info.Choice.ChoiceInfo = append(info.Choice.ChoiceInfo, &types.ElementDescription{Description: types.Description{Label: c[1], Summary: c[2]}, Key: c[0]})
	}
	return info
}

// asked is a question that waits.
type asked struct {
	Question
	id     string
	answer chan Choice // of one
}

// ask asks all questions that there are, and waits for the answers.
func (vm *VM) ask(ctx *simulator.Context) types.BaseMethodFault {
	sim := vm.sim()
	for {
		a := vm.nextQuestion()
		if a == nil || sim == nil {
			return nil
		}
		set := func(info any) {
			own := *ctx
			ctx.Map.AtomicUpdate(&own, sim, []types.PropertyChange{{Name: "runtime.question", Val: info}})
		}
		set(a.info(a.id))
		var c Choice
		select {
		case c = <-a.answer:
		case <-vm.s.done:
			return &types.RequestCanceled{}
		}
		vm.s.sleep(a.Lingers)
		set(nil)
		switch {
		case c[0] == "": // somebody else's
		case c[1] == "Cancel":
			return &types.RequestCanceled{}
		case strings.Contains(c[0]+c[1], "copied"):
			own := *ctx
			ctx.Map.AtomicUpdate(&own, sim, []types.PropertyChange{{Name: "config.uuid", Val: newUUID()}})
		}
	}
}

// nextQuestion makes the next one that is to be asked the one that waits; nil when there is none.
func (vm *VM) nextQuestion() *asked {
	s := vm.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults.Questions) == 0 {
		return nil
	}
	s.nextID++
	a := &asked{Question: s.faults.Questions[0], id: fmt.Sprint("question-", s.nextID), answer: make(chan Choice, 1)}
	s.faults.Questions = s.faults.Questions[1:]
	s.questions[vm.ref] = a
	return a
}

// AnswerVM answers the question that waits: VirtualMachine.AnswerVM, vSphere API.
func (o *vmObject) AnswerVM(_ *simulator.Context, req *types.AnswerVM) soap.HasFault {
	body := new(methods.AnswerVMBody)
	if fault := o.vm.answered(req); fault != nil {
		body.Fault_ = simulator.Fault(faultText(fault), fault)
		return body
	}
	body.Res = new(types.AnswerVMResponse)
	return body
}

func (vm *VM) answered(req *types.AnswerVM) types.BaseMethodFault {
	s := vm.s
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.questions[vm.ref]
	if a == nil || a.id != req.QuestionId {
		return &types.InvalidArgument{InvalidProperty: "questionId"}
	}
	i := slices.IndexFunc(a.Choices, func(c Choice) bool { return c[0] == req.AnswerChoice })
	if i < 0 {
		return &types.InvalidArgument{InvalidProperty: "answerChoice"}
	}
	delete(s.questions, vm.ref)
	if a.Gone {
		a.answer <- Choice{}
		return &types.ConcurrentAccess{}
	}
	s.answers = append(s.answers, a.Message+": "+a.Choices[i][1])
	a.answer <- a.Choices[i]
	return nil
}

// Answers are those that were given, as "msg.uuid.altered: button.uuid.movedTheVM".
func (s *Server) Answers() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.answers)
}

// Asks is the text of the question that waits for an answer; empty when none does.
func (vm *VM) Asks() (text string) {
	vm.s.context().WithLock(vm.sim(), func() {
		if q := vm.sim().Runtime.Question; q != nil {
			text = q.Text
		}
	})
	return text
}

// BIOSUUID is what the guest knows itself by.
func (vm *VM) BIOSUUID() (uuid string) {
	vm.s.context().WithLock(vm.sim(), func() { uuid = vm.sim().Config.Uuid })
	return uuid
}
