package bucket_test

import (
	"errors"
	"testing"

	"github.com/holdfast-backup/holdfast/store/bucket"
	"github.com/holdfast-backup/holdfast/store/bucket/buckettest"
)

func TestMemoryLock(t *testing.T) {
	buckettest.TestLocker(t, func(*testing.T) (bucket.Bucket, bucket.Bucket) {
		m := bucket.NewMemory()
		return m, m
	})
}

func TestFaultyLock(t *testing.T) {
	buckettest.TestLocker(t, func(*testing.T) (bucket.Bucket, bucket.Bucket) {
		m := bucket.NewMemory()
		return bucket.NewFaulty(m, nil), bucket.NewFaulty(m, nil)
	})
	f := bucket.NewFaulty(bucket.NewMemory(), bucket.At(1, bucket.Fault{Kind: bucket.Fail}))
	if _, err := f.Lock(t.Context(), "x.lock"); !errors.Is(err, bucket.ErrInjected) {
		t.Error(err)
	}
}
