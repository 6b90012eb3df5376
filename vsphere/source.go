package vsphere

import (
	"context"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
)

// Config says how to reach a server, and how its VMs are backed up.
type Config struct {
	URL            string // https://HOST/sdk
	User, Password string
	CAFile         string // certificates of authorities, PEM; empty for the system's
	Thumbprint     string // SHA-256 or SHA-1 of the only certificate that is believed; empty for none
}

// serverTime is the server's clock.
func (c *client) serverTime(ctx context.Context) (time.Time, error) {
	t, err := methods.GetCurrentTime(ctx, c.Client)
	if err != nil {
		return time.Time{}, err
	}
	return *t, nil
}
