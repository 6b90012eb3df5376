package vspheretest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"reflect"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
)

// client is a govmomi client of a double, over TLS.
type client struct {
	*govmomi.Client
	t   testing.TB
	s   *Server
	ctx context.Context
}

func connect(t testing.TB, s *Server) *client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	c, err := govmomi.NewClient(ctx, s.URLWithUser(), true)
	if err != nil {
		t.Fatal(err)
	}
	return &client{c, t, s, ctx}
}

func (c *client) object(vm *VM) *object.VirtualMachine {
	return object.NewVirtualMachine(c.Client.Client, vm.Ref())
}

// run waits for a task that must succeed.
func (c *client) run(task *object.Task, err error) *types.TaskInfo {
	c.t.Helper()
	info, err := c.try(task, err)
	if err != nil {
		c.t.Fatal(err)
	}
	return info
}

func (c *client) try(task *object.Task, err error) (*types.TaskInfo, error) {
	if err != nil {
		return nil, err
	}
	return task.WaitForResult(c.ctx, nil)
}

func (c *client) snapshot(vm *VM, name string) types.ManagedObjectReference {
	c.t.Helper()
	return c.run(c.object(vm).CreateSnapshot(c.ctx, name, "", false, false)).Result.(types.ManagedObjectReference)
}

func (c *client) removeSnapshot(ref types.ManagedObjectReference) {
	c.t.Helper()
	c.run(c.tryRemove(ref, true))
}

func (c *client) tryRemove(ref types.ManagedObjectReference, consolidate bool) (*object.Task, error) {
	res, err := methods.RemoveSnapshot_Task(c.ctx, c.Client.Client, &types.RemoveSnapshot_Task{This: ref, Consolidate: &consolidate})
	if err != nil {
		return nil, err
	}
	return object.NewTask(c.Client.Client, res.Returnval), nil
}

// disk is a disk as the API describes it.
type apiDisk struct {
	key      int32
	size     int64
	file     string
	changeID string
	parents  []string
}

func (c *client) snapshotDisks(ref types.ManagedObjectReference) []apiDisk {
	c.t.Helper()
	var snap mo.VirtualMachineSnapshot
	c.properties(ref, []string{"config"}, &snap)
	return apiDisks(snap.Config.Hardware.Device)
}

func (c *client) liveDisks(vm *VM) []apiDisk {
	c.t.Helper()
	var m mo.VirtualMachine
	c.properties(vm.Ref(), []string{"config.hardware.device"}, &m)
	return apiDisks(m.Config.Hardware.Device)
}

func (c *client) properties(ref types.ManagedObjectReference, names []string, dst any) {
	c.t.Helper()
	if err := property.DefaultCollector(c.Client.Client).RetrieveOne(c.ctx, ref, names, dst); err != nil {
		c.t.Fatal(err)
	}
}

func apiDisks(devices object.VirtualDeviceList) []apiDisk {
	var all []apiDisk
	for _, dev := range devices {
		dev, ok := dev.(*types.VirtualDisk)
		if !ok {
			continue
		}
		d := apiDisk{key: dev.Key, size: dev.CapacityInBytes}
		if b, ok := dev.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
			d.file, d.changeID = b.FileName, b.ChangeId
			for p := b.Parent; p != nil; p = p.Parent {
				d.parents = append(d.parents, p.FileName)
			}
		}
		all = append(all, d)
	}
	return all
}

func (c *client) query(vm *VM, snap types.ManagedObjectReference, key int32, start int64, id string) (types.DiskChangeInfo, error) {
	res, err := methods.QueryChangedDiskAreas(c.ctx, c.Client.Client, &types.QueryChangedDiskAreas{
		This: vm.Ref(), Snapshot: &snap, DeviceKey: key, StartOffset: start, ChangeId: id,
	})
	if err != nil {
		return types.DiskChangeInfo{}, err
	}
	return res.Returnval, nil
}

// areas asks for all pages. It gives the areas and how many pages there were.
func (c *client) areas(vm *VM, snap types.ManagedObjectReference, d apiDisk, id string) (es []extent.Extent, pages int, err error) {
	for start := int64(0); start < d.size; pages++ {
		info, err := c.query(vm, snap, d.key, start, id)
		switch {
		case err != nil:
			return nil, pages, err
		case info.StartOffset != start:
			return nil, pages, errWrongStart
		case info.Length <= 0:
			return nil, pages, errNoProgress
		}
		for _, a := range info.ChangedArea {
			es = append(es, extent.Extent{Off: a.Start, Len: a.Length})
		}
		start += info.Length
	}
	return es, pages, nil
}

var (
	errWrongStart = errors.New("the answer begins somewhere else")
	errNoProgress = errors.New("no progress")
)

// folderURL is where a datastore path is read.
func (s *Server) folderURL(t testing.TB, dsPath string) string {
	var p object.DatastorePath
	if !p.FromString(dsPath) {
		t.Fatalf("%q is no datastore path", dsPath)
	}
	dc := "DC0"
	if s.opt.ESX {
		dc = "ha-datacenter"
	}
	u := url.URL{Scheme: "https", Host: s.Host(), Path: "/folder/" + p.Path, RawQuery: url.Values{"dcPath": {dc}, "dsName": {p.Datastore}}.Encode()}
	return u.String()
}

// request asks /folder with the user's password.
func (s *Server) request(t testing.TB, method, dsPath string, body io.Reader, header ...string) (*http.Response, []byte, error) {
	t.Helper()
	r, err := http.NewRequest(method, s.folderURL(t, dsPath), body)
	if err != nil {
		t.Fatal(err)
	}
	r.SetBasicAuth(s.User, s.Password)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return send(t, r)
}

func send(t testing.TB, r *http.Request) (*http.Response, []byte, error) {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Do(r)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, b, err
}

// readRange reads a part of a file, which must succeed.
func (s *Server) readRange(t testing.TB, dsPath string, e extent.Extent) []byte {
	t.Helper()
	res, b, err := s.request(t, "GET", dsPath, nil, "Range", fmt.Sprintf("bytes=%d-%d", e.Off, e.End()-1))
	if err != nil || res.StatusCode != http.StatusPartialContent || int64(len(b)) != e.Len {
		t.Fatalf("%s %v: %v, %v, %d bytes", dsPath, e, res, err, len(b))
	}
	return b
}

func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

func wantBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
	t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
}

// wantFault wants the fault that is a pointer to a T.
func wantFault[T types.BaseMethodFault](t testing.TB, what string, err error) {
	t.Helper()
	target := reflect.New(reflect.TypeFor[T]().Elem()).Interface().(T)
	if !fault.Is(err, target) {
		t.Fatalf("%s: %v (%T), want %T", what, err, err, target)
	}
}
