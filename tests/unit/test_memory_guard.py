# SPDX-License-Identifier: BSD-3-Clause
"""The guard of the host's memory with files of a cgroup tree, and the memory use of slots that admission gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeSystemd, FakeZygotes

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.linux import cgroup
from nbagent.linux.cgroup import Cgroup
from nbagent.policy.admission import Pressure
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.host_load import HostLoad, Memory, read_pressure
from nbagent.supervisor.memory_guard import MemoryGuard
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.tasks import Tasks

MIB, GIB = 1 << 20, 1 << 30
LIMITS = Limits(GIB, 100, None, 256)
SLOT = Slot(
    id="c07-0", image="minimal", digest="sha256-0", id_base=1 << 20, uid=2000, state=SlotState.CLAIMED, limits=LIMITS,
    token="", created_s=0.0, claimed_s=0.0,
)


class Tree:
    """A slice with slots in it, whose memory the tests set."""

    def __init__(self, path: Path) -> None:
        self.path, self.slots, self.tasks = path, Slots(), Tasks()
        self.available_bytes = 20 * GIB

    def add(self, name: str, used_bytes: int, state: SlotState = SlotState.CLAIMED) -> RunningSlot:
        directory = self.path / f"nbagent-{name}.scope"
        directory.mkdir(parents=True)
        slot = dataclasses.replace(SLOT, id=name, state=state)
        live = RunningSlot(slot, cgroup=Cgroup(str(directory), str(directory), str(directory)))
        self.slots.add(live)
        self.use(name, used_bytes)
        return live

    def use(self, name: str, used_bytes: int, cache_bytes: int = 0) -> None:
        (self.path / f"nbagent-{name}.scope" / "memory.current").write_text(f"{used_bytes}\n")
        total = sum(int(file.read_text()) for file in self.path.glob("*/memory.current"))
        (self.path / "memory.current").write_text(f"{total + cache_bytes}\n")
        (self.path / "memory.stat").write_text(f"anon {total}\ninactive_file {cache_bytes}\n")

    def memory(self) -> Memory:
        return Memory(24 * GIB, self.available_bytes)

    def guard(self, systemd: FakeSystemd, counters: Counters) -> MemoryGuard:
        limits = ScopeLimits(systemd, self.tasks)
        return MemoryGuard(CurrentConfig(host_config.parse({})), self.slots, limits, counters, self.memory)


@pytest.fixture
def clock(clock: Any) -> Any:
    """Stopped, because the guard divides what was used by the time."""
    clock.stop()
    return clock


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "nbagent-slots.slice")


async def test_slots_that_grow_on_a_short_host_are_held_and_freed(tree: Tree, clock, journal) -> None:
    systemd, counters = FakeSystemd(), Counters()
    guard = tree.guard(systemd, counters)
    for name in ("c07-grows", "c07-rests"):
        tree.add(name, 100 * MIB)
    tree.add("c07-warm", 100 * MIB, SlotState.WARM)

    async def sample() -> None:
        await guard.sample()
        clock.advance(0.5)

    tree.available_bytes = 2 * GIB
    await sample()
    for name in ("c07-grows", "c07-warm"):
        tree.use(name, 300 * MIB)
    await sample()
    # Not short: the one slot that may be held cannot take more than its limit.
    assert systemd.limits == {} and counters.values["held"] == 0
    tree.available_bytes = 300 * MIB
    await sample()
    assert systemd.limits == {"nbagent-c07-grows.scope": dataclasses.replace(LIMITS, memory_bytes=332 * MIB)}
    assert counters.values["held"] == 1
    tree.available_bytes = 20 * GIB
    await sample()
    assert systemd.limits["nbagent-c07-grows.scope"] == LIMITS
    printed = [entry["MESSAGE"] for entry in journal]
    assert printed[0] == (
        "slot c07-grows may not grow: its limit is 332M instead of 1G, because the host has only 300M available"
    )
    assert printed[1] == "slot c07-grows may grow again: its limit is 1G"


async def test_a_limit_that_systemd_refuses_is_tried_again(tree: Tree, clock) -> None:
    systemd, counters = FakeSystemd(), Counters()
    guard = tree.guard(systemd, counters)
    tree.add("c07-grows", 100 * MIB)
    tree.available_bytes = 300 * MIB
    await guard.sample()
    tree.use("c07-grows", 200 * MIB)
    systemd.limits_error = OSError("no")
    await guard.sample()
    systemd.limits_error = None
    clock.advance(0.5)
    await guard.sample()
    assert systemd.limits["nbagent-c07-grows.scope"].memory_bytes == 232 * MIB
    await tree.tasks.cancel()


async def test_a_slot_that_ended_is_forgotten(tree: Tree, clock) -> None:
    systemd = FakeSystemd()
    guard = tree.guard(systemd, Counters())
    live = tree.add("c07-grows", 100 * MIB)
    tree.available_bytes = 300 * MIB
    await guard.sample()
    tree.use("c07-grows", 200 * MIB)
    await guard.sample()
    tree.slots.remove(live)
    systemd.limits.clear()
    tree.available_bytes = 20 * GIB
    await guard.sample()
    assert systemd.limits == {} and not guard._held


async def test_an_update_of_a_held_slot_keeps_it_held_and_is_in_force_when_it_is_freed(tree: Tree, clock) -> None:
    systemd, scope = FakeSystemd(), "nbagent-c07-grows.scope"
    limits = ScopeLimits(systemd, tree.tasks)
    guard = MemoryGuard(CurrentConfig(host_config.parse({})), tree.slots, limits, Counters(), tree.memory)
    live = tree.add("c07-grows", 100 * MIB)
    tree.available_bytes = 300 * MIB
    await guard.sample()
    tree.use("c07-grows", 200 * MIB)
    await guard.sample()
    assert systemd.limits[scope] == live.limits_in_force == dataclasses.replace(LIMITS, memory_bytes=232 * MIB)
    larger = Limits(2 * GIB, 50, 0.5, 256)
    await limits.set(live, larger)
    assert systemd.limits[scope] == dataclasses.replace(larger, memory_bytes=232 * MIB)
    smaller = dataclasses.replace(larger, memory_bytes=220 * MIB)
    await limits.set(live, smaller)
    assert systemd.limits[scope] == smaller
    await limits.set(live, larger)
    clock.advance(0.5)
    await guard.sample()
    assert systemd.limits[scope].memory_bytes == 232 * MIB
    tree.available_bytes = 20 * GIB
    await guard.sample()
    assert systemd.limits[scope] == live.limits_in_force == live.slot.limits == larger
    assert live.document(0.0, 0.0)["limits_in_force"] == larger.document()


async def test_a_slot_that_ends_while_its_limit_is_set_is_no_warning(tree: Tree, clock, journal, monkeypatch) -> None:
    systemd = FakeSystemd()
    guard = tree.guard(systemd, Counters())
    live = tree.add("c07-grows", 100 * MIB)
    tree.available_bytes = 300 * MIB
    await guard.sample()
    tree.use("c07-grows", 200 * MIB)

    async def set_limits(name: str, limits: Limits) -> None:
        live.slot = live.slot.to(SlotState.STOPPING)
        raise FileNotFoundError("Unit nbagent-c07-grows.scope not loaded.")

    monkeypatch.setattr(systemd, "set_limits", set_limits)
    await guard.sample()
    assert not journal and not guard._held


def test_admission_gets_the_memory_of_the_slice_without_cache_and_its_growth(tree: Tree, tmp_path: Path, clock) -> None:
    load = HostLoad(
        CurrentConfig(host_config.parse({})), tree.slots, FakeZygotes(), tmp_path / "drain", tree.memory,
        lambda _: Pressure(),
    )
    empty = load.host().capacity
    assert 100 < empty < 250
    for number in range(50):
        tree.add(f"c07-{number}", 20 * MIB)
    clock.advance(1)
    at_rest = load.host().capacity
    assert at_rest > 1.5 * empty
    tree.use("c07-0", 20 * MIB, cache_bytes=5 * GIB)
    clock.advance(1)
    assert abs(load.host().capacity - at_rest) < 40
    for number in range(50):
        tree.use(f"c07-{number}", 60 * MIB)
    clock.advance(1)
    assert load.host().capacity < 0.7 * at_rest


def test_the_pressure_on_memory_is_that_of_all_slots_and_the_other_that_of_the_host(tree: Tree, tmp_path: Path) -> None:
    """With slots on cgroup v2; a kernel without PSI has no such files."""
    live = tree.add("c07-0", 20 * MIB)
    slots = live.cgroup.parent()
    (tree.path / "memory.pressure").write_text(
        "some avg10=12.34 avg60=5.00 avg300=1.00 total=123\nfull avg10=7.00 avg60=0.00 avg300=0.00 total=45\n"
    )
    assert slots.memory_pressure() == read_pressure(slots).memory == 12.34
    (tree.path / "memory.pressure").unlink()
    assert slots.memory_pressure() == 0.0
    of_host = Path("/proc/pressure/cpu")
    assert 0.0 <= cgroup.pressure("cpu") <= 100.0
    assert of_host.exists() or cgroup.pressure("cpu") == 0.0


def test_the_host_has_the_pressure_of_the_last_seconds_and_what_starts_leave(
    tree: Tree, tmp_path: Path, clock
) -> None:
    read: list[Cgroup | None] = []

    def pressure(slots: Cgroup | None) -> Pressure:
        read.append(slots)
        return Pressure(memory=20.0)

    tree.available_bytes = 8 * GIB
    config = CurrentConfig(host_config.parse({"host": {"memory_reserve": "1G"}}))
    load = HostLoad(config, tree.slots, FakeZygotes(), tmp_path / "drain", tree.memory, pressure)
    host = load.host()
    assert read == [None] and host.pressure.memory == 20.0 and host.kept_bytes == 5 * GIB
    assert host.capacity == 1
    live = tree.add("c07-0", 20 * MIB)
    load.host()
    assert len(read) == 1
    clock.advance(2)
    load.host()
    assert read == [None, live.cgroup.parent()]
    tree.available_bytes = 16 * GIB
    clock.advance(2)
    assert load.host().capacity > 10
