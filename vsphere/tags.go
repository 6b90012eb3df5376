package vsphere

import (
	"context"
	"net/http"
	"net/url"
	"slices"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// tagsOf gives the tags of objects, each as CATEGORY/TAG, by their ids. A single host has none. Each call has a session of its own, since a
// listing is seldom and these sessions end after minutes.
func (s *Source) tagsOf(ctx context.Context, refs []types.ManagedObjectReference) (map[string][]string, error) {
	out := map[string][]string{}
	if !s.c.IsVC() || len(refs) == 0 {
		return out, nil
	}
	rc := rest.NewClient(s.c.Client)
	if err := rc.Login(ctx, url.UserPassword(s.cfg.User, s.cfg.Password)); rest.IsStatusError(err, http.StatusNotFound) {
		return out, nil // tags came with vCenter 6.0, this way to them with 6.5
	} else if err != nil {
		return nil, err
	}
	defer rc.Logout(context.WithoutCancel(ctx))
	m := tags.NewManager(rc)
	categories, err := m.GetCategories(ctx)
	if err != nil {
		return nil, err
	}
	name := map[string]string{} // of a category, by its id
	for _, c := range categories {
		name[c.ID] = c.Name
	}
	for some := range slices.Chunk(refs, checkedAtOnce) {
		var objects []mo.Reference
		for _, ref := range some {
			objects = append(objects, ref)
		}
		list, err := m.GetAttachedTagsOnObjects(ctx, objects)
		if err != nil {
			return nil, err
		}
		for _, a := range list {
			for _, t := range a.Tags {
				id := a.ObjectID.Reference().Value
				out[id] = append(out[id], name[t.CategoryID]+"/"+t.Name)
			}
			slices.Sort(out[a.ObjectID.Reference().Value])
		}
	}
	return out, nil
}

// attributeNames gives the names of custom attributes, by their keys.
func (s *Source) attributeNames(ctx context.Context) (map[int32]string, error) {
	out := map[int32]string{}
	if s.c.ServiceContent.CustomFieldsManager == nil {
		return out, nil
	}
	fields, err := object.NewCustomFieldsManager(s.c.Client).Field(ctx)
	for _, f := range fields {
		out[f.Key] = f.Name
	}
	return out, err
}
