# SPDX-License-Identifier: BSD-3-Clause
"""A bound on the file locks of a slot, which no cgroup is charged for and no limit of the kernel counts.

A process makes 30 to 64 MB of locks a second (tests/integration/uncharged.py), so a slot could take a host's memory in
minutes. SQLite needs locks, so that the system call filter cannot refuse them. The guard reads SUnreclaim of
/proc/meminfo, which has this memory, and after that has grown it counts the newest locks in /proc/locks: the kernel
looks for the beginning of each 4 KiB of that list anew, so that reading a million locks would take minutes. Locks are
counted by process, and by device for those of open file descriptions, which have no process: the file systems of a slot
are its own.

Not for: locks on /dev/null and the like by open file description, whose owner nothing shows.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nbagent.core.events import Event
from nbagent.linux import cgroup
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.tasks import Tasks, in_thread

# Of the newest locks so many are counted, and a slot may have so many of them. SQLite holds three for a connection.
COUNTED_MAX, LOCKS_MAX = 50_000, 10_000
# Growth of SUnreclaim after which locks are counted: 700,000 locks of 190 bytes. And the time between two readings.
GROWTH_BYTES = 128 << 20
READ_S = 5.0
# The directories of a slot's file systems, from its root: the overlay, and its tmpfs at /tmp.
_DIRECTORIES = (".", "tmp")


class LockGuard:
    """Ends slots that hold too many locks. `proc` is /proc."""

    def __init__(self, stopper: SlotStopper, tasks: Tasks, proc: Path = Path("/proc")) -> None:
        self._stopper = stopper
        self._tasks = tasks
        self._proc = proc
        self._read_s = 0.0
        self._base_bytes: int | None = None
        self._counting = False

    @property
    def next_s(self) -> float:
        """The time of the next reading."""
        return self._read_s + READ_S

    def check(self, lives: Callable[[], Sequence[RunningSlot]], now_s: float) -> None:
        """Counts the locks of these slots, in a task, if unreclaimable memory has grown since the last reading."""
        if now_s < self.next_s:
            return
        self._read_s = now_s
        if self._counting:
            return
        try:
            size_bytes = unreclaimable_bytes((self._proc / "meminfo").read_text())
        except OSError:  # no open file is left, for example
            return
        if self._base_bytes is None or size_bytes < self._base_bytes:
            self._base_bytes = size_bytes
        if size_bytes - self._base_bytes >= GROWTH_BYTES:
            self._base_bytes, self._counting = size_bytes, True
            self._tasks.spawn(self._count(list(lives())))

    async def _count(self, lives: Sequence[RunningSlot]) -> None:
        try:
            try:
                counts = await in_thread(lambda: locks_by_owner(self._proc / "locks"))
            except OSError:  # no thread can be started, for example; the next growth is counted
                return
            for live, count in held(lives, counts).items():
                if count > LOCKS_MAX:
                    text = f"it holds {count} of the {COUNTED_MAX} newest file locks of the host, which fill its memory"
                    self._stopper.end(live, Event.SLOT_CULLED, text, at_once=True)
        finally:
            self._counting = False


def unreclaimable_bytes(meminfo: str) -> int:
    """SUnreclaim of /proc/meminfo."""
    return next(int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("SUnreclaim:"))


def locks_by_owner(path: Path) -> Counter[int | str]:
    """The number of the newest locks in /proc/locks by pid, or by device, MAJOR:MINOR, where they have no process."""
    counts: Counter[int | str] = Counter()
    with open(path) as file:
        for line in itertools.islice(file, COUNTED_MAX):
            # "1: POSIX  ADVISORY  WRITE 4711 00:2f:15 0 EOF"; "->" after the number of a lock that waits.
            fields = line.replace("-> ", "", 1).split()
            pid = int(fields[4])
            counts[pid if pid > 0 else fields[5].rpartition(":")[0]] += 1
    return counts


def held(lives: Iterable[RunningSlot], counts: Counter[int | str]) -> Counter[RunningSlot]:
    """The locks of each slot."""
    by_scope = {live.slot.scope: live for live in lives}
    by_device = {device: live for live in by_scope.values() for device in _devices(live)}
    found: Counter[RunningSlot] = Counter()
    for owner, count in counts.items():
        live = by_device.get(owner) if isinstance(owner, str) else by_scope.get(_unit(owner))
        if live is not None:
            found[live] += count
    return found


def _unit(pid: int) -> str:
    try:
        return cgroup.unit_of_process(pid)
    except OSError:
        return ""


def _devices(live: RunningSlot) -> set[str]:
    devices = set()
    for directory in _DIRECTORIES:
        try:
            number = os.stat(directory, dir_fd=live.root_fd).st_dev
        except OSError:
            continue
        devices.add(f"{os.major(number):02x}:{os.minor(number):02x}")
    return devices
