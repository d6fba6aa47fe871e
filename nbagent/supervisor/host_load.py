# SPDX-License-Identifier: BSD-3-Clause
"""The load of the host: its memory and capacity, what its slots take, and whether it drains."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import psutil

from nbagent.config.host_config import CurrentConfig
from nbagent.core.model import SlotState, now
from nbagent.linux import cgroup
from nbagent.linux.cgroup import Cgroup
from nbagent.policy import admission
from nbagent.policy.admission import MemoryUse, Pressure
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.zygotes import Zygotes

T = TypeVar("T")
# Reading /proc/meminfo takes longer than the rest of an event. Starts of the last 0.1 s have touched a few MiB that are
# then counted neither as set aside nor as used.
MEMORY_AGE_S = 0.1
# The use of all slots is read once a second, and its growth is that of the last ten.
USE_AGE_S, GROWTH_READS = 1.0, 10
# The kernel computes its averages of pressure anew every two seconds.
PRESSURE_AGE_S = 2.0
RETRY_MAX_S = 60


class Memory(NamedTuple):
    """The host's memory, and the part of it that processes can still get."""

    total_bytes: int
    available_bytes: int


def read_memory() -> Memory:
    """The host's memory now."""
    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.available)


def read_pressure(slots: Cgroup | None) -> Pressure:
    """The pressure on the host now; that on memory is of all slots together, `slots`, where cgroup v2 measures it.

    The supervisor's own reclaim of idle slots (memory.reclaim) waits for memory too, and is not in that.
    """
    memory = cgroup.pressure("memory") if slots is None else slots.memory_pressure()
    return Pressure(cgroup.pressure("cpu"), memory, cgroup.pressure("io"))


class _Read(NamedTuple):
    """The memory of all slots at one time, and how many were claimed."""

    at_s: float
    claimed: int
    memory_bytes: int


class _Recent(Generic[T]):
    """A value that is read again when it is older than `age_s`. If that fails, the former one is still in force."""

    def __init__(self, read: Callable[[], T], age_s: float) -> None:
        self._read, self._age_s = read, age_s
        self._value: T | None = None
        self._read_s = -math.inf

    def value(self) -> T:
        if self._value is None or now() >= self._read_s + self._age_s:
            try:
                self._value, self._read_s = self._read(), now()
            except OSError:  # no free descriptor, for example
                if self._value is None:
                    raise
        return self._value


class HostLoad:
    """The load of the host. The host drains while `drain_file` exists, so that it does over a restart as well."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, zygotes: Zygotes, drain_file: Path,
        memory: Callable[[], Memory] = read_memory, pressure: Callable[[Cgroup | None], Pressure] = read_pressure,
    ) -> None:
        self._config = config
        self._slots = slots
        self._zygotes = zygotes
        self._drain_file = drain_file
        # The host drains although its file was not created.
        self._drains_unrecorded = False
        self._memory = _Recent(memory, MEMORY_AGE_S)
        self._pressure = _Recent(lambda: pressure(self._all_slots()), PRESSURE_AGE_S)
        self._uses: deque[_Read] = deque(maxlen=GROWTH_READS)
        # os.cpu_count() reads a file at each call.
        self.cpus = os.cpu_count() or 1

    @property
    def draining(self) -> bool:
        """Whether the host refuses claims."""
        if self._drains_unrecorded:
            self.set_draining(True)
        return self._drains_unrecorded or self._drain_file.exists()

    def set_draining(self, draining: bool) -> None:
        """Starts or ends draining. A reboot ends it as well, because the file is on a tmpfs.

        While that is full, a drain is in force without the file, because a host without room has to be drained.
        """
        self._drains_unrecorded = False
        if not draining:
            self._drain_file.unlink(missing_ok=True)
            return
        try:
            self._drain_file.touch()
        except OSError:
            self._drains_unrecorded = True

    def host(self) -> admission.Host:
        """The host as the policy takes it."""
        config, starting = self._config.value, Counter[str]()
        for image, count in self._slots.count_by_image(SlotState.STARTING).items():
            starting[self._zygotes.launch(image)] += count
        reserve_bytes, memory = config.host.memory_reserve, self._memory.value()
        return admission.Host(
            capacity=self._capacity(),
            live=len(self._slots),
            starts=admission.under_way(starting),
            starts_max=config.pool.starts or self.cpus,
            memory_available_bytes=memory.available_bytes,
            memory_reserve_bytes=reserve_bytes,
            draining=self.draining,
            pressure=self._pressure.value(),
            kept_bytes=reserve_bytes + admission.burst_bytes(memory.total_bytes, config.slots.memory),
        )

    def _capacity(self) -> int:
        slots, memory = self._config.value.slots, self._memory.value()
        if slots.capacity is not None:
            return slots.capacity
        if slots.overcommit is not None:
            return admission.promised(memory.total_bytes, slots.memory, slots.overcommit)
        return admission.fitting(
            len(self._slots), self._use(), memory.total_bytes, memory.available_bytes,
            self._config.value.host.memory_reserve, slots.memory, self._pressure.value(),
        )

    def _all_slots(self) -> Cgroup | None:
        """The cgroup of all slots, None while there is none."""
        groups = (live.cgroup for live in self._slots.values() if live.cgroup is not None)
        slot = next(groups, None)
        return None if slot is None else slot.parent()

    def _use(self) -> MemoryUse:
        at_s, uses = now(), self._uses
        if not uses or at_s >= uses[-1].at_s + USE_AGE_S:
            slots = self._all_slots()
            memory_bytes = slots.unreclaimable_bytes() if slots is not None else 0
            uses.append(_Read(at_s, self._slots.count(SlotState.CLAIMED), memory_bytes))
        first, last = uses[0], uses[-1]
        use = MemoryUse(last.claimed, last.memory_bytes)
        if last.at_s <= first.at_s:
            return use
        # New slots take memory too, but that is expected of them.
        new_bytes = (last.claimed - first.claimed) * admission.expected_bytes(use)
        growth_bytes = last.memory_bytes - first.memory_bytes - max(0, new_bytes)
        return replace(use, growth_bytes_s=max(0.0, growth_bytes / (last.at_s - first.at_s)))

    def room(self, host: admission.Host, image: str) -> int:
        """How many more slots of an image may be started."""
        return admission.room(host, self._zygotes.launch(image))

    def launch(self, image: str) -> tuple[str, str]:
        """How slots of an image start now, and why not by a fork of a complete zygote; "" where they do."""
        return self._zygotes.launch(image), self._zygotes.reason(image)

    def next_end_s(self) -> float | None:
        """Seconds until the time of the first claimed slot is up, None without one."""
        ends = [live.slot.expires_s for live in self._slots.values() if live.slot.expires_s is not None]
        return max(0.0, round(min(ends) - now(), 1)) if ends else None

    def retry_after_s(self) -> int:
        """When a refused claim has a chance again."""
        next_end_s = self.next_end_s()
        return 1 if next_end_s is None else max(1, min(RETRY_MAX_S, math.ceil(next_end_s)))
