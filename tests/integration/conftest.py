# SPDX-License-Identifier: BSD-3-Clause
"""Hosts for tests: one with the product, shared by all tests that restore its state.

A test passes only on evidence from the host. At the end of a shared host its journal must hold no unexpected
warning of nbagent and no core dump, and no slot may be left.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated_internet

import product
from notebook import Notebook
from product import Api
from testhost_driver import Host, ending

# Short intervals and a small pool, so that tests see the rules act; a test adds settings of its own.
# A virtual machine that shares two processors takes a minute to start a slot, and a zygote there takes five.
SETTINGS = """
[slots]
memory = "512M"
memory_max = "2G"
start_timeout = "20min"
[pool]
warm = 1
[cull]
interval = "1s"
[api]
allowed_origins = ["https://friend.example"]
"""
# Of a wait for what takes 1 to 20 s on an idle machine, such as the start of a zygote. Others are three times as slow,
# and a virtual machine is emulated beside.
WAIT_TIMEOUT_S = 180.0
# Virtual machines, which have cgroup v2. Each takes 10 minutes of an emulated processor, so that `make test` has one:
# Debian 13, since the other hosts have Debian 12's userland. `make test-vms` has also Debian 12's kernel, and tries
# there what does not depend on the kernel too.
ALL_MACHINES = "NBAGENT_ALL_MACHINES" in os.environ
MACHINES = ("vm-bookworm", "vm-trixie") if ALL_MACHINES else ("vm-trixie",)
# For a test with `any_agent` that `make test` runs on the nspawn host only, and `make test-vms` on the machines too.
machines_when_all = pytest.mark.parametrize(
    "any_shared", ["nspawn-bookworm", *(MACHINES if ALL_MACHINES else ())],
    indirect=True, scope="session",
)
# Warnings that tests provoke, or that this kind of host logs without nbagent.
EXPECTED = re.compile(
    r"Failed to migrate controller cgroups"  # systemd 252 where cgroup v1 is mounted from outside
    r"|Failed to (set|attach|write|remove|adjust|delete)[^:]*(cgroup|cpuset|devices|memory|attribute)"
    r"|nbagent-\S+\.scope: (Stopping timed out|Failed with result 'timeout')"  # slots.stop_timeout is short here
)


# An emulated processor stands still for seconds at times, and a check of the host has then no response in time.
EXPECTED_OF_VM = r"^(router|systemd) fails, so this host offers fewer slots: no response within"


class Agent:
    """The product on one host, with operations that many tests need."""

    def __init__(self, host: Host) -> None:
        self.host, self.api, self.router = host, Api(host), Api(host, product.ROUTER_PORT)
        self.expected = [EXPECTED_OF_VM] if host.driver == "vm" else []

    def claim(self, **options: Any) -> dict[str, Any]:
        return self.api.claim(**options)

    def open(self, **options: Any) -> Notebook:
        """Claims a slot and returns its notebook."""
        return Notebook(self.host, self.claim(**options))

    def release(self, slot: str) -> None:
        """Ends a slot and waits for its removal."""
        self.api.delete(f"/slots/{slot}")
        self.wait(lambda: self.api.get(f"/slots/{slot}").status == 404, f"the removal of {slot}")

    def slots(self, state: str | None = None) -> list[dict[str, Any]]:
        return [slot for slot in self.api.get("/slots").json() if state in (None, slot["state"])]

    def wait(self, what: Callable[[], Any], for_what: str, timeout: float = WAIT_TIMEOUT_S) -> Any:
        """Waits until `what` gives something true."""
        deadline = time.monotonic() + timeout * (4 if self.host.driver == "vm" else 1)
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.1)
        raise AssertionError(f"no {for_what} within {timeout} s")

    def wait_warm(self, count: int = 1) -> None:
        product.wait_warm(self.host, count)

    def run(self, *argv: str, check: bool = True, **options: Any) -> str:
        """Runs a command on the host; returns its output."""
        return str(self.host.run(list(argv), check=check, **options).stdout)

    def journal(self, *match: str) -> list[dict[str, Any]]:
        """Journal entries that match."""
        lines = self.run("journalctl", "--no-pager", "-o", "json", "--all", *match).splitlines()
        return [json.loads(line) for line in lines]

    def agent_check(self) -> str:
        """The line that HAProxy's agent-check would receive on port 9001."""
        with self.host.connect(product.CHECK_PORT) as connection:
            return connection.recv(100).decode()

    def processes(self, slot: str) -> list[int]:
        """The pids of a slot's processes in the host's pid namespace."""
        group = self.run("systemctl", "show", "-P", "ControlGroup", f"nbagent-{slot}.scope").strip()
        script = f"cd /sys/fs/cgroup; cat .{group}/cgroup.procs 2>/dev/null || cat systemd{group}/cgroup.procs"
        return [int(pid) for pid in self.run("sh", "-c", script).split()]

    def configure(self, settings: str) -> None:
        """Sets settings beside the shared ones; '' removes them. Reloads the agent."""
        path = "/etc/nbagent/conf.d/90-one-test.toml"
        if settings:
            self.host.run(["tee", path], input=settings)
        else:
            self.run("rm", "-f", path)
        self.run("systemctl", "reload", "nbagent.service")

    def expect(self, pattern: str) -> None:
        """Allows warnings in the journal that match `pattern`, because the test provokes them."""
        self.expected.append(pattern)

    def check_journal(self) -> None:
        """Fails on an unexpected warning of nbagent and on a core dump."""
        surprises = []
        for entry in self.journal("-p", "warning"):
            text = str(entry.get("MESSAGE"))
            fields = ("_SYSTEMD_UNIT", "UNIT", "SYSLOG_IDENTIFIER", "MESSAGE")
            ours = any("nbagent" in str(entry.get(field)) for field in fields)
            if ours and not EXPECTED.search(text) and not any(re.search(p, text) for p in self.expected):
                surprises.append(f"{entry.get('_SYSTEMD_UNIT')}: {text}")
                if str(entry.get("_SYSTEMD_UNIT")).endswith(".scope"):
                    # The earlier output of the slot, because the slot itself has ended.
                    said = self.journal("-u", str(entry["_SYSTEMD_UNIT"]), "-n", "20")
                    surprises += [f"    {line.get('MESSAGE')}"[:200] for line in said]
        assert not surprises, "unexpected in the journal:\n" + "\n".join(surprises)
        cores = self.run("sh", "-c", "ls /var/lib/systemd/coredump 2>/dev/null; true").strip()
        assert not cores, f"core dumps: {cores}"

    def purge(self) -> str:
        """Purges the packages; returns the output of apt."""
        done = self.host.run(["apt-get", "-q", "purge", "-y", *product.HOST], timeout=900)
        return done.stdout + done.stderr

    def check_remains(self) -> None:
        """Ends every slot and fails when a file, scope, mount, interface or process of one is left."""
        self.api.post("/drain")
        for slot in self.slots():
            self.api.delete(f"/slots/{slot['slot']}")
        self.wait(lambda: not self.slots(), "the removal of all slots")
        left = self.run("sh", "-c", """
            ls /run/nbagent/slots
            systemctl list-units --plain --no-legend 'nbagent-*.scope'
            grep nbagent/sandbox /proc/self/mountinfo
            ip -br link | grep '^nb-'
            pgrep -af 'nbagent[.](runtime[.]exec_slot|content[.]deliver) [0-9]'
            true""")
        assert not left, f"left behind: {left}"
        self.api.delete("/drain")


# The ends of the consoles of virtual machines that have ended, by name, for the report of a failure.
CONSOLES: dict[str, str] = {}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the consoles after failures, because the kernel of a machine that stood still reports nowhere else."""
    if terminalreporter.stats.keys() & {"failed", "error"}:
        for name, lines in CONSOLES.items():
            terminalreporter.section(f"console of {name}")
            terminalreporter.line(lines)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cgroup2: also runs on virtual machines with cgroup v2")


@pytest.fixture(scope="session")
def packages() -> list[Path]:
    """The .debs of this checkout."""
    return product.build(product.say)


def made(packages: list[Path], name: str, driver: str, suite: str) -> Iterator[Agent]:
    """A host with the product; afterwards its journal and remains are checked."""
    host = Host.up(name=f"{name}-{os.getpid()}"[:16], driver=driver, suite=suite)
    try:
        before = product.listing(host)
        product.install(host, packages, SETTINGS)
        agent = Agent(host)
        yield agent
        if ending.is_ending():
            return
        agent.check_remains()
        agent.check_journal()
        if driver == "vm" and not ALL_MACHINES:
            return
        agent.purge()
        left = [line for line in product.listing(host) - before if "nbagent" in line and " /root/" not in line]
        assert not left, f"left by purge: {left}"
    finally:
        if driver == "vm":
            CONSOLES[host.name] = host.console_end()
        host.down(now=ending.is_ending())


@pytest.fixture(scope="session")
def shared(packages: list[Path]) -> Iterator[Agent]:
    """The nspawn host that most tests share; use `agent`, which restores its state after each test."""
    yield from made(packages, "t", "nspawn", "bookworm")


@pytest.fixture
def agent(shared: Agent) -> Iterator[Agent]:
    """The shared host; the slots and settings of the test are removed after it."""
    yield from tidied(shared)


@pytest.fixture(scope="session", params=["nspawn-bookworm", *MACHINES])
def any_shared(request: pytest.FixtureRequest, packages: list[Path]) -> Iterator[Agent]:
    """Each kind of host in turn: cgroup v1 at native speed, and cgroup v2."""
    driver, suite = request.param.split("-")
    if driver == "nspawn":
        yield request.getfixturevalue("shared")
    else:
        yield from made(packages, suite[:4], driver, suite)


@pytest.fixture
def any_agent(any_shared: Agent) -> Iterator[Agent]:
    """As `agent`, on each kind of host."""
    yield from tidied(any_shared)


@pytest.fixture(scope="module")
def internet(shared: Agent) -> Iterator[Agent]:
    """The shared host with the internet attached, and slots that may reach it."""
    yield from simulated_internet.attached(shared)


@pytest.fixture(scope="module")
def slot(internet: Agent) -> Iterator[simulated_internet.Slot]:
    """A slot that reaches the internet; shared by a module, because a kernel takes seconds to start."""
    found = simulated_internet.Slot(internet, network="internet")
    yield found
    found.release()


def tidied(shared: Agent) -> Iterator[Agent]:
    """A shared host for one test, restored after it."""
    shared.wait_warm()
    yield shared
    shared.host.run(["systemctl", "start", "nbagent.service", "nbagent-api.service", "nbagent-router.service"])
    shared.wait(lambda: shared.api.get("/healthz").status == 200, "the API to respond")
    if shared.run("sh", "-c", "ls /etc/nbagent/conf.d/90-one-test.toml 2>/dev/null; true"):
        shared.configure("")
    for slot in shared.slots():
        if slot["claimed_at"]:
            shared.api.delete(f"/slots/{slot['slot']}")
