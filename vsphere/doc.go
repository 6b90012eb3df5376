// Package vsphere backs up and restores the VMs of a vCenter or of one ESXi host, without an agent in the guest: it
// takes a snapshot, asks which blocks changed since the last restore point, reads them, and removes the snapshot.
//
//	src, err := vsphere.Connect(ctx, vsphere.Config{URL: "https://vc.example/sdk", User: "backup@vsphere.local", Password: pw})
//	snap, err := src.Freeze(ctx, "web01")
//
// A Source keeps one session and logs in again when that is lost. It never talks to a server whose certificate
// neither the authorities nor the pinned fingerprint vouch for.
//
// It is tested against VMware's own simulator, vcsim, with what that lacks added (package vspheretest); it has not
// run on a real ESXi host.
package vsphere
