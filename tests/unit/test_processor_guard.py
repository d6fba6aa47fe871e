# SPDX-License-Identifier: BSD-3-Clause
"""The guard of processors with files of a cgroup tree and the idle time of a host that a test sets."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeSystemd, kinds

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core.events import Event
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.linux.cgroup import Cgroup
from nbagent.supervisor import host_load
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.memory_guard import MemoryGuard
from nbagent.supervisor.processor_guard import (
    LOG_INTERVAL_S,
    RETRY_S,
    SAMPLE_INTERVAL_S,
    TURN,
    ProcessorGuard,
    read_idle,
)
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.tasks import Tasks

LIMITS = Limits(1 << 30, 100, None, 256)
SLOT = Slot(
    id="c07-0", image="minimal", digest="sha256-0", id_base=1 << 20, uid=2000, state=SlotState.CLAIMED, limits=LIMITS,
    token="", created_s=0.0, claimed_s=0.0,
)


class Machine:
    """A host of two processors whose slots use what a test sets, and its guard."""

    def __init__(self, path: Path, clock: Any) -> None:
        self.path, self.clock, self.slots = path, clock, Slots()
        self.config = CurrentConfig(host_config.parse({}))
        self.systemd, self.counters, self.idle_s = FakeSystemd(), Counters(), 0.0
        self.tasks = Tasks()
        self.limits = ScopeLimits(self.systemd, self.tasks)
        self.used_s: dict[str, float] = {}
        self.guard = ProcessorGuard(self.config, self.slots, self.limits, self.counters, 2, lambda: self.idle_s)

    def add(self, name: str, state: SlotState = SlotState.CLAIMED, **changes: Any) -> RunningSlot:
        directory = self.path / name
        directory.mkdir()
        slot = dataclasses.replace(SLOT, id=name, state=state, **changes)
        live = RunningSlot(slot, cgroup=Cgroup(str(directory), str(directory), str(directory)))
        self.slots.add(live)
        self.use(name, 0.0)
        return live

    def use(self, name: str, seconds: float) -> None:
        self.used_s[name] = self.used_s.get(name, 0.0) + seconds
        (self.path / name / "cpu.stat").write_text(f"usage_usec {self.used_s[name] * 1e6:.0f}\nuser_usec 0\n")

    async def run(self, seconds: float, **used: float) -> None:
        """Samples for some time, in which slots use so many processors, and the rest is idle."""
        for _ in range(round(seconds / SAMPLE_INTERVAL_S)):
            self.clock.advance(SAMPLE_INTERVAL_S)
            for name, part in used.items():
                self.use(name, part * SAMPLE_INTERVAL_S)
            self.idle_s += max(0.0, 2 - sum(used.values())) * SAMPLE_INTERVAL_S
            await self.guard.sample()

    def weight(self, name: str) -> int | None:
        found = self.systemd.limits.get(f"nbagent-{name}.scope")
        return None if found is None else found.cpu_weight


@pytest.fixture
def clock(clock: Any) -> Any:
    """Stopped, because the guard divides what was used by the time."""
    clock.stop()
    return clock


@pytest.fixture
def machine(tmp_path: Path, clock: Any) -> Machine:
    return Machine(tmp_path, clock)


async def test_a_slot_that_computes_on_a_full_host_gives_way_until_it_rests(machine: Machine, journal) -> None:
    computes = machine.add("computes")
    machine.add("cells")
    machine.add("warm", SlotState.WARM)
    await machine.run(3, computes=0.8, warm=0.1, cells=0.02)
    assert machine.systemd.limits == {} and not journal
    await machine.run(2, computes=1.9, warm=0.6, cells=0.02)
    assert machine.systemd.limits == {"nbagent-computes.scope": dataclasses.replace(LIMITS, cpu_weight=5)}
    assert computes.limits_in_force.cpu_weight == 5 and computes.slot.limits == LIMITS
    assert computes.document(0.0, 0.0)["limits_in_force"]["cpu_weight"] == 5
    entry, = journal
    assert entry["MESSAGE"] == (
        "slot computes computes while no processor of the host is free: "
        "its CPUWeight= is 5 instead of 100 until it rests"
    )
    # A free processor does not end it.
    await machine.run(5, computes=0.8)
    assert machine.weight("computes") == 5
    await machine.run(2, computes=0.01)
    assert machine.weight("computes") == 100 and computes.limits_in_force == LIMITS
    assert machine.counters.values["gave_way"] == 1


async def test_an_update_of_the_weight_and_the_guard_do_not_undo_each_other(machine: Machine) -> None:
    live = machine.add("computes")
    await machine.run(3, computes=2.0)
    await machine.limits.set(live, dataclasses.replace(LIMITS, cpu_weight=400, memory_bytes=1 << 29))
    assert machine.systemd.limits["nbagent-computes.scope"] == Limits(1 << 29, 20, None, 256)
    await machine.run(3, computes=2.0)
    assert machine.weight("computes") == 20
    await machine.run(3, computes=0.0)
    assert machine.systemd.limits["nbagent-computes.scope"] == live.slot.limits == Limits(1 << 29, 400, None, 256)


async def test_updates_and_the_guard_at_one_time_leave_the_last_of_both(machine: Machine, monkeypatch) -> None:
    live, done = machine.add("computes"), []

    async def slowly(name: str, limits: Limits) -> None:
        await asyncio.sleep(0.01 if not done else 0)
        done.append(limits)

    monkeypatch.setattr(machine.systemd, "set_limits", slowly)
    await asyncio.gather(
        machine.limits.lower(live, cpu_part=0.05),
        machine.limits.set(live, dataclasses.replace(LIMITS, cpu_weight=200)),
        machine.limits.lower(live, memory_bytes=1 << 28),
    )
    assert done[-1] == live.limits_in_force == Limits(1 << 28, 10, None, 256)


async def test_an_update_that_systemd_refuses_leaves_the_limits_in_force(machine: Machine) -> None:
    live = machine.add("computes")
    await machine.run(3, computes=2.0)
    before = live.limits_in_force
    machine.systemd.limits_error = OSError("no")
    with pytest.raises(OSError, match="no"):
        await machine.limits.set(live, dataclasses.replace(LIMITS, cpu_weight=400))
    assert live.limits_in_force == before and live.slot.limits == LIMITS
    await machine.tasks.cancel()


async def test_the_guard_follows_the_setting_at_a_reload(machine: Machine) -> None:
    machine.add("computes")
    await machine.run(3, computes=2.0)
    machine.config.value = host_config.parse({"slots": {"cpu_weight_busy": 0.2}})
    await machine.run(SAMPLE_INTERVAL_S, computes=2.0)
    assert machine.weight("computes") == 20
    machine.config.value = host_config.parse({"slots": {"cpu_weight_busy": 1}})
    await machine.run(SAMPLE_INTERVAL_S, computes=2.0)
    assert machine.weight("computes") == 100
    machine.systemd.limits.clear()
    await machine.run(5, computes=2.0)
    assert machine.systemd.limits == {} and machine.counters.values["gave_way"] == 1


async def test_a_weight_that_systemd_refuses_is_reported_and_tried_again_later(machine: Machine, journal) -> None:
    machine.add("computes")
    machine.systemd.limits_error = OSError("no")
    await machine.run(5, computes=2.0)
    assert kinds(journal) == [Event.SLOT_WEIGHT_KEPT] and machine.counters.values["gave_way"] == 0
    machine.systemd.limits_error = None
    await machine.run(RETRY_S, computes=2.0)
    assert machine.weight("computes") == 5
    await machine.tasks.cancel()


async def test_the_journal_has_one_entry_of_a_slot_in_ten_minutes(machine: Machine, journal) -> None:
    for name in ("one", "other"):
        machine.add(name)
    for _ in range(10):
        await machine.run(2, one=1.0, other=1.0)
        await machine.run(3, one=0.0, other=0.0)
    assert machine.counters.values["gave_way"] == 20
    assert kinds(journal) == [Event.SLOT_GIVES_WAY] * 2
    machine.clock.advance(LOG_INTERVAL_S)
    await machine.run(3, one=0.0, other=0.0)
    await machine.run(2, one=2.0)
    assert kinds(journal) == [Event.SLOT_GIVES_WAY] * 3


async def test_a_slot_that_ended_is_forgotten_and_is_no_warning(machine: Machine, journal, monkeypatch) -> None:
    live = machine.add("computes")
    await machine.run(3, computes=2.0)
    ends, set_limits = machine.add("ends"), machine.systemd.set_limits

    async def ended(name: str, limits: Limits) -> None:
        ends.slot = ends.slot.to(SlotState.STOPPING)
        raise FileNotFoundError("Unit nbagent-ends.scope not loaded.")

    monkeypatch.setattr(machine.systemd, "set_limits", ended)
    await machine.run(3, computes=1.0, ends=1.0)
    monkeypatch.setattr(machine.systemd, "set_limits", set_limits)
    live.slot = live.slot.to(SlotState.STOPPING)
    machine.slots.remove(live)
    machine.systemd.limits.clear()
    await machine.run(3)
    assert machine.systemd.limits == {} and not machine.guard._giving
    assert kinds(journal) == [Event.SLOT_GIVES_WAY]


async def test_the_slots_of_a_host_with_a_free_processor_are_not_read(machine: Machine, monkeypatch) -> None:
    for number in range(2 * TURN):
        machine.add(f"s{number}")
    reads = []
    monkeypatch.setattr(Cgroup, "cpu_s", lambda self: reads.append(self) or 0.0)
    await machine.run(5, s0=0.8)
    assert reads == []
    await machine.run(SAMPLE_INTERVAL_S, s0=2.0)
    assert len(reads) == 2 * TURN


async def test_the_guards_go_on_when_a_file_of_the_host_cannot_be_read(machine: Machine) -> None:
    sampled = asyncio.Event()

    def read() -> Any:
        if failures:
            raise OSError(errno.EMFILE, failures.pop())
        sampled.set()
        raise OSError(errno.EIO, "again")

    memory = MemoryGuard(machine.config, machine.slots, machine.limits, machine.counters, read)
    processors = ProcessorGuard(machine.config, machine.slots, machine.limits, machine.counters, 2, read)
    for guard in (memory, processors):
        failures = ["no free descriptor"]
        sampled.clear()
        task = asyncio.create_task(guard.run())
        await asyncio.wait_for(sampled.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_the_former_load_of_the_host_is_in_force_while_it_cannot_be_read(clock) -> None:
    values: list[int] = [7]
    recent = host_load._Recent(lambda: values.pop() if values else os.stat("/nonexistent").st_size, 1.0)
    assert recent.value() == 7
    clock.advance(2.0)
    assert recent.value() == 7
    values.append(8)
    assert recent.value() == 8
    with pytest.raises(FileNotFoundError):
        host_load._Recent(lambda: os.stat("/nonexistent").st_size, 1.0).value()


def test_the_idle_time_of_this_machine_grows_by_at_most_its_processors(clock) -> None:
    before = read_idle()
    assert read_idle() >= before >= 0
