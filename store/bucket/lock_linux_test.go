package bucket_test

import (
	"testing"

	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/bucket/buckettest"
)

func TestLocalLock(t *testing.T) {
	buckettest.TestLocker(t, func(t *testing.T) (bucket.Bucket, bucket.Bucket) {
		dir := t.TempDir()
		return openLocal(t, dir), openLocal(t, dir)
	})
}
