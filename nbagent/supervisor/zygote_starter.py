# SPDX-License-Identifier: BSD-3-Clause
"""The start of one zygote: its unit, the connection of its zygote service, and the message that it is ready.

The zygote service connects to the supervisor, which sends it the sandbox and the modules to load. The start has a
budget of processor time instead of a deadline, because on a busy host it takes minutes. Beside a zygote that forks, the
next one starts at the lowest CPU weight. `zygotes` decides when to start one, and what follows a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from dataclasses import replace
from pathlib import Path

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import StartFailed
from nbagent.core.events import Event, emit
from nbagent.image.store import Image
from nbagent.linux import cgroup
from nbagent.supervisor import fd_store
from nbagent.supervisor.former_zygotes import Begun, Description
from nbagent.supervisor.systemd import JobFailed, Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.supervisor.zygote_identity import CPU_WEIGHT, identity, limits, sandbox, unit_of
from nbagent.wire import fields
from nbagent.wire.aio import accept, readable, receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import NOTE_MAX_CHARACTERS, NOTES_MAX, StepFailed, printable
from nbagent.wire.fields import MalformedMessage

HELLO_TIMEOUT_S = 20.0
# A zygote takes 5 to 11 s of processor time to start, and 60 slots a second take both processors
# (packaging/docs/benchmarks.md). While the former one forks, the next starts at the lowest weight; after PATIENCE_S it
# gets its full weight.
PATIENCE_S = 300.0
CPU_WEIGHT_GIVING_WAY = 1
# The errors that the start of a zygote has by design; any other is a fault of the supervisor.
EXPECTED = (OSError, JobFailed, TimeoutError, StartFailed, MalformedMessage)
# The budget of a start is slots.start_timeout of processor time, because on a busy host it takes minutes; in all it may
# take this many times as long.
START_MAX_FACTOR = 10
BUDGET_CHECK_S = 1.0


class ZygoteStarter:
    """Starts zygotes, and waits for those that a former supervisor was starting. Both raise the errors of EXPECTED."""

    def __init__(self, config: CurrentConfig, systemd: Systemd) -> None:
        self._config = config
        self._systemd = systemd
        self._expected: dict[str, asyncio.Future[Channel]] = {}
        self._leaving = False
        self._tasks = Tasks()
        self._listener: socket.socket | None = None

    def listen(self, path: Path) -> None:
        """Listens for zygote services."""
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(before)
        self._listener.listen()
        self._listener.setblocking(False)
        self._tasks.spawn(self._accept(self._listener))

    def leave(self) -> None:
        """From now on a start that is cancelled leaves its zygote to the next supervisor."""
        self._leaving = True

    async def close(self) -> None:
        """Stops listening. The starts must have ended."""
        await self._tasks.cancel()
        if self._listener is not None:
            self._listener.close()

    async def start(
        self, image: Image, instance: str, *, quick: bool, gives_way_until: asyncio.Event | None = None
    ) -> Channel:
        """Starts a zygote, and returns when it is ready.

        It has the lowest CPU weight until `gives_way_until` is set, at most for PATIENCE_S.
        """
        unit, limited = unit_of(instance), limits(self._config.value)
        weight = CPU_WEIGHT if gives_way_until is None else CPU_WEIGHT_GIVING_WAY
        try:
            await self._systemd.set_limits(unit, replace(limited, cpu_weight=weight))
            made = asyncio.ensure_future(self._make(image, instance, quick=quick))
            try:
                if gives_way_until is not None:
                    await self._wait_giving_way(made, gives_way_until)
                    await self._systemd.set_cpu_weight(unit, CPU_WEIGHT)
                async with asyncio.timeout(self._max_s()):
                    return await made
            finally:
                made.cancel()
        except asyncio.CancelledError:
            # systemd would keep the limits of a unit that never started.
            if not self._leaving:
                self._tasks.spawn(self._stop(unit))
            raise

    async def resume(self, image: Image, begun: Begun) -> tuple[Channel, Description]:
        """Waits until a zygote that a former supervisor was starting is ready. Returns also its description.

        Its service responds to the description when the zygote is ready. Before that the service has sent that it is
        ready, which the former supervisor may have received.
        """
        channel, token = begun.channel, secrets.token_hex(8)
        try:
            channel.send({"describe": token})
            async with asyncio.timeout(self._max_s()):
                while (response := await self._response(channel)) is not None:
                    with response:
                        response.raise_failure()
                        if "ready" in response.body:
                            _report_notes(response, begun.instance, image)
                        elif response.body.get("described") == token:
                            described = Description.read(response.body)
                            if not described.suits(image):
                                raise StartFailed("it has another image, or another protocol", step="zygote")
                            return channel, described
            raise StartFailed("the zygote service ended", step="zygote")
        except BaseException as error:
            self._abandon(begun.instance, channel)
            if isinstance(error, StepFailed):
                raise StartFailed.at(*error.failure) from error
            raise

    async def _stop(self, unit: str) -> None:
        with contextlib.suppress(OSError):
            await self._systemd.stop(unit)

    def _max_s(self) -> float:
        return START_MAX_FACTOR * self._config.value.slots.start_timeout

    async def _wait_giving_way(self, made: asyncio.Task[Channel], until: asyncio.Event) -> None:
        ends = asyncio.ensure_future(until.wait())
        try:
            await asyncio.wait({made, ends}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ends.cancel()

    async def _make(self, image: Image, instance: str, *, quick: bool) -> Channel:
        connected = self._expected[instance] = asyncio.get_running_loop().create_future()
        try:
            await self._systemd.start(unit_of(instance))
            channel = await self._connected(unit_of(instance), connected)
        finally:
            del self._expected[instance]
        settings = self._config.value
        try:
            channel.send({
                "spec": sandbox(settings, image, quick=quick).save(), "preload": list(image.preload),
                "extensions_after_fork": list(image.extensions_after_fork),
                "identity": identity(settings, image, quick=quick),
            })
            fd_store.begin(instance, channel.fileno())
            response = await self._response(channel)
            if response is None:
                raise StartFailed("the zygote service ended", step="zygote")
            with response:
                response.raise_failure()
                if "ready" not in response.body:
                    raise MalformedMessage("expected ready or a failure")
                _report_notes(response, instance, image)
        except BaseException as error:
            self._abandon(instance, channel)
            if isinstance(error, StepFailed):
                raise StartFailed.at(*error.failure) from error
            raise
        return channel

    def _abandon(self, instance: str, channel: Channel) -> None:
        """Closes the connection to a zygote that is not ready, and ends it by that unless this supervisor ends."""
        channel.close()
        if not self._leaving:
            fd_store.forget(instance)

    async def _response(self, channel: Channel) -> Message | None:
        """The message of the zygote service when its zygote is ready or has failed.

        Raises StartFailed when the budget of processor time is used up.
        """
        budget_s, group = self._config.value.slots.start_timeout, cgroup.of_process(channel.peer_pid())
        receiving = asyncio.ensure_future(receive(channel))
        try:
            while not (await asyncio.wait({receiving}, timeout=BUDGET_CHECK_S))[0]:
                if (used_s := group.cpu_s()) > budget_s:
                    raise StartFailed(f"not ready after {used_s:.0f} s of processor time", step="zygote")
            return receiving.result()
        finally:
            receiving.cancel()

    async def _connected(self, unit: str, connected: asyncio.Future[Channel]) -> Channel:
        """The channel of a zygote service, when it connects. Raises StartFailed when the service ends before that."""
        ended = StartFailed("the zygote service ended before it connected", step="zygote")
        if connected.done():
            return connected.result()
        try:
            pidfd = os.pidfd_open(await self._systemd.main_pid(unit))
        except (FileNotFoundError, ProcessLookupError):
            raise ended from None
        end = asyncio.ensure_future(readable(pidfd))
        waiting: set[asyncio.Future[Channel] | asyncio.Future[None]] = {connected, end}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not connected.done():
                raise ended
            return connected.result()
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)
            os.close(pidfd)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            connection = await accept(listener)
            connection.setblocking(False)
            self._tasks.spawn(self._greet(Channel(connection)))

    async def _greet(self, channel: Channel) -> None:
        expected = None
        with contextlib.suppress(TimeoutError, OSError, MalformedMessage):
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await receive(channel)
            if hello is not None:
                with hello:
                    unit = fields.text(hello.body, "unit")
                    expected = self._expected.get(unit) if channel.peer_uid() == 0 else None
        if expected is None or expected.done():
            channel.close()
        else:
            expected.set_result(channel)


def _report_notes(response: Message, instance: str, image: Image) -> None:
    for note in fields.texts(response.body, "notes")[:NOTES_MAX]:
        text = printable(note, NOTE_MAX_CHARACTERS)
        emit(Event.ZYGOTE_LEFT_OUT, zygote=instance, image=image.name, text=text)
