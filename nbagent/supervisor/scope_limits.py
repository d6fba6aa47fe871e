# SPDX-License-Identifier: BSD-3-Clause
"""The limits of the scopes of slots: those of their claim or update, less what the host lowers for a time.

Preparation, Updates and the guards of memory and processors change limits of the same scope. All of them do it here,
one at a time for each slot, so that none sets a limit of another to a former value.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from nbagent.core.model import Limits, Lowered, SlotState
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks

# From a change that failed to the first attempt to set the former limits again, and between two attempts.
RENEW_PAUSE_S = 5.0


class ScopeLimits:
    """Changes limits. When systemd refuses a change, its method raises OSError, and the slot is as before.

    systemd can carry out a change that it has not responded to in time. So the limits of a claimed slot are set once
    more after a failure, until systemd responds.
    """

    def __init__(self, systemd: Systemd, tasks: Tasks) -> None:
        self._systemd = systemd
        self._tasks = tasks
        # The slots whose limits are set once more.
        self._renewed: set[RunningSlot] = set()

    async def set(self, live: RunningSlot, limits: Limits) -> None:
        """Gives a slot other limits of its own. Limits that are lowered stay so."""
        async with live.limits_lock:
            await self._apply(live, limits, live.lowered)
            # The slot can have been released meanwhile, so its state is kept.
            live.slot = dataclasses.replace(live.slot, limits=limits)
            live.publish(limits)

    async def lower(self, live: RunningSlot, **changes: Any) -> None:
        """Changes what is lowered: fields of Lowered, with their defaults to restore the slot's own limit."""
        async with live.limits_lock:
            lowered = dataclasses.replace(live.lowered, **changes)
            await self._apply(live, live.slot.limits, lowered)
            live.lowered = lowered

    async def _apply(self, live: RunningSlot, limits: Limits, lowered: Lowered) -> None:
        try:
            await self._systemd.set_limits(live.slot.scope, lowered.of(limits))
        except OSError:
            if live not in self._renewed:
                self._renewed.add(live)
                self._tasks.spawn(self._renew(live))
            raise

    async def _renew(self, live: RunningSlot) -> None:
        try:
            while live.slot.state is SlotState.CLAIMED:
                await asyncio.sleep(RENEW_PAUSE_S)
                async with live.limits_lock:
                    with contextlib.suppress(OSError):
                        await self._systemd.set_limits(live.slot.scope, live.limits_in_force)
                        return
        finally:
            self._renewed.discard(live)
