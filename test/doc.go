// Package test holds Holdfast's whole-program tests: the import rule, crash and
// damage harnesses, interoperability with other tools, and the benchmark
// against other backup programs.
package test
