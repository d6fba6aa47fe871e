# SPDX-License-Identifier: BSD-3-Clause
"""The limits of the scopes of slots: those of their claim or update, less what the host lowers for a time.

Preparation, Updates and the guards of memory and processors change limits of the same scope. All of them do it here,
one at a time for each slot, so that none sets a limit of another to a former value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nbagent.core.model import Limits, Lowered
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.systemd import Systemd


class ScopeLimits:
    """Changes limits. When systemd refuses a change, its method raises OSError, and the slot is as before."""

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd

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
        await self._systemd.set_limits(live.slot.scope, lowered.of(limits))
