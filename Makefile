# SPDX-License-Identifier: BSD-3-Clause
# Commands of a developer. Each target installs the Debian packages that it needs; caches are in $(NBAGENT_CACHE).
SHELL := /bin/bash
PYTHON := /usr/bin/python3
# An empty value is as none, here and in all programs, because it would be the working directory.
override export NBAGENT_CACHE := $(or $(NBAGENT_CACHE),/var/cache/nbagent-build)
DIST := $(NBAGENT_CACHE)/dist
REPO ?= $(NBAGENT_CACHE)/repo
REPO_URL ?= file:$(REPO)
PYTEST := $(PYTHON) -m pytest -p no:cacheprovider
UNIT := $(PYTEST) -n auto --dist loadfile tests/unit  # a process of pytest-xdist for each processor

.PHONY: up up-fleet down test unit host test-vms test-firewalls test-ansible test-monitoring uncharged conformance fuzz \
    check bench test-cdn bench-density bench-compressed bench-fleet bench-neighbour bench-page bench-tools \
    image updates debs repo tools clean test-arm64 test-dns test-release sbom test-ui test-upgrade versions extensions preloads libraries \
    chaos soak exhausted test-doctor

up: tools            ## a systemd host on this machine with nbagent in it, on 127.0.0.1:9000 and :8000
	@tests/up

up-fleet: tools      ## three hosts and a gateway, on 127.0.0.1:8080
	@tests/up --fleet

down:                ## removes the hosts of up and up-fleet
	@tests/up --down

test: tools check    ## lint, unit tests and integration tests
	$(UNIT)
	@tests/run-integration $(PYTEST)

unit: tools          ## unit tests; no systemd host is needed
	$(UNIT)

host: tools          ## integration tests on real systemd hosts
	@tests/run-integration $(PYTEST)

test-vms: tools      ## what depends on the kernel, on virtual machines with Debian 12 and 13; make test has one of them
	NBAGENT_ALL_MACHINES=1 $(PYTEST) tests/integration -k "vm-bookworm or vm-trixie"

test-firewalls: tools  ## slots with a network beside Debian's firewalld, ufw and docker.io; make test-vms has it on machines
	NBAGENT_ALL_MACHINES=1 $(PYTEST) tests/integration/test_firewalls.py -k nspawn-bookworm

test-ansible: tools  ## the playbooks of packaging/ansible install and change a fleet of test hosts
	$(PYTEST) -x tests/ansible

test-arm64: tools    ## modules, unit tests and system call filters with Debian's Python for arm64, by QEMU's user emulation
	$(PYTEST) tests/arm64

test-dns: tools debs  ## records of hosts with BIND and Knot, a gateway that follows, and certificates by certbot from Pebble
	$(PYTEST) -x tests/names

test-monitoring: tools debs  ## alert rules and dashboard with Debian's Prometheus, which scrapes a fleet of test hosts
	$(PYTEST) tests/monitoring

test-cdn: tools debs  ## assets behind Varnish and from OpenStack Swift by its own and S3's API, with Chromium
	@tests/cdn/install-tools
	$(PYTEST) tests/cdn

test-release: tools debs  ## packages are the same from two machines, have bills of materials, and pass their DEP-8 tests
	$(PYTEST) tests/release

uncharged: tools     ## every kind of memory of the kernel in tests/integration/uncharged.py; make test tries some
	NBAGENT_ALL_KINDS=1 $(PYTEST) tests/integration/test_uncharged.py

chaos: tools debs    ## random faults under users and claims, by a seed; CHAOS="--faults 1000 --seed 7"
	$(PYTHON) tests/chaos/chaos.py $(CHAOS)

test-upgrade: tools debs  ## upgrades, a downgrade, reloads and restarts under users and claims; CHAOS="--users 50"
	$(PYTHON) tests/chaos/upgrade.py $(CHAOS)

soak: tools debs     ## thousands of claims and idle connections leave no trace; CHAOS="--claims 10000"
	$(PYTHON) tests/chaos/soak.py $(CHAOS)

exhausted: tools debs  ## resources of a host are used up: claims get slots or 503, alarms name the cause, and no restart is needed
	$(PYTHON) tests/chaos/exhausted.py $(CHAOS)

test-doctor: tools debs  ## nbagent doctor names each fault of a list while it lasts, with the remedy, and is silent afterwards
	$(PYTHON) tests/chaos/diagnoses.py $(CHAOS)

conformance: tools   ## jupyter_server's and ipykernel's own tests in slots and with a plain server; make test runs a part
	NBAGENT_CONFORMANCE=all $(PYTEST) -s tests/integration/test_conformance.py

test-ui: tools       ## JupyterLab's own tests of its user interface, with Chromium, by turns; UI="all" or files
	NBAGENT_CONFORMANCE=ui $(PYTEST) -s tests/integration/test_conformance.py

versions: tools debs  ## images with versions of Python and Jupyter are imported, forked and tried; VERSIONS="--only NAME"
	$(PYTHON) tests/versions/versions.py $(VERSIONS)

extensions: tools debs  ## extensions of the notebook server in a forked slot and with a plain server, with Chromium
	$(PYTHON) tests/versions/extensions.py $(VERSIONS)

preloads: tools debs  ## large libraries as preloaded modules: which ones a zygote keeps, and what that saves
	$(PYTHON) tests/versions/preloads.py $(VERSIONS)

libraries: tools debs  ## libraries with threads in a slot with a quota of 2 of 16 processors, beside tuned ones; VERSIONS="--rounds 3"
	$(PYTHON) tests/versions/libraries.py $(VERSIONS)

fuzz: tools          ## fuzzes the decoders of untrusted bytes, 60 s each; FUZZ="--seconds 600 tar"
	@tests/fuzz $(FUZZ)
	NBAGENT_HYPOTHESIS=deep $(PYTEST) -q tests/unit/test_protocol_properties.py

check: tools         ## ruff, mypy, import-linter, shell syntax, lintian
	@tests/check

bench: bench-tools debs          ## figures beside systemd-run, JupyterHub and podman; BENCH="--rounds 1" is the quick one
	$(PYTHON) tests/bench/bench.py $(BENCH)

bench-density: bench-tools debs  ## a thousand live users on a host of its own; BENCH="--users 30"
	$(PYTHON) tests/bench/density.py $(BENCH)

bench-compressed: tools debs     ## slots at rest in compressed memory, on a virtual machine; BENCH="--slots 2"
	$(PYTHON) tests/bench/compressed.py $(BENCH)

bench-fleet: bench-tools debs    ## what a gateway costs and how it distributes claims; BENCH="--quick"
	$(PYTHON) tests/bench/fleet.py $(BENCH)

bench-neighbour: bench-tools debs  ## the delay of cells beside a user who loads the host; BENCH="--rounds 1 --only fork"
	$(PYTHON) tests/bench/neighbour.py $(BENCH)

bench-page: bench-tools debs     ## from the url to a cell's result in Chromium, beside a bare jupyter lab; BENCH="--rounds 1"
	$(PYTHON) tests/bench/page.py $(BENCH)

bench-tools: tools
	@tests/bench/install-tools

image:               ## the package of images/minimal
	@packaging/build-image-deb minimal $(DIST)

debs: image          ## all packages
	@packaging/build-deb $(DIST)

sbom: debs           ## a bill of materials in CycloneDX beside each package
	@packaging/build-sbom $(DIST) $(DIST)/*.deb

updates: image       ## updates of Debian that the package of images/minimal does not have; fails when one is for security
	@packaging/pending-updates $(DIST)/nbagent-image-minimal_*.deb

repo: tools debs     ## a signed apt repository in REPO for hosts that get it from REPO_URL; NBAGENT_REPO_KEY signs it
	@packaging/build-repo $(REPO) $(REPO_URL) $(DIST)/*.deb
	@packaging/build-sbom $(REPO)/sbom $(DIST)/*.deb >/dev/null
	@echo "$(REPO)/nbagent.sources is the file for /etc/apt/sources.list.d of the hosts"

tools:
	@tests/install-tools

clean: down
	rm -rf $(DIST)
