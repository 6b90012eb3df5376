// Package extract copies what the tree of a repository shows, above all the files of guests, to a directory of the
// host or into a tar or zip stream.
//
//	r, err := extract.ToDir(ctx, "/srv/recovered", []extract.Source{{Name: "etc", Node: node}}, extract.Options{})
//
// A copy has what a guest's file system has: holes, hard links, owners, modes, extended attributes, ACLs, devices and
// times to the nanosecond. What the target refuses is counted in [Result.Lost].
//
// Names and links of a guest may be hostile. All is done relative to open directories and no link is ever followed, so
// that nothing is written outside of the destination.
//
// Nothing that is there is overwritten. A file appears under its name when it is complete; the same copy made
// again takes what is there whole, by size and time, as done, and so goes on where one was stopped. A file that is
// damaged is left out, and the rest is copied.
package extract
