package vspheretest

import (
	"net/http"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

type lease struct{}

func (s *Server) serveLease(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }
func (s *Server) denies(ctx *simulator.Context, m *simulator.Method) types.BaseMethodFault {
	return nil
}
func (l *layer) flush() error { return nil }
