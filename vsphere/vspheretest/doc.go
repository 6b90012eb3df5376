// Package vspheretest is a vCenter (or one ESXi host) for tests: VMware's own simulator vcsim behind TLS, with what that lacks.
//
//	s := vspheretest.New(t, vspheretest.Options{})
//	vm := s.AddVM(vspheretest.VMSpec{Name: "web01", Disks: []vspheretest.DiskSpec{{Size: 16 << 20}}})
//	vm.WriteAt(0, data, 4096) // as the guest does
//	c, err := govmomi.NewClient(ctx, s.URLWithUser(), true)
//
// Disks have bytes. A snapshot freezes them and gives later writes a delta, changed block tracking counts epochs and answers in pages,
// /folder wants a session and refuses what a running VM has locked, leases carry streamOptimized disks both ways, a relocated
// VM takes its files along. The double does as the documents of VMware say, and misbehaves on demand (Faults).
//
// It is not an oracle. A test compares with the bytes that it wrote itself, or asks qemu-img.
//
// What a guest does (WriteAt, Zero) is safe at any moment, from any goroutine; so is everything else here.
package vspheretest
