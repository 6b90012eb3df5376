package vspheretest

import (
	"context"
	"maps"
	"slices"

	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/simulator"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// serveREST serves what a vCenter has besides SOAP, tags above all. A host has none of it.
func (s *Server) serveREST() {
	if s.opt.ESX {
		return
	}
	patterns, h := simulator.New(s.service.Listen, s.model.Map())
	for _, p := range patterns {
		s.service.ServeMux.Handle(p, h)
	}
}

// setTags attaches tags to an object. It is a client like any other, whose login is taken off the count again.
func (s *Server) setTags(ref types.ManagedObjectReference, byCategory map[string]string) error {
	if len(byCategory) == 0 {
		return nil
	}
	ctx := context.Background()
	vc, err := vim25.NewClient(ctx, soap.NewClient(s.URLWithUser(), true))
	if err != nil {
		return err
	}
	defer vc.CloseIdleConnections()
	rc := rest.NewClient(vc)
	if err := rc.Login(ctx, s.URLWithUser().User); err != nil {
		return err
	}
	s.count(func(c *counters) { c.logins-- })
	defer func() { _ = rc.Logout(ctx) }()
	m := tags.NewManager(rc)
	for _, category := range slices.Sorted(maps.Keys(byCategory)) {
		if _, err := m.GetCategory(ctx, category); err != nil {
			if _, err := m.CreateCategory(ctx, &tags.Category{Name: category, Cardinality: "MULTIPLE"}); err != nil {
				return err
			}
		}
		name := byCategory[category]
		tag, err := m.GetTagForCategory(ctx, name, category)
		if err != nil {
			if _, err := m.CreateTag(ctx, &tags.Tag{Name: name, CategoryID: category}); err != nil {
				return err
			}
			if tag, err = m.GetTagForCategory(ctx, name, category); err != nil {
				return err
			}
		}
		if err := m.AttachTag(ctx, tag.ID, ref); err != nil {
			return err
		}
	}
	return nil
}
