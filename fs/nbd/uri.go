package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

const defaultPort = "10809" // uri, "NBD URI authority"

// target is where a server is and what is wanted of it.
type target struct {
	network, addr string
	export        string
	tls           bool   // must be used
	hostname      string // the server's, in its certificate; empty for the host of addr
	noVerify      bool   // do not check the certificate
}

// parseTarget reads an NBD URI, unix:PATH, or HOST:PORT (also HOST, :PORT).
func parseTarget(s string) (target, error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		return target{network: "unix", addr: path}, nil
	}
	if strings.Contains(s, "://") {
		t, err := parseURI(s)
		if err != nil {
			return t, fmt.Errorf("nbd: %q: %w", s, err)
		}
		return t, nil
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		s = net.JoinHostPort(strings.Trim(s, "[]"), defaultPort)
	}
	return target{network: "tcp", addr: s}, nil
}

func parseURI(s string) (target, error) {
	u, err := url.Parse(s)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return target{}, err
	}
	t := target{export: strings.TrimPrefix(u.Path, "/")}
	scheme, unix := strings.CutSuffix(u.Scheme, "+unix")
	switch scheme {
	case "nbd":
	case "nbds":
		t.tls = true
	default:
		return target{}, fmt.Errorf("no such NBD URI scheme: %s", u.Scheme)
	}
	socket, err := t.query(u.RawQuery)
	switch {
	case err != nil:
		return target{}, err
	case u.Fragment != "":
		return target{}, errors.New("an NBD URI has no fragment")
	case unix && socket == "":
		return target{}, errors.New("the parameter socket is missing")
	case unix && u.Host != "":
		return target{}, errors.New("a Unix socket has no host")
	case !unix && socket != "":
		return target{}, errors.New("the parameter socket is for nbd+unix")
	case !unix && u.Hostname() == "":
		return target{}, errors.New("the host is missing")
	case unix:
		t.network, t.addr = "unix", socket
	default:
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		t.network, t.addr = "tcp", net.JoinHostPort(u.Hostname(), port)
	}
	return t, nil
}

// query takes the parameters of a URI into t.
func (t *target) query(raw string) (socket string, err error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return "", err
	}
	for key, values := range q {
		v := values[0]
		switch {
		case len(values) > 1:
			return "", fmt.Errorf("the parameter %s is there twice", key)
		case key == "socket":
			socket = v
		case key == "tls-hostname":
			t.hostname = v
		case key == "tls-verify-peer" && (v == "0" || v == "1"):
			t.noVerify = v == "0"
		case key == "tls-type" && v == "x509":
		default:
			return "", fmt.Errorf("the parameter %s=%s is not known", key, v)
		}
	}
	return socket, nil
}

// config is the TLS configuration for t made from base; nil for no TLS.
func (t *target) config(base *tls.Config) *tls.Config {
	switch {
	case base != nil:
		base = base.Clone()
	case t.tls:
		base = new(tls.Config)
	default:
		return nil
	}
	base.MinVersion = max(base.MinVersion, tls.VersionTLS12) // proto, "TLS versions"
	base.InsecureSkipVerify = base.InsecureSkipVerify || t.noVerify
	switch {
	case t.hostname != "":
		base.ServerName = t.hostname
	case base.ServerName == "" && t.network == "tcp":
		base.ServerName, _, _ = net.SplitHostPort(t.addr)
	}
	return base
}
