package vsphere_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/vsphere"
	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestQuestions: whether a VM was moved or copied is answered when it is switched on; what else is asked waits for somebody, and is said.
func TestQuestions(t *testing.T) {
	asks := vspheretest.MovedOrCopied
	vcenter := asks()
	vcenter.Choices = []vspheretest.Choice{{"button.cancel", "Cancel", "Abbrechen"}, {"button.uuid.movedTheVM", "Verschoben", "Ich habe sie verschoben"},
		{"button.uuid.copiedTheVM", "Kopiert", "Ich habe sie kopiert"}}
	locked := vspheretest.Question{Message: "msg.disk.noBackEnd", Text: "Cannot open the disk '/vmfs/volumes/1/web/web.vmdk' or one of the snapshot disks it depends on: Failed to lock the file.",
		Choices: []vspheretest.Choice{{"0", "Cancel", "Cancel"}, {"1", "Retry", "Retry"}}}
	other := asks() // whose choices look like those that are known
	other.Message, other.Text = "msg.disk.altered", "The disk was changed."
	noChoice := asks()
	noChoice.Choices = noChoice.Choices[:1]
	gone := asks()
	gone.Gone = true
	lingers := asks()
	lingers.Lingers = 500 * time.Millisecond
	const moved, copied = "msg.uuid.altered: button.uuid.movedTheVM", "msg.uuid.altered: button.uuid.copiedTheVM"
	for _, c := range []struct {
		name  string
		asked []vspheretest.Question
		keep  bool
		deny  string
		want  []string // answers
		err   string   // that it is not switched on with
	}{
		{name: "nothing"},
		{name: "moved", asked: []vspheretest.Question{asks()}, keep: true, want: []string{moved}},
		{name: "copied", asked: []vspheretest.Question{asks()}, want: []string{copied}},
		{name: "moved, in another language", asked: []vspheretest.Question{vcenter}, keep: true, want: []string{"msg.uuid.altered: Verschoben"}},
		{name: "copied, in another language", asked: []vspheretest.Question{vcenter}, want: []string{"msg.uuid.altered: Kopiert"}},
		{name: "twice", asked: []vspheretest.Question{asks(), asks()}, want: []string{copied, copied}},
		{name: "shown for a while longer", asked: []vspheretest.Question{lingers}, want: []string{copied}},
		{name: "answered by somebody else", asked: []vspheretest.Question{gone, asks()}, keep: true, want: []string{moved}},
		{name: "a lock", asked: []vspheretest.Question{locked}, keep: true, err: "Failed to lock the file"},
		{name: "a lock after an answer", asked: []vspheretest.Question{asks(), locked}, want: []string{copied}, err: "Failed to lock the file"},
		{name: "something else", asked: []vspheretest.Question{other}, err: "The disk was changed."},
		{name: "no such choice", asked: []vspheretest.Question{noChoice}, err: "moved or copied"},
		{name: "may not answer", asked: []vspheretest.Question{asks()}, deny: "VirtualMachine.Interact.AnswerQuestion", err: "VirtualMachine.Interact.AnswerQuestion"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, vspheretest.Options{})
			spec := oneDisk("web")
			spec.PoweredOff = true
			vm := r.add(spec)
			src := r.source()
			r.server.Misbehave(func(f *vspheretest.Faults) { f.Questions = c.asked })
			if c.deny != "" {
				r.server.Deny(c.deny)
			}
			was := vm.BIOSUUID()
			i := &vsphere.Instant{Name: "web", VM: vm.Ref().Value, Keep: c.keep}
			if err := src.PowerOn(t.Context(), i); (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("it is switched on with %v, want %q", err, c.err)
			}
			if got := r.server.Answers(); !slices.Equal(got, c.want) {
				t.Errorf("it was answered %q, want %q", got, c.want)
			}
			if vm.PoweredOn() != (c.err == "") || (vm.Asks() != "") != (c.err != "") {
				t.Errorf("on: %v, it still asks %q", vm.PoweredOn(), vm.Asks())
			}
			if changed := slices.Contains(c.want, copied) || slices.Contains(c.want, "msg.uuid.altered: Kopiert"); (vm.BIOSUUID() != was) != changed {
				t.Errorf("the UUID was %s and is %s", was, vm.BIOSUUID())
			}
		})
	}
}

// TestRestoreAsked: a restored VM that asks something when it is switched on does not keep the restore waiting.
func TestRestoreAsked(t *testing.T) {
	needsQemuImg(t)
	r := newRig(t, vspheretest.Options{})
	r.add(oneDisk("web"))
	src := r.source()
	p := r.mustBackup(src, "web")
	for _, keep := range []bool{true, false} {
		what := r.restoreOf(p, fmt.Sprint("web-", keep))
		what.PowerOn, what.KeepIdentity = true, keep
		locked := vspheretest.Question{Message: "msg.fileLock", Text: "The file is locked.", Choices: []vspheretest.Choice{{"0", "Cancel", "Cancel"}, {"1", "Retry", "Retry"}}}
		r.server.Misbehave(func(f *vspheretest.Faults) { f.Questions = []vspheretest.Question{vspheretest.MovedOrCopied(), locked} })
		if _, err := src.Restore(t.Context(), what); err == nil || !strings.Contains(err.Error(), "it is restored, but could not be switched on: the host asks") || !strings.Contains(err.Error(), "The file is locked.") {
			t.Errorf("it is switched on with %v", err)
		}
	}
	if got := strings.Join(r.server.Answers(), ", "); got != "msg.uuid.altered: button.uuid.movedTheVM, msg.uuid.altered: button.uuid.copiedTheVM" {
		t.Errorf("it was answered %q", got)
	}
}
