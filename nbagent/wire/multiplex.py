# SPDX-License-Identifier: BSD-3-Clause
"""Many requests at a time over one channel in an event loop: a connection for each would cost the start of a slot more
than the requests themselves. Every message has a "number", which the response repeats. Messages have no descriptors.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Awaitable, Callable, Dict, Mapping, Optional, Set

from nbagent.wire import fields
from nbagent.wire.channel import PACKET_MAX_BYTES, Channel, Message
from nbagent.wire.failure import Failure
from nbagent.wire.fields import MalformedMessage

_NUMBER = "number"
_NUMBER_MAX = 1 << 62

Respond = Callable[[Mapping[str, object]], Awaitable[Mapping[str, object]]]


class _Sender:
    """Sends in the order of the calls, and waits while the peer's buffer is full."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = asyncio.Lock()

    async def send(self, body: Mapping[str, object]) -> None:
        async with self._lock:
            while True:
                try:
                    self._channel.send(body)
                    return
                except BlockingIOError:
                    await _writable(self._channel.fileno())


class Requests:
    """Requests to the service at `path`, over a connection that is made with the first and again after its end."""

    def __init__(self, path: str, limit_bytes: int = PACKET_MAX_BYTES) -> None:
        self._path, self._limit_bytes = path, limit_bytes
        self._connection: Optional[_Connection] = None

    async def request(self, body: Mapping[str, object]) -> Message:
        """The response. Raises ConnectionError when the service ends before it; OSError."""
        try:
            response = await self._connected().send(body)
        except ConnectionError:
            # The service ended before this request, and the event loop has not processed that end yet.
            response = await self._connected().send(body)
        return await response

    def _connected(self) -> _Connection:
        if self._connection is None or self._connection.ended:
            channel = Channel.unconnected(self._limit_bytes)
            try:
                # connect(2) of a unix socket waits only while the service's queue of connections is full.
                channel.socket.connect(self._path)
            except BaseException:
                channel.close()
                raise
            channel.socket.setblocking(False)
            self._connection = _Connection(channel)
        return self._connection

    def close(self) -> None:
        """Closes the connection; requests that wait for a response fail."""
        if self._connection is not None:
            self._connection.close()


class _Connection:
    """One connection; it closes itself at its end."""

    def __init__(self, channel: Channel) -> None:
        self.ended = False
        self._channel, self._sender = channel, _Sender(channel)
        self._numbers = itertools.count()
        self._waiting: Dict[int, asyncio.Future[Message]] = {}
        asyncio.get_running_loop().add_reader(channel.fileno(), self._receive)

    async def send(self, body: Mapping[str, object]) -> asyncio.Future[Message]:
        """The response to come. Raises ConnectionError when the request was not sent; OSError."""
        number = next(self._numbers)
        response = self._waiting[number] = asyncio.get_running_loop().create_future()
        response.add_done_callback(lambda _: self._waiting.pop(number, None))
        try:
            await self._sender.send({_NUMBER: number, **body})
        except BaseException as error:
            response.cancel()
            if isinstance(error, OSError):
                self.close()
            raise
        return response

    def _receive(self) -> None:
        try:
            while (message := self._channel.receive(wait=False)) is not None:
                message.close()
                response = self._waiting.get(fields.integer(message.body, _NUMBER, 0, _NUMBER_MAX))
                # A cancelled request waits no more.
                if response is not None and not response.done():
                    response.set_result(message)
        except BlockingIOError:
            return
        except (OSError, MalformedMessage):
            pass
        self.close()

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        for response in list(self._waiting.values()):
            if not response.done():
                response.set_exception(ConnectionResetError("the connection ended before the response"))


async def serve(channel: Channel, step: str, respond: Respond) -> None:
    """Responds to the requests of a channel, whose socket does not block, until its end; each in a task.

    A malformed message ends the connection with a failure of `step`. Requests whose connection has ended are still
    carried out. `respond` gets the body, and raises nothing.
    """
    loop, sender = asyncio.get_running_loop(), _Sender(channel)
    tasks: Set[asyncio.Task[None]] = set()
    ended = loop.create_future()

    async def do(number: int, body: Mapping[str, object]) -> None:
        response = await respond(body)
        with contextlib.suppress(OSError):
            await sender.send({_NUMBER: number, **response})

    def receive() -> None:
        try:
            while (message := channel.receive(wait=False)) is not None:
                message.close()
                number = fields.integer(message.body, _NUMBER, 0, _NUMBER_MAX)
                task = loop.create_task(do(number, message.body))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except BlockingIOError:
            return
        except (OSError, MalformedMessage) as error:
            with contextlib.suppress(OSError):
                channel.send(Failure.of(error, step).save())
        # At once, because the descriptor stays readable.
        loop.remove_reader(channel.fileno())
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(channel.fileno(), receive)
    try:
        await ended
        if tasks:
            await asyncio.wait(tasks)
    finally:
        loop.remove_reader(channel.fileno())
        for task in tasks:
            task.cancel()


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(fd, wake)
    try:
        await ready
    finally:
        loop.remove_writer(fd)
