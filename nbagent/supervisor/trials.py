# SPDX-License-Identifier: BSD-3-Clause
"""The trial of a start, for `nbagent doctor`: a slot that no claim gets, a request to it through the router, and one
about it to the launch service, which a claim with content needs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from nbagent.config.host_config import CurrentConfig
from nbagent.core import paths
from nbagent.core.errors import Full, ImageNotFound, StartFailed
from nbagent.core.model import now
from nbagent.image.store import Image
from nbagent.launch.requests import OpenedSlot
from nbagent.policy import admission
from nbagent.supervisor import launch_service, readiness
from nbagent.supervisor.health import Health
from nbagent.supervisor.host_load import HostLoad
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slot_starter import SlotStarter
from nbagent.wire.failure import StepFailed
from nbagent.wire.fields import MalformedMessage

REQUEST_MAX_S = 5.0
# Parts of nbagent.supervisor.health without which a start waits until its timeout.
NEEDED_BY_STARTS = frozenset({"network", "records", "systemd"})


class Trials:
    """Tries starts."""

    def __init__(
        self, config: CurrentConfig, pools: Pools, load: HostLoad, health: Health, starter: SlotStarter,
        router: Path = paths.ROUTER_CHECK_SOCKET,
        open_slot: Callable[[str, int], Awaitable[OpenedSlot]] = launch_service.open_slot,
    ) -> None:
        self._config = config
        self._pools = pools
        self._load = load
        self._health = health
        self._starter = starter
        self._router = router
        self._open_slot = open_slot

    async def run(self) -> dict[str, object]:
        """The result, as a document. Raises StartFailed, ImageNotFound, or Full when there is no room for a slot."""
        # So that the figures after this trial have no fault that was mended meanwhile, and each that is new, which a
        # second check confirms.
        if not await self._health.check():
            await self._health.check()
        for part in NEEDED_BY_STARTS & self._health.faults.keys():
            raise StartFailed(f"{part}: {self._health.faults[part]}", step=part)
        name, host = self._config.value.pool.image, self._load.host()
        pool = self._pools.get(name)
        if pool is None or (image := pool.image) is None:
            raise ImageNotFound(f"the default image {name} is not on this host", image=name)
        if not self._load.room(host, name):
            raise Full(f"no slot can be tried: {admission.obstacle(host)}", retry_after_s=self._load.retry_after_s())
        router_ms = None

        async def request(live: RunningSlot) -> None:
            nonlocal router_ms
            router_ms = await self._request(live, image)
            await self._open(live)

        live, took_s = await self._starter.try_start(image, request)
        return {
            "slot": live.slot.id, "launch": live.slot.launch,
            # Of an image without a zygote, exec is the way of every start.
            "launch_reason": live.slot.launch_reason if image.launch == "fork" else "",
            "took_ms": round(took_s * 1000), "router_ms": router_ms,
        }

    async def _request(self, live: RunningSlot, image: Image) -> int | None:
        """The milliseconds of a request through the router; None when it has no socket for the supervisor."""
        if not self._router.exists():
            return None
        began_s = now()
        try:
            async with asyncio.timeout(REQUEST_MAX_S):
                await readiness.ready(self._router, f"{live.slot.base_path}{image.ready}")
        except (StartFailed, TimeoutError) as error:
            text = str(error) or f"no response within {REQUEST_MAX_S:g} s"
            raise StartFailed(f"the slot serves, but not through the router: {text}", step="router") from error
        return round((now() - began_s) * 1000)

    async def _open(self, live: RunningSlot) -> None:
        """Lets the launch service open the slot, which is its smallest request about one."""
        if live.slot.pid is None:
            return
        try:
            async with asyncio.timeout(REQUEST_MAX_S):
                opened = await self._open_slot(live.slot.scope, live.slot.pid)
        except (OSError, TimeoutError, StepFailed, MalformedMessage) as error:
            text = str(error) or f"no response within {REQUEST_MAX_S:g} s"
            raise StartFailed(f"the slot serves, but gets no content of a claim: {text}", step="launch") from error
        for fd in opened:
            os.close(fd)
