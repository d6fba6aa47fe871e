"""The control socket's other side, and the agent-check: who may ask, and what is answered.

A caller is the API's user or root, by SO_PEERCRED. One that closes its connection while its
claim waits gives the place up; a claim whose answer nobody receives is released again, unless an
Idempotency-Key from outside promises that somebody will ask for it once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Collection
from typing import Any

from nbagent import control
from nbagent.errors import BadRequest, Forbidden, NbagentError
from nbagent.supervisor.calls import Calls
from nbagent.supervisor.waiting import readable


class ControlServer:
    """Serves the control socket."""

    def __init__(self, calls: Calls, listener: socket.socket, allowed_uids: Collection[int]) -> None:
        self.calls = calls
        self.listener = listener
        self.allowed_uids = allowed_uids
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Accepts until cancelled."""
        self.listener.setblocking(False)
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
            task = asyncio.ensure_future(self._serve_one(connection))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve_one(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            connection.setblocking(False)
            await readable(connection.fileno())
            try:
                payload = control.receive_bytes(connection, control.REQUEST_MAX_BYTES)
            except (OSError, ValueError) as error:
                with contextlib.suppress(OSError):
                    control.send(connection, {"error": BadRequest(f"unreadable: {error}").to_wire()})
                return
            if not payload:
                return
            work = asyncio.ensure_future(self._answer(connection, payload))
            gone = asyncio.ensure_future(loop.sock_recv(connection, 1))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                # At once: in the loop's next turns the slot that replaces a claimed one is started.
                if sent := work.done():
                    self._send(connection, payload, work)
            finally:
                gone.cancel()
                if not work.done():
                    work.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)
            if not sent:
                self._send(connection, payload, work)

    def _send(self, connection: socket.socket, payload: bytes, work: asyncio.Task[dict[str, Any]]) -> None:
        """Sends the answer, if there is one; takes back what nobody is there to receive."""
        if work.cancelled() or work.exception() is not None:
            return
        try:
            control.send(connection, work.result())
        except OSError:
            self._lost(payload, work.result())

    async def _answer(self, connection: socket.socket, payload: bytes) -> dict[str, Any]:
        try:
            _check_peer(connection, self.allowed_uids)
            return {"ok": await self._dispatch(_request(payload))}
        except NbagentError as error:
            return {"error": error.to_wire()}
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a request failed unexpectedly", "exception": error}
            )
            return {"error": NbagentError("the supervisor failed; its journal says more").to_wire()}

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
            case "renew":
                return calls.renew()
            case "stats":
                return calls.stats()
            case "images":
                return calls.images()
        raise BadRequest(f"unknown request {op!r}")

    def _lost(self, payload: bytes, answer: dict[str, Any]) -> None:
        request = _request(payload)
        if request["op"] != "claim" or "ok" not in answer:
            return
        if request["args"]["key"].startswith(control.OWN_KEY_PREFIX):
            self.calls.unclaim(answer["ok"]["slot"])


async def serve_check(calls: Calls, listener: socket.socket) -> None:
    """Answers HAProxy's agent-check until cancelled: one line, then the connection ends.

    `ready` takes a server out of the drain that `drain` put it into; nothing is ever read.
    """
    listener.setblocking(False)
    while True:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        with connection, contextlib.suppress(OSError):
            line = "drain" if calls.agent.draining else f"ready {calls.free_percent()}%"
            connection.send(f"{line}\n".encode())


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
