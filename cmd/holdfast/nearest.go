package main

import "strings"

// nearest returns the known word that word was probably meant to be, or "".
// A third of the letters may be wrong, two swapped, or the end may be missing.
func nearest(word string, known []string) string {
	wrong := max(1, len(word)/3)
	if len(word) >= 4 {
		wrong = max(2, wrong) // as two swapped ones are
	}
	best, least := "", wrong+1
	for _, k := range known {
		d := distance(word, k)
		if len(word) > 1 && strings.HasPrefix(k, word) {
			d = min(d, 1)
		}
		if d < least {
			best, least = k, d
		}
	}
	return best
}

// distance is the number of bytes to insert, delete or replace to get from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0] // of the row above
		row[0] = i
		for j := 1; j <= len(b); j++ {
			above := row[j]
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(above+1, row[j-1]+1, diagonal+cost)
			diagonal = above
		}
	}
	return row[len(b)]
}
