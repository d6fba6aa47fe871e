# SPDX-License-Identifier: BSD-3-Clause
"""Samples of slots: each slot once an interval, few at a time, and the findings are reported."""

import dataclasses
import os

import pytest

from nbagent.config.host_config import CullSettings
from nbagent.core.events import Event
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.linux.cgroup import Cgroup
from nbagent.supervisor import monitor as monitor_module
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.monitor import BATCHES, Monitor
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.tasks import Tasks
from nbagent.wire import activity

SETTINGS = CullSettings(idle=600.0, cpu=0.05, interval=30.0, compress=300.0)
SLOT = Slot(
    id="h-0", image="minimal", digest="d", id_base=1 << 20, uid=2000, state=SlotState.CLAIMED,
    limits=Limits(1 << 30, 100, None, 256), token="t", created_s=0.0, claimed_s=0.0, ttl_s=100000.0,
)


class NoLocks:
    """A guard of locks that is never due."""

    next_s = float("inf")

    def check(self, lives, now_s):
        pass


class World:
    """Claimed slots with a page each and a cgroup of plain files, the events, and the slots that were ended."""

    def __init__(self, directory):
        self.directory, self.ended, self.events, self.counters = directory, [], [], Counters()
        self.at_rest = []
        self.monitor = Monitor(self, self.counters, self, self, Tasks(), NoLocks())

    def offer(self, live):
        self.at_rest.append(live)

    def end(self, live, event, text):
        self.ended.append((live.slot.id, event, text))
        live.slot = live.slot.to(SlotState.STOPPING)

    def claim(self, number, at_s=0.0):
        directory = self.directory / str(number)
        directory.mkdir()
        group = Cgroup(str(directory), str(directory), str(directory))
        live = RunningSlot(dataclasses.replace(SLOT, id=f"h-{number}", claimed_s=at_s), -1, activity.create(), group)
        self.write(live)
        self.monitor.add(live, at_s)
        return live

    def write(self, live, cpu_s=0.0, oom_kills=0, refused=0):
        for name, text in (("cpu.stat", f"usage_usec {cpu_s * 1e6:.0f}\nuser_usec 0\n"), ("memory.current", "4096\n"),
                           ("memory.events", f"oom 0\noom_kill {oom_kills}\n"), ("pids.current", "3\n"),
                           ("pids.events", f"max {refused}\n")):
            with open(f"{live.cgroup.memory}/{name}", "w") as file:
                file.write(text)

    def run(self, lives, until_s):
        """Samples when it is due, as the agent's loop does; returns the most slots at a time and the count."""
        most = times = 0
        while (at_s := self.monitor.next_s(SETTINGS.interval)) < until_s:
            self.monitor.sample(SETTINGS, at_s)
            most, times = max(most, sum(live.sampled_s == at_s for live in lives)), times + 1
        return most, times


@pytest.fixture
def world(tmp_path, monkeypatch):
    world, made = World(tmp_path), []
    create = activity.create
    monkeypatch.setattr(activity, "create", lambda: made.append(create()) or made[-1])
    monkeypatch.setattr(monitor_module, "emit", lambda event, **fields: world.events.append((event, fields)))
    yield world
    for fd in made:
        os.close(fd)


def test_many_slots_claimed_at_once_are_sampled_in_small_batches(world):
    lives = [world.claim(number) for number in range(90)]
    most, times = world.run(lives, 2.5 * SETTINGS.interval)
    assert most <= 90 / BATCHES and times <= 2.5 * BATCHES
    # A whole round is an interval, and the last of it were due at its beginning.
    assert all(live.sampled_s >= SETTINGS.interval for live in lives)


def test_no_sample_is_due_without_slots(world):
    assert world.monitor.next_s(SETTINGS.interval) == float("inf")
    world.claim(1, at_s=5.0)
    assert world.monitor.next_s(SETTINGS.interval) == 5.0 + SETTINGS.interval


def test_a_slot_that_ended_is_not_sampled(world):
    live = world.claim(1)
    live.slot = live.slot.to(SlotState.STOPPING)
    world.monitor.sample(SETTINGS, SETTINGS.interval)
    assert live.sampled_s is None and world.monitor.next_s(SETTINGS.interval) == float("inf")


def test_an_idle_slot_is_culled_and_a_computing_one_is_not(world):
    idle, computing = world.claim(1), world.claim(2)
    for number in range(1, 50):
        world.write(computing, cpu_s=10.0 * number)
        world.monitor.sample(SETTINGS, number * SETTINGS.interval)
        world.monitor.sample(SETTINGS, number * SETTINGS.interval)
    assert [(slot, event) for slot, event, _ in world.ended] == [(idle.slot.id, Event.SLOT_CULLED)]
    assert world.counters.document()["counters"]["culled_idle"] == 1


def test_a_limit_is_reported_once(world):
    live = world.claim(1)
    world.write(live, oom_kills=2, refused=7)
    for number in range(1, 4):
        world.monitor.sample(SETTINGS, number * SETTINGS.interval)
    assert [event for event, _ in world.events] == [Event.SLOT_OOM, Event.SLOT_TASKS_REFUSED]
    assert world.counters.document()["counters"]["oom_kills"] == 2


def test_oom_kills_since_the_last_sample_are_reported_at_the_end(world):
    live = world.claim(1)
    world.write(live, oom_kills=1)
    world.monitor.sample(SETTINGS, SETTINGS.interval)
    world.write(live, oom_kills=3)
    # A document of the slot reads its usage, but is no sample.
    live.document(40.0, 40.0)
    world.monitor._report_last_kills(live)
    assert world.counters.document()["counters"]["oom_kills"] == 3


def test_a_slot_at_rest_is_compressed_and_a_computing_one_is_not(world):
    rests, computes = world.claim(1), world.claim(2)
    for number in range(1, 16):
        world.write(computes, cpu_s=10.0 * number)
        at_s = number * SETTINGS.interval
        for _ in range(2):
            world.monitor.sample(SETTINGS, at_s)
        # At the first sample the use of processors is unknown, so the rest begins then.
        assert world.at_rest == [rests] * (at_s >= SETTINGS.interval + SETTINGS.compress)
        if world.at_rest:
            break
    assert at_s == SETTINGS.interval + SETTINGS.compress
    rests.compressed_s = at_s
    for number in range(16, 19):
        world.write(computes, cpu_s=10.0 * number)
        for _ in range(2):
            world.monitor.sample(SETTINGS, number * SETTINGS.interval)
    assert world.at_rest == [rests]


def test_a_warm_slot_rests_from_its_start_and_has_no_reports(world):
    live = world.claim(1)
    live.slot = dataclasses.replace(live.slot, state=SlotState.WARM, claimed_s=None, ttl_s=None)
    world.write(live, oom_kills=1)
    for number in range(1, 11):
        assert world.at_rest == [] == world.events
        world.monitor.sample(SETTINGS, number * SETTINGS.interval)
    assert world.at_rest == [live] and world.ended == []
    # Its claim begins a new rest.
    live.compressed_s = 300.0
    live.slot = live.slot.to(SlotState.CLAIMED, claimed_s=310.0, ttl_s=100000.0)
    world.monitor.sample(SETTINGS, 330.0)
    assert world.at_rest == [live] and live.sampled_s == 330.0


def test_a_document_reads_usage_that_is_too_old(world):
    live = world.claim(1)
    assert live.document(10.0, 10.0)["oom_kills"] == 0
    world.write(live, oom_kills=5)
    assert live.document(11.0, 10.0)["oom_kills"] == 0
    assert live.document(11.0, 10.5)["oom_kills"] == 5
