# SPDX-License-Identifier: BSD-3-Clause
"""Compression of the memory of slots at rest: the kernel swaps it out to zram.

A slot has MemorySwapMax=0 except while nbagent-units.service writes to its memory.reclaim. So pages of a slot are
swapped out only after a check that all swap is zram, and not when the host is short of memory. With swap on a disk,
without swap, or with cgroup v1, no slot is compressed.

Slots are compressed one at a time.
The compression of a slot that becomes active ends after the current step; its pages are read back when they are used.
"""

from __future__ import annotations

import asyncio
import contextlib

from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState, now
from nbagent.linux import swap
from nbagent.linux.cgroup import Cgroup
from nbagent.policy import compress
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks

# systemd may respond to a change of a limit before it has written it to the kernel.
LIMIT_TIMEOUT_S = 5.0
LIMIT_PAUSE_S = 0.005
ALIVE = (SlotState.WARM, SlotState.CLAIMED)


class Compressor:
    """The queue of slots to compress, and a task that runs while it is not empty."""

    def __init__(self, systemd: Systemd, counters: Counters, tasks: Tasks) -> None:
        self._systemd = systemd
        self._counters = counters
        self._tasks = tasks
        # Each with the time of its last activity.
        self._waiting: dict[RunningSlot, float] = {}
        self._task: asyncio.Task[None] | None = None

    def offer(self, live: RunningSlot) -> None:
        """Adds a slot at rest."""
        if live.cgroup is None or not live.cgroup.unified:
            return
        self._waiting.setdefault(live, live.rests_since(now()))
        if self._task is None or self._task.done():
            self._task = self._tasks.spawn(self._work_until_error())

    async def adopt(self, live: RunningSlot) -> None:
        """Sets MemorySwapMax=0 on a slot that a former supervisor was compressing when it ended."""
        if live.cgroup is not None and live.cgroup.may_swap():
            await self._allow_swap(live, 0)

    async def _work_until_error(self) -> None:
        # Without a free descriptor nothing can be read. After the next sample of a slot it goes on.
        with contextlib.suppress(OSError):
            await self._work()

    async def _work(self) -> None:
        while self._waiting:
            # Checked before each slot, because swap can be added at any time. The next sample offers the slot again.
            if not swap.read().stays_in_memory:
                self._waiting.clear()
                return
            live = next(iter(self._waiting))
            since_s, began_s = self._waiting.pop(live), now()
            if live.cgroup is not None and _rests(live, since_s):
                await self._compress(live, live.cgroup, since_s, began_s)
                await asyncio.sleep(compress.pause_s(now() - began_s))

    async def _compress(self, live: RunningSlot, group: Cgroup, since_s: float, began_s: float) -> None:
        before = group.usage()
        live.compressed_s = began_s
        await self._allow_swap(live, live.slot.limits.memory_bytes)
        try:
            async with asyncio.timeout(LIMIT_TIMEOUT_S):
                while not group.may_swap():
                    await asyncio.sleep(LIMIT_PAUSE_S)
            for _ in range(compress.steps(before.memory_bytes)):
                more = await self._systemd.reclaim(live.slot.scope, live.slot.pid or 0, compress.STEP_BYTES)
                if not more or not _rests(live, since_s):
                    break
        except (OSError, TimeoutError):
            # The slot has ended, or the kernel is older than 5.19.
            return
        finally:
            await self._allow_swap(live, 0)
        if live.slot.state not in ALIVE:
            return
        after = group.usage()
        self._counters.add("compressed")
        emit(
            Event.SLOT_COMPRESSED, slot=live.slot.id, took_ms=round((now() - began_s) * 1000),
            before=before.memory_bytes, after=after.memory_bytes, swapped=after.swapped_bytes,
        )

    async def _allow_swap(self, live: RunningSlot, size_bytes: int) -> None:
        with contextlib.suppress(OSError):  # the slot has ended
            await self._systemd.set_swap(live.slot.scope, size_bytes)


def _rests(live: RunningSlot, since_s: float) -> bool:
    """Whether a slot has been at rest since; it may have ended or been claimed."""
    return live.slot.state in ALIVE and live.rests_since(now()) == since_s
