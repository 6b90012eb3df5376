package vsphere_test

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/vsphere/vspheretest"
)

// TestFront: a server whose answers have no length, and which ends each connection after an answer, as some do that stand before a vCenter.
func TestFront(t *testing.T) {
	r := newRig(t, vspheretest.Options{})
	vm := r.add(oneDisk("web"))
	behind, err := url.Parse(r.server.URL())
	must(t, err)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: behind.Host})
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	proxy.FlushInterval = -1
	proxy.ModifyResponse = func(res *http.Response) error {
		if res.Request.URL.Path == behind.Path {
			res.ContentLength = -1
			res.Header.Del("Content-Length")
			res.Header.Set("Connection", "close")
		}
		return nil
	}
	front := httptest.NewTLSServer(proxy)
	t.Cleanup(front.Close)
	r.cfg.URL = front.URL + behind.Path
	r.cfg.Thumbprint = fmt.Sprintf("%X", sha256.Sum256(front.Certificate().Raw))
	done := make(chan struct{})
	go func() {
		defer close(done)
		src := r.source()
		r.wantDisks(r.mustBackup(src, "web"), r.truth(vm))
		r.server.LoseSessions()
		r.write(vm, 1)
		r.wantDisks(r.mustBackup(src, "web"), r.truth(vm))
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("it hangs")
	}
	r.nothingLeft(vm)
}
