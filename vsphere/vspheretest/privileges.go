package vspheretest

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

func (s *Server) denies(ctx *simulator.Context, m *simulator.Method) types.BaseMethodFault {
	return nil
}
