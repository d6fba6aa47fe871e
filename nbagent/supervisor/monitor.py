"""Looking at slots: which limits they have run into, which of them end by rule, and which are long at rest.

Each slot is looked at once an interval of [cull], a few at a time, so that a thousand of them hold up no claim. Limits
and ends are those of claimed slots; a warm slot can only be at rest.
A look reads files of the kernel and the slot's page; no slot notices it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from nbagent.config.host_config import CullSettings
from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState
from nbagent.policy import compress, cull
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.running_slot import Findings, RunningSlot

# Of an interval. Thirty slots at a time, of a thousand, are a millisecond or two.
BATCHES = 30
SAMPLED_STATES = (SlotState.WARM, SlotState.PREPARING, SlotState.CLAIMED)


class End(Protocol):
    """Ends a slot and tells why."""

    def __call__(self, live: RunningSlot, event: Event, **fields: Any) -> None: ...


class Monitor:
    """The warm and claimed slots in the order in which they are due; `at_rest` is given those to compress."""

    def __init__(self, counters: Counters, end: End, at_rest: Callable[[RunningSlot], None]) -> None:
        self._counters = counters
        self._end = end
        self._at_rest = at_rest
        self._queue: deque[tuple[float, RunningSlot]] = deque()
        self._batch_s = -math.inf

    def add(self, live: RunningSlot, now_s: float) -> None:
        """Takes a slot that became warm, or was adopted; one that ends is forgotten when it is due."""
        self._queue.append((now_s, live))

    def next_s(self, interval_s: float) -> float:
        """When slots are due."""
        if not self._queue:
            return math.inf
        return max(self._queue[0][0] + interval_s, self._batch_s + interval_s / BATCHES)

    def sample(self, settings: CullSettings, now_s: float) -> None:
        """Takes samples of the slots that are due, of so many that each has its turn in time."""
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
                    self._at_rest(live)
                self._queue.append((now_s, live))

    def _sample_slot(self, live: RunningSlot, settings: CullSettings, now_s: float) -> None:
        activity, findings = live.take_sample(now_s, settings.cpu)
        self._tell(live, findings)
        why = cull.reason(activity, settings.idle, settings.cpu, now_s)
        if why is not None:
            self._counters.add(f"culled_{why}")
            texts = {
                "age": "its time is up",
                "idle": f"idle for {now_s - live.active_s:.0f} s",
                "memory": f"{activity.oom_kills} of its processes were killed for memory",
            }
            self._end(live, Event.SLOT_CULLED, text=texts[why])

    def _tell(self, live: RunningSlot, findings: Findings) -> None:
        """Says which limits a slot has run into."""
        slot, storage = live.slot, findings.storage
        if findings.oom_kills:
            self._out_of_memory(live, findings.oom_kills, storage.used_bytes)
        if findings.refuses_tasks:
            emit(Event.SLOT_TASKS_REFUSED, slot=slot.id, tasks=slot.limits.tasks)
        if findings.storage_full:
            text = (f"{storage.used_bytes} of {storage.size_bytes} bytes,"
                    f" {storage.used_files} of {storage.most_files} files")
            emit(Event.SLOT_STORAGE_FULL, slot=slot.id, text=text)

    def last(self, live: RunningSlot) -> None:
        """Says of a slot whose processes have ended what no look has seen."""
        if kills := live.new_oom_kills():
            self._out_of_memory(live, kills, 0)

    def _out_of_memory(self, live: RunningSlot, kills: int, files_bytes: int) -> None:
        self._counters.add("oom_kills", kills)
        text = f"{kills} processes killed at MemoryMax={live.slot.limits.memory_bytes}"
        if files_bytes > live.slot.limits.memory_bytes / 4:
            text += f", of which files are {files_bytes}"
        emit(Event.SLOT_OOM, slot=live.slot.id, text=text)
