package vsphere

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/nfc"
	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/store/extent"
	vlease "github.com/holdfast-backup/holdfast/vsphere/lease"
)

// export is a lease on what a snapshot holds: the host sends each disk as a streamOptimized VMDK, whole. It lives while its progress is told:
// vSphere API, HttpNfcLease.
type export struct {
	src   *Source
	lease *nfc.Lease
	urls  []types.HttpNfcLeaseDeviceUrl
	// entity is the VM.
	entity types.ManagedObjectReference
	once   sync.Once
	done   chan struct{} // closed to end the progress
	ended  sync.WaitGroup
}

// leasePause is between two tellings of progress; a lease may do without for five minutes.
const leasePause = 20 * time.Second

// export begins a lease, one for all disks of the snapshot.
func (s *snapshot) export(ctx context.Context) (*export, error) {
	if s.exported != nil {
		return s.exported, nil
	}
	var ref types.ManagedObjectReference
	if s.ref != nil {
		res, err := methods.ExportSnapshot(ctx, s.src.c, &types.ExportSnapshot{This: *s.ref})
		if err != nil {
			return nil, err
		}
		ref = res.Returnval
	} else {
		res, err := methods.ExportVm(ctx, s.src.c, &types.ExportVm{This: s.vm.ref})
		if err != nil {
			return nil, err
		}
		ref = res.Returnval
	}
	e := &export{src: s.src, lease: nfc.NewLease(s.src.c.Client, ref), done: make(chan struct{})}
	if err := e.ready(ctx); err != nil {
		return nil, errors.Join(err, e.abort())
	}
	e.ended.Add(1)
	go e.live()
	s.exported = e
	return e, nil
}

// ready waits until the host has all that it takes.
func (e *export) ready(ctx context.Context) error {
	for pause := firstLook; ; pause = min(pause*3/2, lastLook) {
		l, err := e.lease.Properties(ctx, "state", "info", "error")
		switch {
		case err != nil:
			return err
		case l.State == types.HttpNfcLeaseStateReady && l.Info != nil:
			e.urls, e.entity = l.Info.DeviceUrl, l.Info.Entity
			return nil
		case l.State == types.HttpNfcLeaseStateError && l.Error != nil:
			return task.Error{LocalizedMethodFault: l.Error}
		case l.State == types.HttpNfcLeaseStateError, l.State == types.HttpNfcLeaseStateDone:
			return fmt.Errorf("the export lease is %s", l.State)
		}
		if err := e.src.cfg.Sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// live tells progress until the lease is closed.
func (e *export) live() {
	defer e.ended.Done()
	t := time.NewTicker(leasePause)
	defer t.Stop()
	for {
		select {
		case <-e.done:
			return
		case <-t.C:
			ctx, cancel := context.WithTimeout(context.Background(), leasePause)
			_ = e.lease.Progress(ctx, 50) // if it fails the reads do, too
			cancel()
		}
	}
}

// stop ends the progress.
func (e *export) stop() {
	e.once.Do(func() { close(e.done) })
	e.ended.Wait()
}

func (e *export) close() error {
	e.stop()
	ctx, cancel := context.WithTimeout(context.Background(), verifyTime)
	defer cancel()
	return e.lease.Complete(ctx)
}

func (e *export) abort() error {
	ctx, cancel := context.WithTimeout(context.Background(), verifyTime)
	defer cancel()
	_ = e.lease.Abort(ctx, nil) // it may have ended by itself
	return nil
}

// urlOf finds a disk by its place on its controller, "VirtualLsiLogicController0:1", as in "/vm-12/VirtualLsiLogicController0:1", or by its number among
// the disks of the VM, as vcsim has it: "/vm-12/disk:1".
func (e *export) urlOf(place string, number int) (*types.HttpNfcLeaseDeviceUrl, error) {
	for _, suffix := range []string{"/" + place, fmt.Sprintf("/disk:%d", number)} {
		for i := range e.urls {
			if strings.HasSuffix(e.urls[i].Key, suffix) || strings.HasSuffix(e.urls[i].ImportKey, suffix) {
				return &e.urls[i], nil
			}
		}
	}
	var all []string
	for i := range e.urls {
		all = append(all, e.urls[i].Key)
	}
	return nil, fmt.Errorf("the host knows no %s, but %q", place, all)
}

// leaseReader reads a disk as the host sends it.
type leaseReader struct {
	*vlease.Disk
	ctx context.Context
}

// Via implements reader.
func (leaseReader) Via() string { return TransportLease }

// Allocated implements reader: the ranges come with the disk.
func (r leaseReader) Allocated(int64) iter.Seq2[extent.Extent, error] { return r.Extents(r.ctx) }

// openLease opens a disk of an export.
func (s *Source) openLease(ctx context.Context, snap *snapshot, dev *device) (reader, error) {
	e, err := snap.export(ctx)
	if err != nil {
		return nil, missing(err)
	}
	number := slices.IndexFunc(disksOf(snap.config.Hardware.Device), func(d device) bool { return d.key == dev.key })
	at, err := e.urlOf(fmt.Sprintf("%s%d:%d", dev.controllerType, dev.bus, dev.unit), number)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(at.Url)
	if err != nil {
		return nil, err
	}
	if u.Hostname() == "*" { // of an ESXi host, which does not know by which name it was reached
		u.Host = s.c.URL().Host
	}
	client, err := s.downloader(u, at.SslThumbprint)
	if err != nil {
		return nil, err
	}
	return leaseReader{vlease.New(vlease.Options{
		Name: dev.label, Size: dev.size,
		Open: func(ctx context.Context, skip int64) (io.ReadCloser, error) { return download(ctx, client, u, skip) },
	}), ctx}, nil
}

// downloader is a client for a host that the server names: the server itself, or the ESXi host that has the disk, whose certificate is the one that
// the server says.
func (s *Source) downloader(u *url.URL, thumbprint string) (*http.Client, error) {
	if u.Host == s.c.URL().Host {
		return &s.c.Client.Client.Client, nil
	}
	if thumbprint == "" {
		return &http.Client{Transport: s.c.DefaultTransport().Clone()}, nil // trusted as the server is
	}
	want, err := parseThumbprint(thumbprint)
	if err != nil {
		return nil, err
	}
	return &http.Client{Transport: &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout: 30 * time.Second,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, // VerifyConnection decides
			VerifyConnection: func(s tls.ConnectionState) error { return pinned(s.PeerCertificates, want) }},
	}}, nil
}

// download begins at a byte.
func download(ctx context.Context, client *http.Client, u *url.URL, skip int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if skip > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", skip))
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	switch {
	case res.StatusCode == http.StatusOK && skip == 0, res.StatusCode == http.StatusPartialContent && strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", skip)):
		return res.Body, nil
	case res.StatusCode == http.StatusOK:
		err = vlease.ErrNoResume
	default:
		err = fmt.Errorf("the host answers %s", res.Status)
	}
	res.Body.Close()
	return nil, err
}

// typeName is the name of a type of the vSphere API.
func typeName(v any) string { return reflect.Indirect(reflect.ValueOf(v)).Type().Name() }
