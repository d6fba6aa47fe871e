"""Compressing the memory of slots at rest: the kernel swaps it out, to where swap is compressed memory.

A slot has MemorySwapMax=0, but for the moment in which the supervisor asks the kernel to reclaim its memory. So no page
of a slot goes where nobody looked first that it stays in memory, and a host that is short of memory swaps out none.
Where there is swap on a disk, no swap, or cgroup v1, nothing happens.

One slot at a time, in a thread, as reclaim blocks for as long as it takes. A slot that is needed again meanwhile is
left alone after the step that is under way; its pages come back one by one as they are touched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from nbagent.core.events import Event, emit
from nbagent.core.model import SlotState, now
from nbagent.linux import swap
from nbagent.linux.cgroup import Cgroup
from nbagent.policy import compress
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.systemd.bus import Systemd

# systemd may answer a change of a limit before it has written it to the kernel.
LIMIT_TIMEOUT_S = 5.0
LIMIT_PAUSE_S = 0.005
ALIVE = (SlotState.WARM, SlotState.CLAIMED)


class Compressor:
    """The slots that are to be compressed, in turn. Its task is one of the agent's, by `spawn`."""

    def __init__(
        self, systemd: Systemd, counters: Counters, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]]
    ) -> None:
        self._systemd = systemd
        self._counters = counters
        self._spawn = spawn
        # Each with the instant since which it was at rest.
        self._waiting: dict[RunningSlot, float] = {}
        self._task: asyncio.Task[Any] | None = None

    def offer(self, live: RunningSlot) -> None:
        """Takes a slot at rest."""
        if live.cgroup is None or not live.cgroup.unified:
            return
        self._waiting.setdefault(live, live.rests_since(now()))
        if self._task is None or self._task.done():
            self._task = self._spawn(self._work())

    def adopt(self, live: RunningSlot) -> None:
        """Takes back what an agent before this one has allowed a slot and did not live to take back."""
        if live.cgroup is not None and live.cgroup.may_swap():
            self._allow_swap(live, 0)

    async def _work(self) -> None:
        while self._waiting:
            # Looked at before each: swap can be added at any time. What waits is offered again at its next look.
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
        self._allow_swap(live, live.slot.limits.memory_bytes)
        try:
            async with asyncio.timeout(LIMIT_TIMEOUT_S):
                while not group.may_swap():
                    await asyncio.sleep(LIMIT_PAUSE_S)
            for _ in range(compress.steps(before.memory_bytes)):
                more = await asyncio.to_thread(group.reclaim, compress.STEP_BYTES)
                if not more or not _rests(live, since_s):
                    break
        except (OSError, TimeoutError):
            # The slot has ended, or the kernel is older than 5.19.
            return
        finally:
            self._allow_swap(live, 0)
        if live.slot.state not in ALIVE:
            return
        after = group.usage()
        self._counters.add("compressed")
        emit(
            Event.SLOT_COMPRESSED, slot=live.slot.id, took_ms=round((now() - began_s) * 1000),
            before=before.memory_bytes, after=after.memory_bytes, swapped=after.swapped_bytes,
        )

    def _allow_swap(self, live: RunningSlot, size_bytes: int) -> None:
        with contextlib.suppress(OSError):  # the slot has ended
            self._systemd.set_swap(live.slot.scope, size_bytes)


def _rests(live: RunningSlot, since_s: float) -> bool:
    """Whether nobody has needed a slot since; it may have ended, or been claimed."""
    return live.slot.state in ALIVE and live.rests_since(now()) == since_s
