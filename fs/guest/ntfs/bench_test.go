package ntfs

import (
	"os"
	"testing"

	"github.com/holdfast-backup/holdfast/fs/guest"
	"github.com/holdfast-backup/holdfast/fs/guest/guesttest"
)

// BenchmarkWalk walks and hashes the image that NTFS_IMAGE names.
func BenchmarkWalk(b *testing.B) {
	image := os.Getenv("NTFS_IMAGE")
	if image == "" {
		b.Skip("needs NTFS_IMAGE, the path of an image")
	}
	dev := guesttest.OpenDevice(b, image)
	b.ReportAllocs()
	for b.Loop() {
		f, err := Open(dev, guest.Options{})
		if err != nil {
			b.Fatal(err)
		}
		list, err := guesttest.WalkFS(f)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(list)), "things")
	}
}
