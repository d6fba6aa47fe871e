# What a developer types. Everything installs what it needs; caches are in $(NBAGENT_CACHE).
SHELL := /bin/bash
PYTHON := /usr/bin/python3
export NBAGENT_CACHE ?= /var/cache/nbagent-build
DIST := $(NBAGENT_CACHE)/dist
PYTEST := $(PYTHON) -m pytest -p no:cacheprovider

.PHONY: up up-fleet down test unit host check bench bench-density bench-compressed bench-fleet bench-tools image debs tools clean

up: tools            ## a systemd host on this machine with nbagent in it, on 127.0.0.1:9000 and :8000
	@tests/up

up-fleet: tools      ## three hosts and a gateway, on 127.0.0.1:8080
	@tests/up --fleet

down:                ## removes what these two made
	@tests/up --down

test: tools check    ## everything passes
	$(PYTEST) tests/unit tests/integration

unit: tools          ## no root, a second
	$(PYTEST) tests/unit

host: tools          ## on real systemd hosts
	$(PYTEST) tests/integration

check: tools         ## ruff, mypy, the floors, lintian
	@tests/check

bench: bench-tools debs          ## figures, side by side with peers; BENCH="--rounds 1" is the quick one
	$(PYTHON) tests/bench/bench.py $(BENCH)

bench-density: bench-tools debs  ## a thousand live users on a host of its own; BENCH="--users 30"
	$(PYTHON) tests/bench/density.py $(BENCH)

bench-compressed: tools debs     ## slots at rest in compressed memory, on a virtual machine; BENCH="--slots 2"
	$(PYTHON) tests/bench/compressed.py $(BENCH)

bench-fleet: bench-tools debs    ## what a gateway costs and how it spreads claims; BENCH="--quick"
	$(PYTHON) tests/bench/fleet.py $(BENCH)

bench-tools: tools
	@tests/bench/install-tools

image:               ## images/minimal as a .deb
	@packaging/build-image-deb minimal $(DIST)

debs: image          ## all packages
	@packaging/build-deb $(DIST)

tools:
	@tests/install-tools

clean: down
	rm -rf $(DIST)
