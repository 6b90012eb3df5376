# Everything a developer or CI does. `make demo` and `make test` are what a newcomer needs.
GO ?= go

FLAGS ?=

.PHONY: build test race fuzz cover lint demo bench scale schedules

build:
	$(GO) build -trimpath -o bin/holdfast ./cmd/holdfast

# A real Debian disk backed up twice, mounted, checked by other programs, restored. As root.
demo:
	$(GO) run ./test/demo $(FLAGS)

# Side by side with restic, borg and kopia; as root for cold caches and mounts.
bench:
	$(GO) run ./test/bench $(FLAGS)
	$(GO) run ./test/benchdisk
	$(GO) run ./test/benchdisk --boots
	$(GO) run ./test/benchdisk --files 1000000
	$(GO) run ./test/benchdisk --nfs

# 100,000 restore points, 1 PiB of disks: what the commands take. FLAGS="--points 10000" for less.
scale:
	$(GO) run ./test/scale $(FLAGS)

# 1,000 random schedules of backups, forget, gc and reads at once, under the race detector.
schedules:
	HOLDFAST_TEST_SCHEDULES=1000 $(GO) test -race -timeout 60m -count 1 -v -run TestGCSchedules ./store

# Installs what the tests need when run as root, then runs all of them and skips nothing.
test: build
	test/need.sh
	HOLDFAST_TEST_ALL=1 $(GO) test -timeout 60m ./...

race:
	$(GO) test -race -short -timeout 30m ./...

# FUZZTIME per target.
FUZZTIME ?= 30s
fuzz:
	test/fuzz.sh $(FUZZTIME)

cover:
	$(GO) test -short -coverprofile=cover.out ./... && $(GO) tool cover -func=cover.out | tail -1

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) mod verify
