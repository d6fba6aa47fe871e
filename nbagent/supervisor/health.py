# SPDX-License-Identifier: BSD-3-Clause
"""Tries every few seconds what a claim would find: PID 1, the router, the default image, network, room for records.

A host that only counts its free slots attracts claims while its router does not serve or systemd does not respond. So
each part is tried by a small request as a claim or its user makes it, and `faults` has the parts that failed twice in
a row. A fault is in /stats, /readyz, /metrics and the agent-check within 5 s, and in the journal after REPORT_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from nbagent.config.host_config import CurrentConfig
from nbagent.core import paths
from nbagent.core.errors import ImageInvalid, ImageNotFound, RecordFailed, StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import now
from nbagent.image.store import ImageStore
from nbagent.supervisor import readiness
from nbagent.supervisor.network import INTERNET, Network
from nbagent.supervisor.records import Records
from nbagent.supervisor.systemd import JobFailed, Systemd
from nbagent.supervisor.tasks import in_thread

# The worst case until a fault is known: a pause, a try that times out, a short pause and another try.
PAUSE_S, AGAIN_S, TIMEOUT_S = 2.0, 0.3, 1.2
# A restart of the router or of the units service takes seconds, and is no event.
REPORT_S = 10.0
# The router redirects this path without asking a slot or the landing page.
ROUTER_PATH = "/user/health-check"
# The parts without which no claim succeeds. Without the others a claim can still get a warm slot.
NEEDED_BY_ALL = frozenset({"records", "router"})
# The errors that a try has by design.
EXPECTED = (OSError, TimeoutError, JobFailed, StartFailed, ImageInvalid, ImageNotFound)


class Health:
    """Tries the parts of the host. `faults` has the text of each part that fails; `changed` is set when it changes.

    `restored` is called when a part works again, and `unrecorded` with the error while no slot can be recorded.
    """

    def __init__(
        self, config: CurrentConfig, systemd: Systemd, store: ImageStore, records: Records, network: Network,
        changed: asyncio.Event, router: Path = paths.ROUTER_CHECK_SOCKET,
        restored: Callable[[], None] = lambda: None, unrecorded: Callable[[RecordFailed], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._store = store
        self._records = records
        self._changed = changed
        self._router = router
        self._restored = restored
        self._unrecorded = unrecorded
        self.faults: dict[str, str] = {}
        self._failing_s: dict[str, float] = {}
        self._reported: set[str] = set()
        self._reading: asyncio.Future[None] | None = None
        self._tries: Mapping[str, Callable[[], Awaitable[object]]] = {
            "systemd": systemd.check, "router": self._try_router, "image": self._try_image,
            "records": self._try_records, "network": network.check,
        }

    def may_start(self) -> bool:
        """Whether slots can start, so that more claims than there are warm slots can succeed."""
        return not self.faults

    def may_claim(self) -> bool:
        """Whether a claim of a warm slot can succeed, and its user can open it."""
        config = self._config.value
        needs_network = config.network_mode(config.pool.image) == INTERNET
        return not (NEEDED_BY_ALL | ({"network"} if needs_network else set())) & self.faults.keys()

    def check_records(self) -> None:
        """Raises RecordFailed if records were a fault at the last check and are one now."""
        if "records" in self.faults:
            try:
                self._records.check()
            except OSError as error:
                raise RecordFailed(f"no slot can be recorded: {error}", errno=error.errno) from error

    async def check_network(self) -> None:
        """Raises StartFailed if the network was a fault at the last check and is one now."""
        if "network" in self.faults and (error := await self._try("network")) is not None:
            raise StartFailed(f"no slot can have a network: {_text(error)}", step="network") from error

    async def run(self) -> None:
        """Tries all parts until cancelled."""
        while True:
            await asyncio.sleep(PAUSE_S if await self.check() else AGAIN_S)

    async def check(self) -> bool:
        """Tries all parts once. Whether another try can wait, because no part failed for the first time."""
        before = dict(self.faults)
        results = await asyncio.gather(*(self._try(name) for name in self._tries))
        news = [self._note(name, error) for name, error in zip(self._tries, results, strict=True)]
        if before.keys() - self.faults.keys():
            self._restored()
        if before.keys() != self.faults.keys():
            self._changed.set()
        # Claims that wait would get a slot that cannot be recorded, or none within their timeout.
        try:
            self.check_records()
        except RecordFailed as error:
            self._unrecorded(error)
        return not any(news)

    async def _try(self, name: str) -> Exception | None:
        """The error, None without one."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._tries[name]()
        except EXPECTED as error:
            return error
        return None

    def _note(self, name: str, error: Exception | None) -> bool:
        """Notes the result of a try. Whether it is the first failure after a success."""
        if error is None:
            self.faults.pop(name, None)
            self._failing_s.pop(name, None)
            if name in self._reported:
                self._reported.discard(name)
                emit(Event.HEALTH_RESTORED, part=name)
            return False
        if name not in self._failing_s:
            self._failing_s[name] = now()
            return True
        self.faults[name] = text = _text(error)
        # A host without the default image is not reported, because images are installed after the agent.
        is_absent = isinstance(error, ImageNotFound)
        if name not in self._reported and not is_absent and now() - self._failing_s[name] >= REPORT_S:
            self._reported.add(name)
            emit(Event.HEALTH_LOST, part=name, text=text)
        return False

    async def _try_router(self) -> None:
        # The socket is absent after an upgrade from a version without it, until the router is restarted.
        if self._router.exists():
            await readiness.ready(self._router, ROUTER_PATH)

    async def _try_image(self) -> None:
        """In a thread, because a disk may not respond. While it does not, no other thread is started."""
        if (reading := self._reading) is None or reading.done():
            reading = self._reading = asyncio.ensure_future(in_thread(self._read_image))
            # Otherwise asyncio logs the error of a reading that failed after the timeout.
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(reading)

    def _read_image(self) -> None:
        image = self._store.get(self._config.value.pool.image)
        for path in (image.root, image.static):
            path.stat()

    async def _try_records(self) -> None:
        self._records.check()


def _text(error: Exception) -> str:
    return str(error) or f"no response within {TIMEOUT_S:g} s"
