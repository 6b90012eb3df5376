package vsphere

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Errors that a user can do something about.
var (
	ErrLogin       = errors.New("user name or password is wrong")
	ErrUntrusted   = errors.New("the certificate of the server is not trusted")
	ErrNoPrivilege = errors.New("a privilege is missing")
)

// keepAlive is after how long without a call the server is asked for the time, so that it keeps the session: the default limit of
// vCenter is 30 minutes.
const keepAlive = 5 * time.Minute

// client is a session with a server. When the session is lost, it logs in again and repeats the call.
type client struct {
	*vim25.Client
	cfg Config
	// files has a place for each file that is read over HTTPS at once.
	files chan struct{}
	// sha1 of the server's certificate. A login may need a new connection, for which it is set: so it is not under mu.
	sha1 atomic.Pointer[[]byte]

	mu    sync.Mutex // guards following
	login time.Time  // the last one
	stop  func()     // of the keep-alive
}

// connect logs in.
func connect(ctx context.Context, cfg Config) (*client, error) {
	u, err := parseURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	sc := soap.NewClient(u, false)
	c := &client{cfg: cfg, files: make(chan struct{}, fileReads)}
	if err := c.trust(sc); err != nil {
		return nil, err
	}
	sc.DefaultTransport().MaxIdleConnsPerHost = fileReads + 2
	// What the server offers is asked for before the login: this is where an untrusted one shows.
	vc, err := vim25.NewClient(ctx, sc)
	if err != nil {
		return nil, reach(u, err)
	}
	c.Client = vc
	if err := c.logIn(ctx); err != nil {
		return nil, err
	}
	vc.RoundTripper = &again{client: c, next: vim25.Retry(sc, vim25.RetryTemporaryNetworkError, attempts)}
	c.stop = c.keepAlive()
	return c, nil
}

// fileReads is how many reads of files on datastores are under way at once: each has a connection to the host.
const fileReads = 8

func (c *client) enter(ctx context.Context) error {
	select {
	case c.files <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *client) leave() { <-c.files }

// attempts is how often a call is made when the network fails it before an answer came.
const attempts = 3

func parseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("vsphere: %w", err)
	case u.Scheme != "https":
		return nil, fmt.Errorf("vsphere: %q does not begin with https://", s)
	case u.Host == "":
		return nil, fmt.Errorf("vsphere: %q names no host", s)
	case u.User != nil:
		return nil, fmt.Errorf("vsphere: the URL holds a user name; give user and password_file")
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/sdk"
	}
	return u, nil
}

// trust sets whose certificate is believed: with a thumbprint that one's alone, or else whatever the authorities vouch for.
func (c *client) trust(sc *soap.Client) error {
	tc := sc.DefaultTransport().TLSClientConfig
	tc.MinVersion = tls.VersionTLS12
	var want []byte
	if c.cfg.Thumbprint != "" {
		var err error
		if want, err = parseThumbprint(c.cfg.Thumbprint); err != nil {
			return err
		}
		tc.InsecureSkipVerify = true // VerifyConnection decides
	}
	tc.VerifyConnection = func(s tls.ConnectionState) error { return c.meet(s.PeerCertificates, want) }
	if want != nil || c.cfg.CAFile == "" {
		return nil
	}
	pem, err := os.ReadFile(c.cfg.CAFile)
	if err != nil {
		return fmt.Errorf("vsphere: %w", err)
	}
	tc.RootCAs = x509.NewCertPool()
	if !tc.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("vsphere: %s holds no certificate", c.cfg.CAFile)
	}
	return nil
}

// meet is called for each connection; with want, nobody else has looked at the certificate.
func (c *client) meet(chain []*x509.Certificate, want []byte) error {
	if want != nil {
		if err := pinned(chain, want); err != nil {
			return err
		}
	}
	sum := sha1.Sum(chain[0].Raw)
	digest := sum[:]
	c.sha1.Store(&digest)
	return nil
}

// thumbprint is the SHA-1 of the server's certificate, the form that VDDK takes.
func (c *client) thumbprint() string {
	if digest := c.sha1.Load(); digest != nil {
		return colons(*digest)
	}
	return ""
}

// parseThumbprint reads a SHA-1 or SHA-256 in hexadecimal, with or without colons.
func parseThumbprint(s string) ([]byte, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err != nil || len(b) != sha1.Size && len(b) != sha256.Size {
		return nil, fmt.Errorf("vsphere: thumbprint %q is neither a SHA-256 nor a SHA-1 in hexadecimal", s)
	}
	return b, nil
}

func pinned(chain []*x509.Certificate, want []byte) error {
	if len(chain) == 0 {
		return fmt.Errorf("%w: it has none", ErrUntrusted)
	}
	sum256, sum1 := sha256.Sum256(chain[0].Raw), sha1.Sum(chain[0].Raw)
	if string(want) == string(sum256[:]) || string(want) == string(sum1[:]) {
		return nil
	}
	return fmt.Errorf("%w: its thumbprint is %s, not the one that was given", ErrUntrusted, colons(sum256[:]))
}

func colons(b []byte) string {
	return strings.ReplaceAll(strings.TrimSpace(fmt.Sprintf("% X", b)), " ", ":")
}

// reach says of an error of the first call what a user can do about it.
func reach(u *url.URL, err error) error {
	switch {
	case errors.Is(err, ErrUntrusted):
		return fmt.Errorf("vsphere: %s: %w", u.Host, err)
	case soap.IsCertificateUntrusted(err):
		return fmt.Errorf("vsphere: %s: %w: %w", u.Host, ErrUntrusted, err)
	}
	return fmt.Errorf("vsphere: %s: %w", u.Host, err)
}

// plain is a client whose calls are not repeated.
func (c *client) plain() *vim25.Client {
	return &vim25.Client{Client: c.Client.Client, ServiceContent: c.ServiceContent, RoundTripper: c.Client.Client}
}

// logIn begins a session.
func (c *client) logIn(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.logInLocked(ctx)
}

func (c *client) logInLocked(ctx context.Context) error {
	err := session.NewManager(c.plain()).Login(ctx, url.UserPassword(c.cfg.User, c.cfg.Password))
	switch {
	case fault.Is(err, &types.InvalidLogin{}):
		return fmt.Errorf("vsphere: log in to %s as %s: %w", c.URL().Host, c.cfg.User, ErrLogin)
	case err != nil:
		return fmt.Errorf("vsphere: log in to %s as %s: %w", c.URL().Host, c.cfg.User, err)
	}
	c.login = time.Now()
	return nil
}

// logInAgain begins a new session, unless somebody else has since the time at which a call failed began.
func (c *client) logInAgain(ctx context.Context, began time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.login.After(began) {
		return nil
	}
	// Where the server still knows something of the old session it refuses another login in it.
	_ = session.NewManager(c.plain()).Logout(ctx)
	return c.logInLocked(ctx)
}

// keepAlive asks for the time now and then, until the function that it gives is called.
func (c *client) keepAlive() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(keepAlive)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				_, _ = c.serverTime(ctx) // a call that follows says what is wrong
			}
		}
	}()
	return func() { cancel(); <-done }
}

// close ends the session.
func (c *client) close() error {
	c.stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	defer c.CloseIdleConnections()
	err := session.NewManager(c.plain()).Logout(ctx)
	if fault.Is(err, &types.NotAuthenticated{}) {
		return nil
	}
	return err
}

// again repeats a call whose session is lost.
type again struct {
	client *client
	next   soap.RoundTripper
}

// RoundTrip implements soap.RoundTripper.
func (a *again) RoundTrip(ctx context.Context, req, res soap.HasFault) error {
	for n := 1; ; n++ {
		began := time.Now()
		err := a.next.RoundTrip(ctx, req, res)
		if n == attempts || !fault.Is(err, &types.NotAuthenticated{}) {
			return err
		}
		if err := a.client.logInAgain(ctx, began); err != nil {
			return err
		}
		reflect.ValueOf(res).Elem().SetZero() // or the fault would stay in it
	}
}
