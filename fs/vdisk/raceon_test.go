//go:build race

package vdisk

const raced = true
