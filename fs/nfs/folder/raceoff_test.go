//go:build !race

package folder

const raced = false
