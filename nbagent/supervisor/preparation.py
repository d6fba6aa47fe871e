# SPDX-License-Identifier: BSD-3-Clause
"""The preparation of a slot for its claim: limits, network and content."""

from __future__ import annotations

import asyncio
from typing import Any

from nbagent.config.host_config import CurrentConfig
from nbagent.core.claim_content import Content
from nbagent.core.errors import RecordFailed, StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Limits, SlotState, now
from nbagent.supervisor import content_injector
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.interfaces import Interfaces
from nbagent.supervisor.network import INTERNET, Network
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks

PREPARATION = "preparation"  # the step of a failure


class Preparation:
    """Prepares slots; a slot whose preparation fails is ended, because it can be neither claimed nor warm again."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, records: Records, systemd: Systemd, limits: ScopeLimits,
        network: Network, interfaces: Interfaces, stopper: SlotStopper, tasks: Tasks,
    ) -> None:
        self._config = config
        self._slots = slots
        self._records = records
        self._systemd = systemd
        self._limits = limits
        self._network = network
        self._interfaces = interfaces
        self._stopper = stopper
        self._tasks = tasks

    async def prepare(self, live: RunningSlot, limits: Limits, network: str, content: Content) -> None:
        """Gives a warm slot the limits, the network and the content of its claim.

        Raises RecordFailed, StartFailed or ContentFailed. The record is incomplete first, so that a supervisor that
        starts meanwhile removes the slot instead of handing out one whose limits are not those of its record.
        """
        if limits == live.slot.limits and network != INTERNET and not content:
            return
        self.record(live, SlotState.PREPARING, network=network)
        reach(Point.PREPARING)
        try:
            await self._set_limits(live, limits)
            reach(Point.LIMITS_SET)
            if network == INTERNET:
                await self._network.open(live.slot)
            if content:
                await self._deliver(live, content)
            if live.slot.state is not SlotState.PREPARING:
                raise StartFailed("the slot ended while it was prepared for the claim", step=PREPARATION)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            text = "the caller closed its connection" if cancelled else str(error) or repr(error)
            self._stopper.end(live, Event.SLOT_NOT_PREPARED, text)
            if isinstance(error, OSError):  # as without a free descriptor
                raise StartFailed.at(PREPARATION, error.errno or 0, error.strerror or text) from error
            raise

    def record(self, live: RunningSlot, state: SlotState, **changes: Any) -> None:
        """Moves a slot to a state and records it. Ends the slot and raises RecordFailed when no record can be written,
        because a slot without a record would not outlive the supervisor.
        """
        self._slots.move(live, state, **changes)
        try:
            self._records.save(live.slot)
        except OSError as error:
            text = f"the record of slot {live.slot.id} was not written: {error.strerror}"
            self._stopper.end(live, Event.SLOT_NOT_PREPARED, text)
            raise RecordFailed(text, errno=error.errno) from error

    async def _set_limits(self, live: RunningSlot, limits: Limits) -> None:
        if limits == live.slot.limits:
            return
        try:
            await self._limits.set(live, limits)
        except OSError as error:
            text = f"systemd did not change the limits of {live.slot.scope}: {error}"
            raise StartFailed(text, step="limits") from error

    def close_interface(self, live: RunningSlot) -> None:
        """Removes the interface, which is closed, of a slot that was claimed without a network."""
        if live.slot.addresses and live.slot.network != INTERNET:
            self._tasks.spawn(self._interfaces.remove(live.slot))

    async def _deliver(self, live: RunningSlot, content: Content) -> None:
        began_s, scope = now(), live.slot.scope
        injected = await content_injector.inject(
            live.slot, live.pidfd, content, self._config.value, lambda pid: self._systemd.attach(scope, [pid])
        )
        text = f"{injected.files} files"
        if content.archive is not None:
            text += f", {injected.entries} entries of {content.archive}"
        emit(Event.CONTENT_DELIVERED, slot=live.slot.id, took_ms=round((now() - began_s) * 1000), text=text)
