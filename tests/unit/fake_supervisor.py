# SPDX-License-Identifier: BSD-3-Clause
"""A supervisor on a host that is made of fakes: the real control socket, calls, claims and pools, and no process.

The API, the landing page and the command line are tested against it. `asked` has each request that reached it, so that
a test can show that bad input was refused before.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fakes import LABEL, Host, until

from nbagent.core.events import Event
from nbagent.core.model import Slot, SlotState
from nbagent.supervisor import content_injector
from nbagent.supervisor.calls import Calls
from nbagent.supervisor.content_injector import Injected
from nbagent.supervisor.host_load import Memory
from nbagent.supervisor.server import ControlServer

__all__ = ["LABEL", "FakeSupervisor"]
T = TypeVar("T")
WARM = 2
CAPACITY_MAX = 60000
MEMORY = Memory(1 << 50, 1 << 50)


class ClaimedSlots(dict[str, Slot]):
    """The claimed slots at one time; `clear` ends them."""

    def __init__(self, supervisor: FakeSupervisor, slots: Mapping[str, Slot]) -> None:
        super().__init__(slots)
        self._supervisor = supervisor

    def clear(self) -> None:
        self._supervisor.end(list(self))
        super().clear()


class RecordedCalls:
    """The calls of a supervisor, each of which is recorded first, or raises what the test has set."""

    def __init__(self, fake: FakeSupervisor, calls: Calls, settled: Callable[[], bool]) -> None:
        self._fake, self._calls, self._settled = fake, calls, settled
        # For the server, which does not record them.
        self.abandon, self.free_percent = calls.abandon, calls.free_percent

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Serves a request when the one before has taken effect, so that no response depends on time."""
        async def serve() -> None:
            await until(self._settled)
            await work

        self._calls.spawn(serve())

    @property
    def draining(self) -> bool:
        return self._calls.draining

    async def claim(self, options: Mapping[str, Any], key: str, client: str, trace: str = "") -> Any:
        self._record("claim", options=options, key=key, client=client, **({"trace": trace} if trace else {}))
        return await self._calls.claim(options, key, client, trace)

    async def lend(self, options: Mapping[str, Any], key: str, client: str) -> Any:
        self._record("lend", options=options, client=client)
        return await self._calls.lend(options, key, client)

    def keep(self, slot: str, token: str, client: str) -> Any:
        self._record("keep", slot=slot)
        return self._calls.keep(slot, token, client)

    def give_back(self, slot: str, token: str, client: str) -> Any:
        self._record("give_back", slot=slot)
        return self._calls.give_back(slot, token, client)

    def list_slots(self) -> Any:
        self._record("slots")
        return self._calls.list_slots()

    def slot(self, id: str) -> Any:  # noqa: A002
        self._record("slot", id=id)
        return self._calls.slot(id)

    def update(self, id: str, options: Mapping[str, Any], client: str) -> Any:  # noqa: A002
        self._record("update", id=id, options=options)
        return self._calls.update(id, options, client)

    def release(self, id: str, client: str) -> Any:  # noqa: A002
        self._record("release", id=id)
        return self._calls.release(id, client)

    def set_draining(self, draining: bool) -> Any:
        self._record("drain" if draining else "undrain")
        return self._calls.set_draining(draining)

    def recycle_pool(self) -> Any:
        self._record("recycle_pool")
        return self._calls.recycle_pool()

    async def try_start(self) -> Any:
        self._record("try_start")
        return await self._calls.try_start()

    def images(self) -> Any:
        self._record("images")
        return self._calls.images()

    def stats(self) -> Any:
        self._record("stats")
        return self._calls.stats()

    def _record(self, op: str, **args: Any) -> None:
        self._fake.asked.append({"op": op, "args": args})
        if self._fake.raises is not None:
            raise self._fake.raises


class FakeSupervisor:
    """Serves the control socket at `path` in a thread, until it is closed."""

    def __init__(self, path: Path, capacity: int = 1000) -> None:
        self.path = path
        self.asked: list[dict[str, Any]] = []
        self.raises: Exception | None = None
        self._capacity = capacity
        # On a tmpfs, as /run/nbagent is, because a disk takes milliseconds for each record.
        self._state = Path(tempfile.mkdtemp(prefix=f"nbagent-fake-{os.getpid()}-", dir="/dev/shm"))
        self._host = Host(
            self._state,
            pool={"warm": WARM, "starts": 4},
            slots={"capacity": max(1, min(CAPACITY_MAX, capacity))},
            network={"allow": ["internet", "none"]},
            claims={"archives": ["https://data.example.org/"]},
        )
        self._host.memory = MEMORY
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="fake-supervisor")
        self._thread.start()
        if not ready.wait(10):
            raise AssertionError("the fake supervisor did not start within 10 s")

    def __enter__(self) -> FakeSupervisor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the supervisor; a second call does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
            self._listener.close()
            self.path.unlink()
            shutil.rmtree(self._state)

    @property
    def capacity(self) -> int:
        """The capacity. 0 makes the host full: it starts no slot, and its warm slots end."""
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        self._capacity = capacity
        warm = self._in_loop(self._set_capacity)
        if capacity == 0:
            self.end(warm)

    @property
    def slots(self) -> ClaimedSlots:
        """The claimed slots."""
        return ClaimedSlots(self, self._in_loop(lambda: {
            name: live.slot for name, live in self._host.slots.items() if live.slot.state is SlotState.CLAIMED
        }))

    @property
    def draining(self) -> bool:
        return self._in_loop(lambda: self._host.calls.draining)

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._in_loop(lambda: self._host.calls.set_draining(draining))

    @property
    def ready(self) -> bool:
        """Whether starts of the default image succeed."""
        return bool(self._in_loop(lambda: self._host.calls.stats()["ready"]))

    @ready.setter
    def ready(self, ready: bool) -> None:
        def set_failures() -> None:
            self._host.supervisor.pools["minimal"].failures = 0 if ready else 1

        self._in_loop(set_failures)

    def end(self, names: list[str]) -> None:
        """Ends slots and waits for their ends."""
        async def end() -> None:
            for name in names:
                self._host.supervisor.stopper.end(self._host.slots[name], Event.SLOT_RELEASED, client="a test")
            await until(lambda: not set(names) & set(self._host.slots))

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)

    def _in_loop(self, function: Callable[[], T]) -> T:
        """Calls a function in the thread of the event loop."""
        async def call() -> T:
            return function()

        if not self._thread.is_alive():
            return function()
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def _set_capacity(self) -> list[str]:
        config = self._host.config.value
        self._host.config.value = dataclasses.replace(
            config,
            slots=dataclasses.replace(config.slots, capacity=self._capacity),
            pool=dataclasses.replace(config.pool, warm=WARM if self._capacity else 0),
        )
        return [live.slot.id for live in self._host.supervisor.pools.warm_slots()]

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        with contextlib.ExitStack() as stack:
            inject = content_injector.inject
            stack.callback(setattr, content_injector, "inject", inject)
            content_injector.inject = _inject  # type: ignore[assignment]
            async with self._host as host:
                load = host.supervisor.load
                load.cpus = 4
                load.next_end_s = lambda: 4.2  # type: ignore[method-assign]
                await host.until_states(*["warm"] * WARM)
                calls: Any = RecordedCalls(self, host.calls, self._settled)
                server = asyncio.ensure_future(ControlServer(calls, self._listener, {os.getuid()}).serve())
                ready.set()
                await self._closing.wait()
                server.cancel()
                await asyncio.gather(server, return_exceptions=True)

    def _settled(self) -> bool:
        """Whether no slot is ending, and the next claim finds a warm slot or is refused at once."""
        load, slots = self._host.supervisor.load, self._host.supervisor.slots
        if slots.count(SlotState.STOPPING) or slots.count(SlotState.FAILED):
            return False
        return load.draining or slots.count(SlotState.WARM) > 0 or not load.room(load.host(), "minimal")


async def _inject(
    slot: Slot, pidfd: int, content: Any, settings: Any, join_scope: Callable[[int], Awaitable[None]]
) -> Injected:
    await join_scope(os.getpid())
    return Injected(len(content.files), 0)
