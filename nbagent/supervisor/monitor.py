# SPDX-License-Identifier: BSD-3-Clause
"""Samples of the slots: the limits that they run into, those that end by rule, and those whose memory is compressed.

Each slot is sampled once in cull.interval, a few at a time, because samples of a thousand slots at once would delay
claims. Only claimed slots have limits to report and rules that end them; warm slots are sampled for compression. A
sample reads files of the kernel and the slot's activity page, which takes nothing from the slot.
"""

from __future__ import annotations

import math
from collections import deque

from nbagent.config.host_config import CullSettings
from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState
from nbagent.policy import compress, cull
from nbagent.supervisor.compressor import Compressor
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.lock_guard import LockGuard
from nbagent.supervisor.running_slot import Findings, RunningSlot
from nbagent.supervisor.sessions import LOST, SHUTDOWN
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.wire.aio import readable

# In one interval. A thousand slots are then sampled thirty at a time, in 1 to 2 ms.
BATCHES = 30
SAMPLED_STATES = (SlotState.WARM, SlotState.PREPARING, SlotState.CLAIMED)


class Monitor:
    """The warm and claimed slots in the order in which their samples are due."""

    def __init__(
        self, systemd: Systemd, counters: Counters, stopper: SlotStopper, compressor: Compressor, tasks: Tasks,
        locks: LockGuard,
    ) -> None:
        self._systemd = systemd
        self._locks = locks
        self._counters = counters
        self._stopper = stopper
        self._compressor = compressor
        self._tasks = tasks
        self._queue: deque[tuple[float, RunningSlot]] = deque()
        self._batch_s = -math.inf

    def watch(self, live: RunningSlot) -> None:
        """Ends the slot when its first process ends, because all its processes end with the init of a namespace."""
        live.task = self._tasks.spawn(self._watch(live))

    async def _watch(self, live: RunningSlot) -> None:
        await live.open_storage()
        await readable(live.pidfd)
        if live.slot.state not in SAMPLED_STATES:
            return
        self._report_last_kills(live)
        # At a shutdown systemd ends slots at the same time as the supervisor. Only a user needs the reason.
        if live.slot.claimed_s is not None and await self._systemd.is_stopping():
            self._stopper.end(live, Event.SLOT_CULLED, SHUTDOWN)
        else:
            self._counters.add("died")
            self._stopper.end(live, Event.SLOT_DIED, LOST)

    def add(self, live: RunningSlot, now_s: float) -> None:
        """Adds a slot that became warm or was adopted. It is dropped when it is due after its end."""
        self._queue.append((now_s, live))

    def next_s(self, interval_s: float) -> float:
        """The time at which slots are due, or the count of their locks."""
        return min(self._batch_due_s(interval_s), self._locks.next_s) if self._queue else math.inf

    def _batch_due_s(self, interval_s: float) -> float:
        return max(self._queue[0][0] + interval_s, self._batch_s + interval_s / BATCHES)

    def sample(self, settings: CullSettings, now_s: float) -> None:
        """Samples the slots that are due, so many that each is sampled once in an interval."""
        self._locks.check(lambda: [live for _, live in self._queue], now_s)
        if not self._queue or now_s < self._batch_due_s(settings.interval):
            return
        self._batch_s = now_s
        for _ in range(math.ceil(len(self._queue) / BATCHES)):
            sampled_s, live = self._queue[0]
            if sampled_s + settings.interval > now_s:
                return
            self._queue.popleft()
            if live.slot.state is SlotState.CLAIMED:
                self._sample_slot(live, settings, now_s)
            if live.slot.state in SAMPLED_STATES:
                if compress.due(live.rests_since(now_s), live.compressed_s, settings.compress, now_s):
                    self._compressor.offer(live)
                self._queue.append((now_s, live))

    def _sample_slot(self, live: RunningSlot, settings: CullSettings, now_s: float) -> None:
        activity, findings = live.take_sample(now_s, settings.cpu)
        self._report(live, findings)
        reason = cull.reason(activity, settings.idle, settings.cpu, now_s)
        if reason is not None:
            self._counters.add(f"culled_{reason}")
            texts = {
                "age": "maximum age reached",
                "idle": f"idle for {now_s - live.active_s:.0f} s",
                "memory": f"{activity.oom_kills} of its processes were killed for memory",
            }
            self._stopper.end(live, Event.SLOT_CULLED, texts[reason])

    def _report(self, live: RunningSlot, findings: Findings) -> None:
        slot, storage = live.slot, findings.storage
        if findings.oom_kills:
            self._report_kills(live, findings.oom_kills, storage.used_bytes)
        if findings.refuses_tasks:
            emit(Event.SLOT_TASKS_REFUSED, slot=slot.id, tasks=slot.limits.tasks)
        if findings.storage_full:
            text = (f"{storage.used_bytes} of {storage.size_bytes} bytes,"
                    f" {storage.used_files} of {storage.most_files} files")
            emit(Event.SLOT_STORAGE_FULL, slot=slot.id, text=text)

    def _report_last_kills(self, live: RunningSlot) -> None:
        """Reports the OOM kills since the last sample of a slot whose processes have ended."""
        if kills := live.new_oom_kills():
            self._report_kills(live, kills, 0)

    def _report_kills(self, live: RunningSlot, kills: int, files_bytes: int) -> None:
        self._counters.add("oom_kills", kills)
        text = f"{kills} processes killed at MemoryMax={live.slot.limits.memory_bytes}"
        if files_bytes > live.slot.limits.memory_bytes / 4:
            text += f", of which files are {files_bytes}"
        emit(Event.SLOT_OOM, slot=live.slot.id, kills=kills, text=text)
