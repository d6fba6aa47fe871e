# SPDX-License-Identifier: BSD-3-Clause
"""Admission by what slots really use, and the guard of the host's memory, on simulated hosts with hostile users too.

The model: each tick is the time between two looks of the guard. Users want memory by their trace, and get it up to the
limit of their slot and the rate at which the host can hand out pages. A kernel that wants more than its limit is
killed and keeps a server of 6 MiB. If the available memory of the host reaches zero, its OOM killer would take a
process of anyone, which is the failure that these tests look for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from nbagent.policy import admission, memory_guard
from nbagent.policy.admission import MemoryUse
from nbagent.policy.memory_guard import Growth, HostMemory, SlotMemory

MIB, GIB = 1 << 20, 1 << 30
TICK_S = 0.5
SERVER_BYTES = 6 * MIB
# Each limit takes PID 1 and the supervisor so long, and slots grow meanwhile.
SET_S = 0.002
# The memory that a user wants at a time of the host, in seconds.
Trace = Callable[[float], float]


@dataclass
class User:
    trace: Trace
    limit_bytes: int
    used_bytes: float = SERVER_BYTES
    held_bytes: int | None = None
    killed: bool = False

    def wants(self, at_s: float) -> float:
        return SERVER_BYTES if self.killed else max(SERVER_BYTES, self.trace(at_s))


@dataclass
class SimulatedHost:
    memory_bytes: int = 24 * GIB
    system_bytes: int = 2 * GIB
    reserve_bytes: int = 512 * MIB
    slot_bytes: int = GIB
    pages_bytes_s: float = 2 * GIB
    overcommit: float | None = None
    at_s: float = 0.0
    users: list[User] = field(default_factory=list)
    least_bytes: float = float("inf")
    _available_before: float | None = None
    _growth: Growth = field(default_factory=Growth)

    @property
    def available_bytes(self) -> float:
        return self.memory_bytes - self.system_bytes - sum(user.used_bytes for user in self.users)

    def capacity(self) -> int:
        if self.overcommit is not None:
            return admission.promised(self.memory_bytes, self.slot_bytes, self.overcommit)
        use = MemoryUse(len(self.users), round(sum(user.used_bytes for user in self.users)))
        return admission.fitting(
            len(self.users), use, self.memory_bytes, round(self.available_bytes), self.reserve_bytes, self.slot_bytes
        )

    def admit(self, trace: Trace, most: int) -> int:
        """Lets users come while there is room; returns how many."""
        count = 0
        while count < most and len(self.users) < self.capacity():
            self.users.append(User(trace, self.slot_bytes))
            count += 1
        return count

    def grow(self, seconds: float) -> None:
        self.at_s += seconds
        wanted = {id(user): user.wants(self.at_s) - user.used_bytes for user in self.users}
        demand = sum(more for more in wanted.values() if more > 0)
        part = min(1.0, self.pages_bytes_s * seconds / demand) if demand > 0 else 1.0
        for user in self.users:
            more = wanted[id(user)]
            user.used_bytes += more * part if more > 0 else more
            if user.used_bytes > (user.held_bytes or user.limit_bytes):
                user.killed, user.used_bytes = True, SERVER_BYTES
        self.least_bytes = min(self.least_bytes, self.available_bytes)

    def look(self) -> None:
        """One look of the guard; while it sets limits, slots go on."""
        available = self.available_bytes
        before = available if self._available_before is None else self._available_before
        self._available_before = available
        host = HostMemory(round(available), (before - available) / TICK_S, self.reserve_bytes)
        grown = self._growth.grown(self.at_s, {str(id(user)): round(user.used_bytes) for user in self.users})
        by_name = {str(id(user)): user for user in self.users}
        looks = {
            name: SlotMemory(round(user.used_bytes), grown[name], user.limit_bytes, user.held_bytes)
            for name, user in by_name.items()
        }
        for name, limit_bytes in memory_guard.decide(host, looks).items():
            by_name[name].held_bytes = limit_bytes
            self.grow(SET_S)

    def run(self, seconds: float) -> None:
        end_s = self.at_s + seconds
        while self.at_s < end_s:
            self.grow(TICK_S)
            self.look()

    def deaths(self, trace: Trace) -> int:
        return sum(user.killed for user in self.users if user.trace is trace)


# The time at which the memory of the users below begins to grow.
GROWS_S = 200.0


def rests(_: float) -> float:
    """A user who has run a few cells."""
    return 20 * MIB


def works(_: float) -> float:
    """A user with a table of 700 MiB in memory, since the beginning."""
    return 700 * MIB


def fills(at_s: float) -> float:
    """A user who takes a gigabyte within a minute."""
    return 20 * MIB + max(0.0, at_s - GROWS_S) / 60 * GIB


def loads(at_s: float) -> float:
    """A class that loads the same 300 MiB within half a minute."""
    return 20 * MIB + min(1.0, max(0.0, at_s - GROWS_S) / 30) * 300 * MIB


def test_the_first_users_of_a_host_are_counted_with_a_guess_and_a_thousand_at_rest_fit() -> None:
    host = SimulatedHost()
    assert 100 < host.capacity() < 250
    for _ in range(80):
        host.admit(rests, 20)
        host.run(1)
    assert 900 <= len(host.users) <= 1100
    assert host.available_bytes >= host.reserve_bytes + admission.burst_bytes(host.memory_bytes, host.slot_bytes) - GIB


def test_users_who_need_much_leave_less_room() -> None:
    host = SimulatedHost()
    for _ in range(60):
        host.admit(works, 2)
        host.run(2)
    assert 15 <= len(host.users) <= 30
    assert not host.deaths(works)


def test_growth_leaves_less_room() -> None:
    at_rest = MemoryUse(100, 100 * 20 * MIB)
    growing = MemoryUse(100, 100 * 20 * MIB, growth_bytes_s=100 * MIB)
    fit = [admission.fitting(100, use, 24 * GIB, 20 * GIB, 512 * MIB, GIB) for use in (at_rest, growing)]
    assert fit[0] > 400 and fit[0] - fit[1] > 150


@pytest.mark.parametrize("pages_bytes_s", [GIB / 2, 4 * GIB])
@pytest.mark.parametrize("hostile", [loads, fills])
def test_when_everyone_grows_at_once_only_those_who_grow_lose_their_kernel(
    hostile: Trace, pages_bytes_s: float
) -> None:
    host = SimulatedHost(pages_bytes_s=pages_bytes_s)
    host.admit(works, 3)
    host.run(5)
    while host.at_s < GROWS_S:
        host.admit(hostile, 20)
        host.admit(rests, 5)
        host.run(10)
    assert len(host.users) > 300
    host.run(90)
    assert host.least_bytes > 0, "the kernel's OOM killer would have chosen a process of anyone"
    assert host.deaths(works) == host.deaths(rests) == 0
    assert host.deaths(hostile) > 0


@pytest.mark.parametrize("overcommit", [1.0, 4.0])
def test_with_a_promise_by_limits_only_those_who_grow_lose_their_kernel(overcommit: float) -> None:
    host = SimulatedHost(overcommit=overcommit)
    host.admit(works, 3)
    host.run(5)
    host.admit(rests, 5)
    while host.at_s < GROWS_S:
        host.admit(fills, 20)
        host.run(10)
    assert len(host.users) == 24 * overcommit
    host.run(90)
    assert host.least_bytes > 0
    assert host.deaths(works) == host.deaths(rests) == 0
    # Of each kernel that would exceed its limit, one is killed at its own limit in any case.
    assert host.deaths(fills) > 0


def test_users_who_come_and_fill_their_memory_one_after_another_leave_room_for_each_other() -> None:
    """A queue of hostile users: each begins to grow when it has come, so that the host sees growth at every claim."""
    host = SimulatedHost()
    host.admit(works, 3)
    host.run(5)
    came = 0
    for _ in range(200):
        begins_s = host.at_s
        came += host.admit(lambda at_s, begins_s=begins_s: 20 * MIB + (at_s - begins_s) / 60 * GIB, 2)
        host.run(2)
    assert came > 15
    assert host.least_bytes > 0 and host.deaths(works) == 0


def test_limits_are_restored_when_the_host_has_memory_again() -> None:
    host = SimulatedHost()
    while not any(user.held_bytes is not None for user in host.users):
        assert host.at_s < GROWS_S + 60
        host.admit(fills, 20 if host.at_s < GROWS_S else 0)
        host.run(5)
    for user in host.users:
        user.trace = rests
    host.run(60)
    assert all(user.held_bytes is None for user in host.users)


def test_a_recorded_day_of_users_who_come_and_work_and_leave_loses_no_kernel() -> None:
    """Loads as measured by make bench-density, with pauses: 20 MiB at rest, some tens more for a while."""
    host, chance = SimulatedHost(), random.Random(20261128)

    def work(phase_s: float, most_bytes: float) -> Trace:
        return lambda at_s: 20 * MIB + (most_bytes if (at_s + phase_s) % 600 < 60 else 0)

    for _ in range(200):
        for _ in range(chance.randrange(6)):
            host.admit(work(chance.uniform(0, 600), chance.lognormvariate(3.5, 0.8) * MIB), 1)
        if len(host.users) > 200:
            for _ in range(chance.randrange(4)):
                host.users.pop(chance.randrange(len(host.users)))
        host.run(5)
    assert len(host.users) > 250
    assert not any(user.killed for user in host.users) and host.least_bytes > host.reserve_bytes


def test_a_host_that_is_not_short_holds_none() -> None:
    slots = {name: SlotMemory(500 * MIB, 100 * MIB, GIB) for name in "abcdefgh"}
    assert memory_guard.decide(HostMemory(4 * GIB, 0.0, GIB // 2), slots) == {}
    # One slot takes no more than its limit, as fast as it may be.
    assert memory_guard.decide(HostMemory(4 * GIB, 4.0 * GIB, GIB // 2), {"a": slots["a"]}) == {}
    # Eight would use up the same memory in two seconds.
    assert memory_guard.decide(HostMemory(4 * GIB, 2.0 * GIB, GIB // 2), slots) == dict.fromkeys(slots, 532 * MIB)


def test_growth_counts_over_seconds_and_not_between_two_looks() -> None:
    growth = Growth()
    seen = [growth.grown(at_s, {"a": 100 + round(at_s), "b": 50})["a"] for at_s in range(40)]
    assert seen[0] == 0 and seen[5] == 5 and seen[19] == 19 and min(seen[20:]) >= 10 and max(seen) <= 20
    assert growth.grown(40, {"new": 7}) == {"new": 0}


def test_a_slot_at_rest_and_one_near_its_limit_are_not_held() -> None:
    slots = {
        "rests": SlotMemory(500 * MIB, MIB, GIB), "near": SlotMemory(GIB - MIB, 90 * MIB, GIB),
        "held": SlotMemory(500 * MIB, 90 * MIB, GIB, 520 * MIB), "grows": SlotMemory(100 * MIB, 4 * MIB, GIB),
    }
    assert memory_guard.decide(HostMemory(300 * MIB, 0.0, GIB // 2), slots) == {"grows": 132 * MIB}


def test_the_slot_that_needs_least_is_restored_first_while_its_need_fits() -> None:
    slots = {
        "small": SlotMemory(900 * MIB, 0, GIB, 910 * MIB), "large": SlotMemory(100 * MIB, 0, GIB, 110 * MIB),
        "free": SlotMemory(100 * MIB, 0, GIB),
    }
    assert memory_guard.decide(HostMemory(GIB + 200 * MIB, 0.0, GIB // 2), slots) == {"small": None}
    assert memory_guard.decide(HostMemory(8 * GIB, 0.0, GIB // 2), slots) == {"small": None, "large": None}
