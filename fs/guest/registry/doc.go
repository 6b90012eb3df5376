// Package registry reads hives of the Windows registry: the files SYSTEM, SOFTWARE, NTUSER.DAT …
//
//	hive, err := registry.Open(system, log1, log2)
//	devices, err := hive.Key("MountedDevices")
//	for v, err := range devices.Values() { … }
//
// A hive that Windows had open is nearly always dirty: what changed last is in its transaction logs. They are applied in memory,
// as Windows would do it when it loads the hive; nothing is written.
//
// It reads the formats 1.3 to 1.6, that is Windows NT 4.0 and later. It does not resolve links between keys, and it
// knows nothing of the keys that exist in memory only, such as CurrentControlSet.
//
// Whatever a hive says, there is no panic, no endless loop, and no memory taken beyond the constants here: a key has one
// parent, and is at most 512 deep.
//
// Source: M. Suhanov, "Windows registry file format specification", to whose headings the comments refer.
package registry
