# SPDX-License-Identifier: BSD-3-Clause
"""A slot that runs: the Slot with its descriptors, its cgroup and its last sample."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple

from nbagent.core.model import Limits, Lowered, Slot, now
from nbagent.linux import cgroup
from nbagent.linux.cgroup import Cgroup, Usage
from nbagent.policy import limit_alerts
from nbagent.policy.cull import ActivitySample, active_since
from nbagent.policy.limit_alerts import Storage, Trouble
from nbagent.supervisor import launch_service
from nbagent.supervisor.launcher import Launched
from nbagent.supervisor.limit_files import LimitFiles
from nbagent.supervisor.tasks import in_thread
from nbagent.wire import activity, limits_page
from nbagent.wire.failure import StepFailed
from nbagent.wire.fields import MalformedMessage
from nbagent.wire.limits_page import SlotLimits

NOTHING_USED = Usage(0, 0, 0.0, 0, 0, 0)
NO_TROUBLE = Trouble()
NOTHING_LOWERED = Lowered()


@dataclass(frozen=True)
class Findings:
    """New findings of a sample: OOM kills, and limits that the slot has run into."""

    storage: Storage
    oom_kills: int
    refuses_tasks: bool
    storage_full: bool


class Sample(NamedTuple):
    """The usage of a slot at one time."""

    at_s: float
    usage: Usage
    storage: Storage


class Final(NamedTuple):
    """The use of a slot from its start to its end. `peak_bytes` is the most memory at one time."""

    cpu_s: float
    peak_bytes: int
    oom_kills: int


NEVER_READ = Sample(-math.inf, NOTHING_USED, Storage())


@dataclass(eq=False)
class RunningSlot:
    """A slot that runs. It owns `pidfd` and `activity_fd` from `attach` to `close`, and `root_fd`, its root directory.

    `reading` is the last usage that was read, for a document or a sample; `usage`, `trouble` and `sampled_s` are those
    of the last sample. `compressed_s` is when its memory was compressed last. `task` starts the slot, and then waits
    for the end of its first process. `lowered` is changed by supervisor.scope_limits, under `limits_lock`.
    """

    slot: Slot
    pidfd: int = -1
    activity_fd: int = -1
    cgroup: Cgroup | None = None
    reading: Sample = NEVER_READ
    usage: Usage = NOTHING_USED
    trouble: Trouble = NO_TROUBLE
    sampled_s: float | None = None
    active_s: float = 0.0
    compressed_s: float | None = None
    task: asyncio.Task[None] | None = None
    root_fd: int = -1
    lowered: Lowered = NOTHING_LOWERED
    limits_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    limit_files: LimitFiles | None = None

    @property
    def limits_in_force(self) -> Limits:
        """The limits of its scope."""
        return self.lowered.of(self.slot.limits)

    def attach(self, launched: Launched) -> None:
        """Takes over the descriptors of a launch."""
        self.pidfd, self.activity_fd = launched.pidfd, launched.activity_fd

    def publish(self, limits: Limits) -> None:
        """Writes the limits to the slot's page, from which its server reads them, and to its files."""
        with contextlib.suppress(OSError):
            limits_page.write(self.activity_fd, SlotLimits.of(limits))
        self._show(limits)

    def _show(self, limits: Limits) -> None:
        if self.limit_files is not None:
            self.limit_files.update(SlotLimits.of(limits), self.reading.usage.memory_bytes)

    def close(self) -> None:
        """Closes the descriptors; a second call does nothing."""
        for fd in (self.pidfd, self.activity_fd, self.root_fd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.activity_fd = self.root_fd = -1

    async def open_storage(self) -> None:
        """Opens the root directory, for `_storage`. Without it the figures are zero, as when the slot has ended."""
        if self.root_fd < 0 and self.slot.pid is not None:
            with contextlib.suppress(OSError, StepFailed, MalformedMessage):
                opened = await launch_service.open_slot(self.slot.scope, self.slot.pid)
                self.root_fd = opened.root_fd
                for fd in (opened.pidfd, opened.activity_fd):
                    os.close(fd)

    async def release_storage(self) -> None:
        """Closes the root directory, in a thread, because the kernel may then free a file system of a million files."""
        root_fds, self.root_fd = [self.root_fd] if self.root_fd >= 0 else [], -1

        def close() -> None:
            # Once, because a thread can do it later than here, by then with another file at that number.
            with contextlib.suppress(IndexError):
                os.close(root_fds.pop())

        if root_fds:
            try:
                await in_thread(close)
            except OSError:
                close()

    def read(self, now_s: float, oldest_s: float) -> Sample:
        """The usage of the slot, read at `oldest_s` or later."""
        if self.reading.at_s < oldest_s:
            self.reading = Sample(now_s, self._use(), self._storage())
        return self.reading

    def new_oom_kills(self) -> int:
        """The processes killed for memory since the last sample."""
        return max(0, self._use().oom_kills - self.usage.oom_kills)

    def final(self) -> Final:
        """The use of the slot in all so far; that of the last sample, when its cgroup was removed."""
        if self.cgroup is None:
            return Final(0.0, 0, 0)
        usage = self._use()
        return Final(
            max(usage.cpu_s, self.usage.cpu_s),
            max(self.cgroup.peak_bytes(), self.usage.memory_bytes),
            max(usage.oom_kills, self.usage.oom_kills),
        )

    def _use(self) -> Usage:
        return self.cgroup.usage() if self.cgroup else NOTHING_USED

    def _storage(self) -> Storage:
        """The use of the slot's file system. statvfs of an overlay returns the figures of its upper layer, a tmpfs."""
        try:
            status = os.fstatvfs(self.root_fd)
        except OSError:
            return Storage()
        return Storage(
            used_bytes=(status.f_blocks - status.f_bfree) * status.f_frsize,
            size_bytes=status.f_blocks * status.f_frsize,
            used_files=status.f_files - status.f_ffree,
            most_files=status.f_files,
        )

    def rests_since(self, now_s: float) -> float:
        """The time of the last activity, by the last sample and the activity page; now while a kernel is busy."""
        if self.slot.claimed_s is None:
            return self.slot.created_s
        acted_s, busy = activity.read(self.activity_fd, now_s)
        return now_s if busy else max(self.slot.claimed_s, self.active_s, acted_s)

    def take_sample(self, now_s: float, cpu_threshold: float) -> tuple[ActivitySample, Findings]:
        """Takes a sample of a claimed slot: the input of the rules, and the findings since the last sample."""
        _, usage, storage = self.read(now_s, now_s)
        past_s = None if self.sampled_s is None else now_s - self.sampled_s
        cpu = (usage.cpu_s - self.usage.cpu_s) / past_s if past_s and past_s > 0.1 else None
        acted_s, busy = activity.read(self.activity_fd, now_s)
        claimed_s = self.slot.claimed_s or 0.0
        activity_sample = ActivitySample(
            claimed_s, self.slot.expires_s or now_s, self.active_s, acted_s, busy, cpu, usage.oom_kills
        )
        found = limit_alerts.find(self.trouble, usage.tasks_refused, storage)
        findings = Findings(
            storage=storage,
            oom_kills=max(0, usage.oom_kills - self.usage.oom_kills),
            refuses_tasks=found.refuses_tasks and not self.trouble.refuses_tasks,
            storage_full=found.storage_full and not self.trouble.storage_full,
        )
        self.active_s = active_since(activity_sample, cpu_threshold, now_s)
        self.usage, self.trouble, self.sampled_s = usage, found, now_s
        self._show(self.slot.limits)
        return activity_sample, findings

    def document(self, now_s: float, oldest_s: float) -> dict[str, object]:
        """The slot for GET /slots: its state, and its usage at `oldest_s` or later."""
        _, usage, storage = self.read(now_s, oldest_s)
        idle_s = None
        if self.slot.claimed_s is not None and self.activity_fd >= 0:
            idle_s = round(now_s - self.rests_since(now_s), 1)
        return self.slot.document(now_s) | {
            "limits_in_force": self.limits_in_force.document(),
            "idle_s": idle_s,
            "memory_bytes": usage.memory_bytes,
            "swapped_bytes": usage.swapped_bytes,
            "cpu_s": round(usage.cpu_s, 3),
            "tasks": usage.tasks,
            "oom_kills": usage.oom_kills,
            "tasks_refused": usage.tasks_refused,
            "storage_bytes": storage.used_bytes,
        }


async def reattach(slot: Slot) -> RunningSlot | None:
    """A slot of a former supervisor, or None when its processes have ended.

    The kernel may have given the recorded pid to another process, so the process must be in the slot's scope, which the
    launch service checks. Raises StepFailed when that fails for another reason, because the slot may run.
    """
    if slot.pid is None:
        return None
    try:
        opened = await launch_service.open_slot(slot.scope, slot.pid)
    except StepFailed as error:
        if error.failure.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            return None
        raise
    live = RunningSlot(slot, root_fd=opened.root_fd)
    live.attach(Launched(slot.pid, opened.pidfd, opened.activity_fd, serves=True))
    try:
        live.cgroup = cgroup.of_process(slot.pid)
    except OSError:  # it has ended meanwhile
        live.close()
        return None
    # The former supervisor has reported all OOM kills and refused tasks so far.
    _, live.usage, storage = live.read(now(), now())
    live.trouble = limit_alerts.find(Trouble(live.usage.tasks_refused), live.usage.tasks_refused, storage)
    return live
