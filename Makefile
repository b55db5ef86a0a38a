# Command Executor. `make help` lists the targets; `make check` is what CI runs.
#
# Two sets of compiled packages are kept, no more, since compiling is most of the
# time of a check: one with -race for everything that is tested, one with
# CGO_ENABLED=0 and -trimpath for everything that is built, vetted or linted.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

MODULES  := $(shell sed -n 's|^[[:space:]]*\(\./[^[:space:]]*\).*|\1|p' go.work)
PACKAGES := $(addsuffix /...,$(MODULES))

# A main package is services/<name>/cmd/<name>.
MAINS := $(strip $(foreach s,$(notdir $(wildcard services/*)),$(if $(wildcard services/$(s)/cmd/$(s)/main.go),./services/$(s)/cmd/$(s))))

# Tests come in three runs, one after the other: the import rules (they read files
# of all modules, of which the test cache knows nothing, hence -count=1), the unit
# tests of every module, and what drives the binaries (-count=1 for the same reason).
DRIVING   := e2e deploy api chaos
# The end-to-end scenarios run once for each layout of the services: all in one
# process, each its own process, two processes of each, each its own over MongoDB's
# protocol (those of RUN_mongo), and with workers that hold no socket
# (FORMS="up split pairs mongo http").
FORMS     ?= up split
RUN_mongo := -run '^(TestOneInstance|TestIdempotentCreate|TestOutputBeyondTheCap|TestTwoWorkersShare|TestWorkerDies|TestCLI)$$'
ARCH_PKGS := ./tests/arch/...
UNIT_PKGS := $(addsuffix /...,$(filter-out ./tests,$(MODULES)) \
	./tests/chaos/check ./tests/chaos/rig \
	$(addprefix ./tests/,$(filter-out arch $(DRIVING) bin sim,$(notdir $(patsubst %/,%,$(wildcard tests/*/))))))

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT  ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
API     := github.com/cmdexec/cmdexec/libs/core/api
LDFLAGS := -s -w -X $(API).Version=$(VERSION) -X $(API).Commit=$(COMMIT)

# The version comes from LDFLAGS; stamping by the go command fails in a clone that
# belongs to somebody else.
export GOFLAGS := $(strip $(GOFLAGS) -buildvcs=false)
STATIC := CGO_ENABLED=0 GOFLAGS="$(GOFLAGS) -trimpath"

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

##### Building and running

# What waits in warm containers, for each kind of machine that an engine may run on.
# The worker carries it, so it is built before any worker is. See
# docs/decisions/0010-warm-containers.md.
INITS := services/worker/internal/docker/warminit
.PHONY: warm-init
warm-init:
	@for arch in amd64 arm64; do \
		GOOS=linux GOARCH=$$arch $(STATIC) go build -ldflags '-s -w' -o $(INITS)/warm-init-$$arch ./services/worker/cmd/warm-init; \
	done

.PHONY: build
build: warm-init ## Build bin/cmdexec and bin/<service> for every service
	@mkdir -p bin
	@$(STATIC) go build -ldflags '$(LDFLAGS)' -o bin/ $(or $(MAINS),$(error no main package found))
	@echo "built in bin/: $(notdir $(MAINS)) ($(VERSION))"

# The same programs as in bin/, which besides kill themselves where FAILPOINT says:
# for tests/chaos, never for a release. FAILPOINT_BIN is also bin/race/failpoint.
FAILPOINT_BIN ?= bin/failpoint
.PHONY: build-failpoint
build-failpoint: warm-init # What make chaos kills at exact moments.
	@mkdir -p $(FAILPOINT_BIN)
	@$(STATIC) go build -tags failpoint -ldflags '$(LDFLAGS)' -o $(FAILPOINT_BIN)/ $(filter-out %/cmdexec,$(MAINS))

.PHONY: run
run: build ## Build, then start everything in one process on 127.0.0.1:3000 (ARGS="--listen ...")
	@exec bin/cmdexec up --sample=true $(ARGS)

.PHONY: clean
clean: ## Remove what make built
	rm -rf bin dist $(INITS)/warm-init-*

##### Testing

# The binaries that e2e tests drive are race-enabled too; CMDEXEC_BIN_DIR tells
# the tests where they are. REQUIRE=docker,... turns "requires docker: ..." skips
# into failures.
.PHONY: test
test: build-race ## Run all tests under -race: unit tests, then end to end (REQUIRE=docker,... forbids skips; FORMS="up split ..."; CHAOS=1 adds every fault)
	@mkdir -p bin/tools
	@go build -o bin/tools/testsum ./tests/tools/testsum
	@CGO_ENABLED=1 CMDEXEC_BIN_DIR="$(CURDIR)/bin/race" bin/tools/testsum \
		-race -vet=off -count=1 -timeout=5m $(ARCH_PKGS) \
		-- -race -vet=off -timeout=30m $(UNIT_PKGS) \
		-- -race -vet=off -count=1 -timeout=30m ./tests/api/... ./tests/deploy/... \
		$(foreach f,$(FORMS),-- -race -vet=off -count=1 -timeout=30m ./tests/e2e/... $(RUN_$(f)) -args -form=$(f)) \
		$(if $(CHAOS),-- -race -vet=off -count=1 -timeout=20m -parallel=3 ./tests/chaos)

.PHONY: sim
sim: ## Run 500 seeded interleavings of the real services over a simulated bus (ARGS="-seeds 5000"; not under -race, which takes four minutes)
	@$(STATIC) go test -vet=off -count=1 -timeout=10m ./tests/sim $(if $(ARGS),-args $(ARGS))

.PHONY: build-race
build-race: warm-init # What the end-to-end tests drive.
	@command -v gcc >/dev/null || { echo "make test needs gcc (the race detector is linked with it)" >&2; exit 1; }
	@mkdir -p bin/race
	@$(if $(MAINS),CGO_ENABLED=1 go build -race -ldflags '$(LDFLAGS)' -o bin/race/ $(MAINS),true)
	@$(STATIC) go build -o bin/race/ github.com/nats-io/nats-server/v2 ./tests/chaos/chaosjob ./tests/chaos/chaosrunc ./tests/chaos/chaosworkers
	@$(STATIC) go build -o bin/race/ferret ./tests/mongo/ferret
	@$(MAKE) build-failpoint FAILPOINT_BIN=bin/race/failpoint

.PHONY: arch
arch: ## Test the import rules and the documentation's links only
	@CGO_ENABLED=1 go test -race -vet=off -count=1 $(ARCH_PKGS)

.PHONY: fuzz
fuzz: ## Fuzz every target for a few seconds (FUZZ_SECONDS=3 each, FUZZ_TOTAL=300 in all)
	@tests/tools/fuzz.sh $(MODULES)

.PHONY: bench
bench: build ## Measure throughput and latency, in one process and in many (ARGS="-forms up -jobs 2000 -rows ...")
	@$(STATIC) go build -o bin/ github.com/nats-io/nats-server/v2
	@cd tests && CMDEXEC_BIN_DIR="$(CURDIR)/bin" go run ./load $(ARGS)

.PHONY: load
load: build ## Measure what is promised, with 100 workers and 1,000 jobs over separate processes
	@$(STATIC) go build -o bin/ github.com/nats-io/nats-server/v2 ./tests/chaos/chaosworkers
	@cd tests && CMDEXEC_BIN_DIR="$(CURDIR)/bin" go run ./load -promises $(ARGS)

# The hot packages, one benchmark a line: package folder and pattern. The baseline
# was measured on one machine: what counts on another is the allocations.
BENCHMARKS := \
	libs/core/job:. libs/core/workerproto:. libs/store/internal/blob:. libs/store/sqlitestore:. tests/bus:callers=16 \
	services/api-gateway:Create services/scheduler/internal/plan:. services/worker-edge/internal/socket:Dispatch services/worker-edge/internal/session:. \
	services/worker/internal/output:. services/worker/internal/spool:.
BASELINE    := tests/load/baseline.txt
BENCH_COUNT ?= 6
BENCH_TIME  ?= 100ms
BENCHED     := bin/bench.txt

.PHONY: bench-hot
bench-hot: # Benchmarks of the hot packages into $(BENCHED).
	@mkdir -p bin; : >$(BENCHED)
	@for b in $(BENCHMARKS); do \
		echo "go test -bench $${b#*:} ./$${b%:*}"; \
		$(STATIC) go test -vet=off -run '^$$' -bench "$${b#*:}" -benchmem -benchtime $(BENCH_TIME) -count $(BENCH_COUNT) "./$${b%:*}" >>$(BENCHED) || { cat $(BENCHED); exit 1; }; \
	done

.PHONY: bench-compare
bench-compare: bin/tools/benchstat bench-hot ## Compare the benchmarks of the hot packages with tests/load/baseline.txt (BENCH_COUNT=6 BENCH_TIME=100ms)
	@bin/tools/benchstat $(BASELINE) $(BENCHED)

.PHONY: bench-baseline
bench-baseline: bench-hot ## Measure that baseline anew
	@cp $(BENCHED) $(BASELINE)

# The seed decides jobs, faults, victims and times; a run that breaks a promise
# keeps its folder and says how to replay it. SUITE=cluster has three NATS servers,
# SUITE=disk (root) a file system of its own that is filled and cut off.
SEED  ?= 1
SUITE ?= one
RATE  ?= 4
.PHONY: chaos
chaos: build build-failpoint ## Break a running system and check every promise (DURATION=30m SEED=1 SUITE=one|cluster|disk|docker RATE=4 FAULTS=... STORM=5000)
	@$(STATIC) go build -o bin/ github.com/nats-io/nats-server/v2 ./tests/chaos/chaosjob ./tests/chaos/chaosrunc ./tests/chaos/chaosworkers ./tests/chaos
	@bin/chaos -bin bin -seed $(SEED) -suite $(SUITE) -rate $(RATE) $(if $(DURATION),-duration $(DURATION)) $(if $(FAULTS),-faults $(FAULTS)) $(if $(STORM),-storm $(STORM)) $(ARGS)

##### Checking

.PHONY: check
check: fmt-check mod-check lint standalone test sim fuzz ## Everything CI runs
	@echo "check: all passed"

.PHONY: lint
lint: bin/tools/staticcheck ## Run go vet and staticcheck
	@echo "go vet"; $(STATIC) go vet $(PACKAGES)
	@echo "staticcheck"; $(STATIC) bin/tools/staticcheck $(PACKAGES)

.PHONY: standalone
standalone: ## Build every module by itself (GOWORK=off)
	@for m in $(MODULES); do \
		echo "GOWORK=off go build: $$m"; \
		(cd "$$m" && GOWORK=off $(STATIC) go build -o /dev/null ./...); \
	done

.PHONY: fmt
fmt: bin/tools/gofumpt ## Format the code (gofumpt)
	@bin/tools/gofumpt -l -w libs services tests

.PHONY: fmt-check
fmt-check: bin/tools/gofumpt
	@out=$$(bin/tools/gofumpt -l libs services tests); \
	if [ -n "$$out" ]; then printf 'not formatted, run `make fmt`:\n%s\n' "$$out" >&2; exit 1; fi

# modsync runs without modules, so that it works when no go.mod can be loaded.
MODSYNC := cd tests/tools/modsync && GOWORK=off GO111MODULE=off go run .

.PHONY: mod-sync
mod-sync: ## Bring every go.mod in step with its imports and tidy it (ONLY=libs/bus for one)
	@$(MODSYNC) $(if $(ONLY),-only $(ONLY))

.PHONY: mod-check
mod-check:
	@$(MODSYNC) -check

# The tools are pinned by tests/tools/tools.mod, apart from every module, so
# that nobody who builds Command Executor downloads them.
bin/tools/staticcheck: tests/tools/tools.mod
	@mkdir -p bin/tools
	cd tests && GOWORK=off $(STATIC) go build -modfile=tools/tools.mod -o ../$@ honnef.co/go/tools/cmd/staticcheck
	@touch $@

bin/tools/benchstat: tests/tools/tools.mod
	@mkdir -p bin/tools
	cd tests && GOWORK=off $(STATIC) go build -modfile=tools/tools.mod -o ../$@ golang.org/x/perf/cmd/benchstat
	@touch $@

bin/tools/gofumpt: tests/tools/tools.mod
	@mkdir -p bin/tools
	cd tests && GOWORK=off $(STATIC) go build -modfile=tools/tools.mod -o ../$@ mvdan.cc/gofumpt
	@touch $@
