# SPDX-License-Identifier: BSD-3-Clause
"""The control socket: its address, its limits, and the API's side of it.

One connection is one request and one response (nbagent.wire.operations), so a caller that closes its connection is
seen at once. The supervisor's side, nbagent.supervisor.server, decides; who may connect is the socket's mode and the
supervisor's check of SO_PEERCRED. The API closes its connection when its own caller has left, so that no slot is
started for, and handed out to, a client that waits no more.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar, cast, overload

from nbagent.core import paths
from nbagent.core.errors import SupervisorUnavailable, from_wire
from nbagent.wire import fields
from nbagent.wire.channel import Channel
from nbagent.wire.operations import Arguments, JsonObject, NoArguments, Operation

SOCKET_PATH = paths.CONTROL_SOCKET
# Options are at most 32 KiB, and 100 paths of 1,000 bytes that JSON escapes threefold.
REQUEST_MAX_BYTES = 1 << 20
# A thousand slots are a megabyte.
RESPONSE_MAX_BYTES = 256 << 20
# From the first request to the last repetition. A supervisor that ends is followed by the next in seconds, which the
# request waits for in the backlog of systemd's socket.
REPEAT_S = 30.0
REPEAT_PAUSE_S = 0.05
# The descriptor of the connection for which this thread computes a response (nbagent.web.server), if it is one.
CALLER_FD: ContextVar[int | None] = ContextVar("CALLER_FD", default=None)
# A TCP peer that has closed only its sending side still waits for the response, but nothing shows that.
HALF_CLOSED_S = 1.0

A = TypeVar("A", bound=Arguments)
R = TypeVar("R")


class _CallerLeft(Exception):
    """The caller of the API has closed its connection."""


class ControlClient:
    """Calls the supervisor; threads may share it, because every call has its own connection."""

    def __init__(self, path: Path = SOCKET_PATH, timeout_s: float = 60.0) -> None:
        self.path = path
        self.timeout_s = timeout_s

    @overload
    def call(self, operation: Operation[NoArguments, R]) -> R: ...

    @overload
    def call(self, operation: Operation[A, R], arguments: A) -> R: ...

    def call(self, operation: Operation[A, R], arguments: A | None = None) -> R:
        """The result of `operation`. Raises the NbagentError that the supervisor raised, or SupervisorUnavailable."""
        given = NoArguments() if arguments is None else arguments
        request: JsonObject = {"op": operation.name, "args": given.save()}
        fds = given.descriptors()
        try:
            # The supervisor is trusted, so its results are not checked.
            return cast(R, self._result(request, fds, operation.is_repeatable))
        finally:
            for fd in fds.values():
                os.close(fd)

    def _result(self, request: JsonObject, fds: Mapping[str, int], is_repeatable: bool) -> object:
        until_s = time.monotonic() + (min(REPEAT_S, self.timeout_s) if is_repeatable else 0.0)
        while True:
            try:
                response = self._call_once(request, fds)
                if "error" not in response:
                    return response["ok"]
                error = from_wire(fields.mapping(response, "error"))
                break
            except (OSError, EOFError, ValueError) as failure:
                if isinstance(failure, (EOFError, ConnectionError)) and time.monotonic() < until_s:
                    time.sleep(REPEAT_PAUSE_S)
                    continue
                reason = getattr(failure, "strerror", None) or failure
                raise SupervisorUnavailable(
                    f"no response from the supervisor on {self.path}: {reason}", retry_after_s=2
                ) from failure
            except _CallerLeft:
                text = "the request was ended, because its client has closed the connection"
                raise SupervisorUnavailable(text, retry_after_s=2) from None
        raise error

    def _call_once(self, request: JsonObject, fds: Mapping[str, int]) -> JsonObject:
        caller_fd = CALLER_FD.get()
        # It may have left while its request waited for a thread.
        if caller_fd is not None and _events(caller_fd) & ~select.POLLRDHUP:
            raise _CallerLeft
        with Channel.unconnected(RESPONSE_MAX_BYTES) as channel:
            channel.socket.settimeout(self.timeout_s)
            channel.socket.connect(str(self.path))
            channel.send(request, fds)
            if caller_fd is not None:
                _wait(channel.fileno(), caller_fd, self.timeout_s)
            response = channel.receive()
            if response is None:
                raise EOFError("the supervisor closed the connection")
            response.close()
            return response.body


def _events(caller_fd: int) -> int:
    """POLLRDHUP, when a caller sends no more, and other events when it has closed the connection; 0 before."""
    waiting = select.poll()
    waiting.register(caller_fd, select.POLLRDHUP)
    return dict(waiting.poll(0)).get(caller_fd, 0)


def _wait(fd: int, caller_fd: int, timeout_s: float) -> None:
    """Returns when `fd` can be read. Raises TimeoutError, and _CallerLeft when the caller has left before."""
    waiting, until_s, has_left = select.poll(), time.monotonic() + timeout_s, False
    waiting.register(fd, select.POLLIN)
    waiting.register(caller_fd, select.POLLRDHUP)
    while (left_s := until_s - time.monotonic()) > 0:
        events = dict(waiting.poll(left_s * 1000))
        if fd in events:
            return
        if found := events.get(caller_fd):
            if found != select.POLLRDHUP:
                raise _CallerLeft
            waiting.unregister(caller_fd)
            until_s, has_left = min(until_s, time.monotonic() + HALF_CLOSED_S), True
    if has_left:
        raise _CallerLeft
    raise TimeoutError("timed out")
