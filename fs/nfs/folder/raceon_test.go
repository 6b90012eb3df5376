//go:build race

package folder

const raced = true
