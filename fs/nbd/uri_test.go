package nbd

import "testing"

func TestTargets(t *testing.T) {
	for s, want := range map[string]target{
		// The examples of uri, "NBD URI export name".
		"nbd://example.com/disk":          {network: "tcp", addr: "example.com:10809", export: "disk"},
		"nbd+unix:///disk?socket=sock":    {network: "unix", addr: "sock", export: "disk"},
		"nbd://example.com/":              {network: "tcp", addr: "example.com:10809"},
		"nbd://example.com":               {network: "tcp", addr: "example.com:10809"},
		"nbd://example.com//disk":         {network: "tcp", addr: "example.com:10809", export: "/disk"},
		"nbd://example.com/hello%20world": {network: "tcp", addr: "example.com:10809", export: "hello world"},
		// Others.
		"nbds://[::1]:99/a":                     {network: "tcp", addr: "[::1]:99", export: "a", tls: true},
		"nbd+unix:///?socket=%00/abstract":      {network: "unix", addr: "\x00/abstract"},
		"nbds+unix:///?socket=s&tls-hostname=h": {network: "unix", addr: "s", tls: true, hostname: "h"},
		"nbds://h/?tls-verify-peer=0":           {network: "tcp", addr: "h:10809", tls: true, noVerify: true},
		"nbds://h/?tls-type=x509":               {network: "tcp", addr: "h:10809", tls: true},
		"unix:/run/a b":                         {network: "unix", addr: "/run/a b"},
		"localhost:1":                           {network: "tcp", addr: "localhost:1"},
		"localhost":                             {network: "tcp", addr: "localhost:10809"},
		"[::1]":                                 {network: "tcp", addr: "[::1]:10809"},
		":10":                                   {network: "tcp", addr: ":10"},
	} {
		if got, err := parseTarget(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"http://h/", "nbd:///x", "nbd+unix:///x", "nbd://h/?socket=s", "nbd+unix://h/?socket=s", "nbd://h/?unknown=1",
		"nbds://h/?tls-type=psk", "nbds://h/?tls-verify-peer=2", "nbd+unix:///?socket=a&socket=b", "nbd://h/%zz", "nbd+vsock://1/",
		"nbd://h/#f",
	} {
		if got, err := parseTarget(s); err == nil {
			t.Errorf("%s is taken for %+v", s, got)
		}
	}
}
