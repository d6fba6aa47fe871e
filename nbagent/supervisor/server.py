# SPDX-License-Identifier: BSD-3-Clause
"""The supervisor's side of the control socket, and the agent-check: who may connect, and the dispatch of operations.

A caller is the API's user or root, by SO_PEERCRED. It has REQUEST_S for its request, and the number of connections is
bounded, so that an API that an attacker has taken over cannot exhaust the supervisor's memory and descriptors. When a
caller closes its connection while its claim waits, the claim is cancelled; a claim whose response cannot be delivered
is abandoned and its slot ended. Neither happens with an Idempotency-Key of the caller, because then a repeated request
is to get the same slot. With the key of a landing page's button a claim that waits is cancelled too, since most of its
visitors have closed the window; one who has pressed again gets a slot by the second request. The trial of a start is
cancelled likewise, so that its slot keeps no place.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from nbagent.core.errors import BadRequest, Forbidden, NbagentError, SupervisorUnavailable
from nbagent.supervisor.calls import Calls
from nbagent.wire import control, operations
from nbagent.wire.accepting import ACCEPT_PAUSE_S, EXHAUSTED
from nbagent.wire.aio import accept, receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.fields import MalformedMessage, mapping, text
from nbagent.wire.operations import Arguments, Operation

# A request is one packet and a memfd, which the API sends at once.
REQUEST_S = 10.0
# The API has fewer threads than that (nbagent.web.gunicorn_app), and each has one connection at a time.
CONNECTIONS_MAX = 4096
# Connections of callers that are not allowed. They are accepted so that the response has the reason.
REFUSED_MAX = 16
RETRY_AFTER_S = 2

# The operations that hand out a slot.
HANDS_OUT = (operations.CLAIM.name, operations.LEND.name)
# The keys of claims that are cancelled when their caller leaves.
CANCELLED = (operations.OWN_KEY_PREFIX, operations.LANDING_KEY_PREFIX)

# Between two connections to the port of HAProxy's agent-check, at which a gateway connects every few seconds.
CHECK_PAUSE_S = 0.002

A = TypeVar("A", bound=Arguments)
R = TypeVar("R")
# Reads an operation's arguments from a request, and calls the supervisor with them.
Handler = Callable[[Message], object]


def handlers(calls: Calls) -> dict[str, Handler]:
    """The operations of nbagent.wire.operations, each with the call that it is."""
    return dict([
        _handler(operations.CLAIM, lambda args: calls.claim(args.options, args.key, args.client, args.trace)),
        _handler(operations.LEND, lambda args: calls.lend(args.options, args.key, args.client)),
        _handler(operations.KEEP, lambda args: calls.keep(args.id, args.token, args.client)),
        _handler(operations.GIVE_BACK, lambda args: calls.give_back(args.id, args.token, args.client)),
        _handler(operations.SLOTS, lambda _: calls.list_slots()),
        _handler(operations.SLOT, lambda args: calls.slot(args.id)),
        _handler(operations.UPDATE, lambda args: calls.update(args.id, args.options, args.client)),
        _handler(operations.RELEASE, lambda args: calls.release(args.id, args.client)),
        _handler(operations.DRAIN, lambda _: calls.set_draining(True)),
        _handler(operations.UNDRAIN, lambda _: calls.set_draining(False)),
        _handler(operations.RECYCLE_POOL, lambda _: calls.recycle_pool()),
        _handler(operations.TRY_START, lambda _: calls.try_start()),
        _handler(operations.STATS, lambda _: calls.stats()),
        _handler(operations.IMAGES, lambda _: calls.images()),
    ])


def _handler(operation: Operation[A, R], call: Callable[[A], object]) -> tuple[str, Handler]:
    def handle(request: Message) -> object:
        return call(operation.restore(mapping(request.body, "args"), request))

    return operation.name, handle


class ControlServer:
    """Serves the control socket."""

    def __init__(self, calls: Calls, listener: socket.socket, allowed_uids: Collection[int]) -> None:
        self.calls = calls
        self.listener = listener
        self.allowed_uids = allowed_uids
        self._handlers = handlers(calls)
        self._connections = {True: 0, False: 0}  # of allowed callers, and of others

    async def serve(self) -> None:
        """Accepts until cancelled. Raises OSError when it cannot."""
        loop = asyncio.get_running_loop()
        failed = loop.create_future()
        self.listener.setblocking(False)
        loop.add_reader(self.listener.fileno(), self._accept, failed)
        try:
            await failed
        finally:
            loop.remove_reader(self.listener.fileno())

    def _accept(self, failed: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno in EXHAUSTED:
                loop.remove_reader(self.listener.fileno())
                loop.call_later(ACCEPT_PAUSE_S, self._resume, failed)
            elif not failed.done():
                failed.set_exception(error)
            return
        channel = Channel(connection, control.REQUEST_MAX_BYTES)
        allowed = channel.peer_uid() in self.allowed_uids
        if self._connections[allowed] < (CONNECTIONS_MAX if allowed else REFUSED_MAX):
            self._connections[allowed] += 1
            self.calls.spawn(self._serve_one(channel, allowed))
        else:
            channel.close()

    def _resume(self, failed: asyncio.Future[None]) -> None:
        if not failed.done():
            asyncio.get_running_loop().add_reader(self.listener.fileno(), self._accept, failed)

    async def _serve_one(self, channel: Channel, allowed: bool) -> None:
        try:
            await self._serve(channel)
        finally:
            self._connections[allowed] -= 1

    async def _serve(self, channel: Channel) -> None:
        """One request and its response. No other task runs between a warm slot's claim and the response."""
        with channel:
            channel.socket.setblocking(False)
            try:
                async with asyncio.timeout(REQUEST_S):
                    request = await receive(channel)
            except TimeoutError:
                return
            except (OSError, MalformedMessage) as error:
                with contextlib.suppress(OSError):
                    channel.send({"error": BadRequest(str(error)).to_wire()})
                return
            if request is None:
                return
            # Open until the claim is complete, because its files are in a descriptor of the request.
            with request:
                response, claimed = await self._respond(channel, request)
            try:
                channel.send(response)
                # The kernel runs the process that the response wakes on this processor, once this process yields it.
                os.sched_yield()
            except OSError:
                if claimed is not None:
                    # In the loop's next turn, because the claim's own event is emitted there.
                    asyncio.get_running_loop().call_soon(self.calls.abandon, claimed)

    async def _respond(self, channel: Channel, request: Message) -> tuple[dict[str, object], str | None]:
        """The response, and the slot to abandon when the response cannot be delivered."""
        try:
            _check_peer(channel, self.allowed_uids)
            name = text(request.body, "op")
            if (handler := self._handlers.get(name)) is None:
                raise BadRequest(f"unknown operation {name[:40]!r}")
            key = _key(request) if name in HANDS_OUT else ""
            is_lost = key.startswith(operations.OWN_KEY_PREFIX)
            ends_with_caller = key.startswith(CANCELLED) or name == operations.TRY_START.name
            with _cancelled_with(channel) if ends_with_caller else contextlib.nullcontext():
                result = handler(request)
                if inspect.isawaitable(result):
                    result = await result
            return {"ok": result}, str(result["slot"]) if is_lost and isinstance(result, dict) else None
        except NbagentError as error:
            return {"error": error.to_wire()}, None
        except MalformedMessage as error:
            return {"error": BadRequest(str(error)).to_wire()}, None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                reason = f"the supervisor cannot serve the request: {error.strerror}"
                return {"error": SupervisorUnavailable(reason, retry_after_s=RETRY_AFTER_S).to_wire()}, None
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a request failed unexpectedly", "exception": error}
            )
            failed = NbagentError("an error in the supervisor; its journal has the details: journalctl -u nbagent")
            return {"error": failed.to_wire()}, None


async def serve_check(calls: Calls, listener: socket.socket) -> None:
    """Responds to HAProxy's agent-check until cancelled: one line, then the connection is closed.

    `ready` ends the drain that `drain` began. Nothing is read from the connection. The pause bounds what a flood of
    connections costs the loop, which does not run other tasks while accept(2) finds a connection.
    """
    listener.setblocking(False)
    while True:
        connection = await accept(listener)
        with connection, contextlib.suppress(OSError):
            line = "drain" if calls.draining else f"ready {calls.free_percent()}%"
            connection.send(f"{line}\n".encode())
        await asyncio.sleep(CHECK_PAUSE_S)


def _key(request: Message) -> str:
    key = mapping(request.body, "args").get("key")
    return key if isinstance(key, str) else ""


@contextlib.contextmanager
def _cancelled_with(channel: Channel) -> Iterator[None]:
    """Cancels the current task when the caller closes its connection."""
    task, loop, fd = asyncio.current_task(), asyncio.get_running_loop(), channel.fileno()
    if task is None:
        raise RuntimeError("a request is served in a task")

    def closed() -> None:
        loop.remove_reader(fd)
        task.cancel()

    # In the loop's next turn, because most claims are complete in this one.
    watch = loop.call_soon(loop.add_reader, fd, closed)
    try:
        yield
    finally:
        watch.cancel()
        loop.remove_reader(fd)


def _check_peer(channel: Channel, allowed_uids: Collection[int]) -> None:
    uid = channel.peer_uid()
    if uid not in allowed_uids:
        raise Forbidden(f"user id {uid} may not use the control socket")
