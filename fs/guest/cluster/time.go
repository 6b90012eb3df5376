package cluster

import "time"

// Time makes a time of a date (year from 1980, month, day: 7, 4, 5 bits), a time (hour, minute, two seconds: 5, 6, 5 bits) and units of
// 10 ms, as FAT and exFAT have them. What is 0 of a date is taken for 1.
func Time(date, clock uint16, centi byte) time.Time {
	month, day := max(1, int(date>>5&15)), max(1, int(date&31))
	return time.Date(1980+int(date>>9), time.Month(month), day, int(clock>>11), int(clock>>5&63), int(clock&31)*2, int(centi)*10e6, time.UTC)
}
