"""The control socket's other side, and the agent-check: who may ask, and what is answered.

A caller is the API's user or root, by SO_PEERCRED. One that closes its connection while its
claim waits gives the place up; a claim whose answer nobody receives is released again, unless an
Idempotency-Key from outside promises that somebody will ask for it once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Collection, Iterator
from typing import Any

from nbagent.core.errors import BadRequest, Forbidden, NbagentError
from nbagent.supervisor.aio import readable
from nbagent.supervisor.calls import Calls
from nbagent.wire import control


class ControlServer:
    """Serves the control socket."""

    def __init__(self, calls: Calls, listener: socket.socket, allowed_uids: Collection[int]) -> None:
        self.calls = calls
        self.listener = listener
        self.allowed_uids = allowed_uids

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
        try:
            connection, _ = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if not failed.done():
                failed.set_exception(error)
            return
        self.calls.spawn(self._serve_one(connection))

    async def _serve_one(self, connection: socket.socket) -> None:
        """One request and its answer. No other task has its turn between a warm slot's claim and the answer."""
        with connection:
            connection.setblocking(False)
            try:
                payload = await _received(connection)
            except (OSError, ValueError) as error:
                with contextlib.suppress(OSError):
                    control.send(connection, {"error": BadRequest(f"unreadable: {error}").to_wire()})
                return
            if not payload:
                return
            answer, nobody_asks_again = await self._answer(connection, payload)
            try:
                control.send(connection, answer)
                # The kernel puts the one it wakes on this processor, as if we were to sleep now.
                os.sched_yield()
            except OSError:
                if nobody_asks_again and "ok" in answer:
                    # After what the claim has yet to say.
                    asyncio.get_running_loop().call_soon(self.calls.abandon, answer["ok"]["slot"])

    async def _answer(self, connection: socket.socket, payload: bytes) -> tuple[dict[str, Any], bool]:
        """The answer, and whether it is a claim's that is lost when this connection is."""
        own = False
        try:
            _check_peer(connection, self.allowed_uids)
            request = _request(payload)
            own = request["op"] == "claim" and request["args"]["key"].startswith(control.OWN_KEY_PREFIX)
            with _until_gone(connection) if own else contextlib.nullcontext():
                return {"ok": await self._dispatch(request)}, own
        except NbagentError as error:
            return {"error": error.to_wire()}, own
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a request failed unexpectedly", "exception": error}
            )
            return {"error": NbagentError("the supervisor failed; its journal says more").to_wire()}, own

    async def _dispatch(self, request: dict[str, Any]) -> Any:
        calls, op, args = self.calls, request["op"], request["args"]
        match op:
            case "claim":
                return await calls.claim(args.get("options", {}), args["key"], str(args.get("client", "?")))
            case "slots":
                return calls.list_slots()
            case "slot":
                return calls.slot(str(args.get("id")))
            case "update":
                return calls.update(str(args.get("id")), args.get("options", {}))
            case "release":
                return calls.release(str(args.get("id")))
            case "drain" | "undrain":
                return calls.set_draining(op == "drain")
            case "recycle_pool":
                return calls.recycle_pool()
            case "stats":
                return calls.stats()
            case "images":
                return calls.images()
        raise BadRequest(f"unknown request {op!r}")


async def serve_check(calls: Calls, listener: socket.socket) -> None:
    """Answers HAProxy's agent-check until cancelled: one line, then the connection ends.

    `ready` takes a server out of the drain that `drain` put it into; nothing is ever read.
    """
    listener.setblocking(False)
    while True:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        with connection, contextlib.suppress(OSError):
            line = "drain" if calls.draining else f"ready {calls.free_percent()}%"
            connection.send(f"{line}\n".encode())


async def _received(connection: socket.socket) -> bytes:
    """What the caller asks, which mostly is there with its connection; b"" when it left."""
    while True:
        try:
            return control.receive_bytes(connection, control.REQUEST_MAX_BYTES)
        except BlockingIOError:
            await readable(connection.fileno())


@contextlib.contextmanager
def _until_gone(connection: socket.socket) -> Iterator[None]:
    """Cancels the current task when the caller closes its connection meanwhile."""
    task, loop, fd = asyncio.current_task(), asyncio.get_running_loop(), connection.fileno()
    assert task is not None

    def gone() -> None:
        loop.remove_reader(fd)
        task.cancel()

    # In the loop's next turn: most claims are answered in this one.
    watch = loop.call_soon(loop.add_reader, fd, gone)
    try:
        yield
    finally:
        watch.cancel()
        loop.remove_reader(fd)


def _request(payload: bytes) -> dict[str, Any]:
    try:
        request = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise BadRequest("a request is an object")
    if not isinstance(request.get("op"), str) or not isinstance(request.get("args"), dict):
        raise BadRequest('a request is {"op": str, "args": {...}}')
    options, key = request["args"].get("options", {}), request["args"].get("key")
    if not isinstance(options, dict) or not isinstance(key, str if request["op"] == "claim" else type(None)):
        raise BadRequest("options must be an object, and a claim has a key, a string")
    return request


def _check_peer(connection: socket.socket, allowed_uids: Collection[int]) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in allowed_uids:
        raise Forbidden(f"user id {uid} may not ask the supervisor")
