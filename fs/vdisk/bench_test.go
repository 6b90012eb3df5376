package vdisk

import (
	"context"
	"io"
	"path/filepath"
	"testing"
)

// Sequential reads of 1 MiB of an image in the page cache.
func BenchmarkQCOW2(b *testing.B) {
	disk := compressible{newModel(1, 256*mib, ext(0, 256*mib))}
	dir := b.TempDir()
	store(b, disk, filepath.Join(dir, "raw"))
	for name, args := range map[string][]string{
		"plain": nil,
		"zlib":  {"-c"},
		"zstd":  {"-c", "-o", "compression_type=zstd"},
		"raw":   {"-O", "raw"},
	} {
		b.Run(name, func(b *testing.B) {
			mustQEMU(b, dir, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), "raw", name+".img")...)
			img, err := OpenChain(filepath.Join(dir, name+".img"), Policy{})
			if err != nil {
				b.Fatal(err)
			}
			defer img.Close()
			readAll(b, img)
		})
	}
}

// Sequential reads of 128 KiB of a computed file, over a disk that costs nothing.
func BenchmarkComputed(b *testing.B) {
	for _, f := range formats()[:3] {
		b.Run(f.name, func(b *testing.B) {
			disk := free{newModel(1, 16<<30, ext(0, 16<<30))}
			file, err := f.make(disk, "x.vmdk")
			if err != nil {
				b.Fatal(err)
			}
			p := make([]byte, 128*kib)
			b.SetBytes(int64(len(p)))
			off := int64(0)
			for b.Loop() {
				file.ReadAt(p, off)
				off = (off + int64(len(p))) % (4 << 30)
			}
		})
	}
}

// free is a disk whose reads do nothing.
type free struct{ *model }

func (free) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

func readAll(b *testing.B, src Source) {
	p := make([]byte, mib)
	b.SetBytes(mib)
	off := int64(0)
	for b.Loop() {
		if _, err := src.ReadAt(p, off); err != nil && err != io.EOF {
			b.Fatal(err)
		}
		off = (off + mib) % src.Size()
	}
}

// Compressing 64 MiB of each sort.
func BenchmarkWriteStreamOptimized(b *testing.B) {
	disk := newModel(1, 64*mib, ext(0, 64*mib))
	for name, src := range map[string]Source{"noise": disk, "runs": compressible{disk}} {
		b.Run(name, func(b *testing.B) {
			mem := make(memSource, disk.size)
			src.ReadAt(mem, 0)
			b.SetBytes(disk.size)
			for b.Loop() {
				n, err := WriteStreamOptimized(context.Background(), io.Discard, mem, testID, "x", nil)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(n)/float64(disk.size), "size")
			}
		})
	}
}

// Sequential reads of 1 MiB of the VMDKs that QEMU makes.
func BenchmarkVMDK(b *testing.B) {
	disk := compressible{newModel(1, 256*mib, ext(0, 256*mib))}
	dir := b.TempDir()
	store(b, disk, filepath.Join(dir, "raw"))
	for _, k := range vmdkKinds {
		b.Run(k.name, func(b *testing.B) {
			mustQEMU(b, dir, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", k.options, "raw", "x.vmdk")
			img, err := OpenChain(filepath.Join(dir, "x.vmdk"), Policy{})
			if err != nil {
				b.Fatal(err)
			}
			defer img.Close()
			readAll(b, img)
		})
	}
}
