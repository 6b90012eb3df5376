package volume

import (
	"testing"
)

// benchmark reads a device from beginning to end, again and again, 1 MiB at a time.
func benchmark(b *testing.B, dev device, err error) {
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := dev.ReadAt(p, int64(i)<<20%(dev.Size()-int64(len(p)))); err != nil {
			b.Fatal(err)
		}
	}
}

// legsOf makes legs of 16 MiB in memory.
func legsOf(n int, lost ...int) []leg {
	legs := make([]leg, n)
	for i := range legs {
		legs[i] = leg{dev: whole{make(memory, 16<<20), i}, good: 16 << 20}
	}
	for _, i := range lost {
		legs[i] = leg{}
	}
	return legs
}

func BenchmarkRAID5(b *testing.B) {
	dev, err := newParity(legsOf(4), 16<<20, 512<<10, 5, leftSymmetric)
	benchmark(b, dev, err)
}

func BenchmarkRAID5Degraded(b *testing.B) {
	dev, err := newParity(legsOf(4, 1), 16<<20, 512<<10, 5, leftSymmetric)
	benchmark(b, dev, err)
}

func BenchmarkRAID6TwoLost(b *testing.B) {
	dev, err := newParity(legsOf(6, 1, 2), 16<<20, 512<<10, 6, leftSymmetric)
	benchmark(b, dev, err)
}

func BenchmarkLUKS(b *testing.B) {
	h := &luksHeader{cipher: "aes-xts-plain64", sector: 4096}
	dev, err := h.device(whole{make(memory, 16<<20), 0}, make([]byte, 64))
	benchmark(b, dev, err)
}

func BenchmarkBitLocker(b *testing.B) {
	for _, m := range bitLockerMethods {
		b.Run(m.name, func(b *testing.B) {
			h := &bitLocker{version: 2, sector: 512, method: m, headerAt: 8 << 20, header: 8192, encrypted: 16 << 20, copies: []int64{9 << 20, 10 << 20, 11 << 20}}
			key := 2 * m.key
			if m.cipher == "aes-cbc-eboiv" {
				key = m.key
			}
			dev, err := h.device(whole{make(memory, 16<<20), 0}, make([]byte, key))
			benchmark(b, dev, err)
		})
	}
}
