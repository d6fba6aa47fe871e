# SPDX-License-Identifier: BSD-3-Clause
"""Forwards from a slot's listening socket to a program that listens on a TCP port of the slot's own loopback.

For programs that cannot take a listening socket. Runs beside the program inside the slot's namespaces, as its user
and as unprivileged. The bytes are copied both ways unchanged, the end of one direction is forwarded (so HTTP,
websockets and other protocols all work), and a side that does not read blocks the other.

Until the program listens, connections wait, so that one request that waits is the readiness probe, as it is for a
program that took the socket. Bytes from a client count as activity on the activity page, unless the program refuses
them: the router makes a connection for each request, and if the response to it has a status of 400 or more, the request
is none, because anyone who knows the URL of a slot can send it.

Standard library only, and no module that `socket` has not imported, because it is memory of every slot that has it.
"""

from __future__ import annotations

import contextlib
import functools
import selectors
import socket
import time
from typing import Callable, List, Optional

from nbagent.wire import activity

BUFFER_BYTES = 65536
# At most 64 MiB of buffers; a browser has a few connections, and the others wait in the backlog.
CONNECTIONS_MAX = 512
FIRST_RETRY_S, LAST_RETRY_S = 0.005, 0.25
# The begin of a response, with the status after it: RFC 9112, section 4.
STATUS_BYTES, REFUSED = 10, (b"4", b"5")


class Pipe:
    """One direction of a connection: bytes that were read from one side and not yet written to the other."""

    def __init__(self, source: socket.socket, target: socket.socket, on_bytes: Callable[[bytes], None]) -> None:
        self.source, self.target, self._on_bytes = source, target, on_bytes
        self.waiting = b""
        self.ended = False
        self.passed_end = False

    def pull(self) -> None:
        """Reads once, without blocking. Raises OSError when the connection is broken."""
        with contextlib.suppress(BlockingIOError):
            self.waiting = self.source.recv(BUFFER_BYTES)
            if self.waiting:
                self._on_bytes(self.waiting)
            else:
                self.ended = True
            self.push()

    def push(self) -> None:
        """Writes without blocking, and forwards the end. Raises OSError when the connection is broken."""
        with contextlib.suppress(BlockingIOError):
            while self.waiting:
                self.waiting = self.waiting[self.target.send(self.waiting) :]
        if self.ended and not self.waiting and not self.passed_end:
            self.passed_end = True
            self.target.shutdown(socket.SHUT_WR)


class Connection:
    """A client and the program, connected."""

    def __init__(self, client: socket.socket, program: socket.socket, on_activity: Callable[[], None]) -> None:
        self.sockets = (client, program)
        self._on_activity = on_activity
        self.up, self.down = Pipe(client, program, self._sent), Pipe(program, client, self._responded)
        self.broken = False
        # Whether the program has refused the request; None until its response has begun.
        self._refused: Optional[bool] = None
        self._has_sent, self._head = False, b""

    def _sent(self, _chunk: bytes) -> None:
        self._has_sent = True
        if self._refused is False:
            self._on_activity()

    def _responded(self, chunk: bytes) -> None:
        if self._refused is not None:
            return
        self._head += chunk[:STATUS_BYTES - len(self._head)]
        if len(self._head) < STATUS_BYTES and b"HTTP/1.".startswith(self._head[:7]):
            return
        self._refused = self._head.startswith(b"HTTP/1.") and self._head[9:] in REFUSED
        if self._has_sent and not self._refused:
            self._on_activity()

    def wanted(self, side: socket.socket) -> int:
        """The events to wait for on one of the two sockets."""
        reading, writing = (self.up, self.down) if side is self.sockets[0] else (self.down, self.up)
        events = 0 if reading.ended or reading.waiting else selectors.EVENT_READ
        return events | (selectors.EVENT_WRITE if writing.waiting else 0)

    def step(self, side: socket.socket, events: int) -> None:
        """Handles `events` on one side. Raises OSError when the connection is broken."""
        reading, writing = (self.up, self.down) if side is self.sockets[0] else (self.down, self.up)
        if events & selectors.EVENT_WRITE:
            writing.push()
        if events & selectors.EVENT_READ and not reading.waiting and not reading.ended:
            reading.pull()

    @property
    def over(self) -> bool:
        """Whether both directions have ended, or the connection is broken."""
        return self.broken or (self.up.passed_end and self.down.passed_end)


class Forwarder:
    """All connections of one slot."""

    def __init__(self, listener: socket.socket, port: int, on_activity: Callable[[], None], timeout_s: float) -> None:
        self._listener, self._port, self._on_activity = listener, port, on_activity
        self._deadline_s = time.monotonic() + timeout_s
        self._retry_s = FIRST_RETRY_S
        self._listens = False
        self._selector = selectors.DefaultSelector()
        self._pending: List[socket.socket] = []
        self._count = 0

    def run(self) -> None:
        """Forwards; returns when the program has not listened in time."""
        while self._listens or time.monotonic() < self._deadline_s:
            accepts = self._count < CONNECTIONS_MAX
            self._await(self._listener, selectors.EVENT_READ if accepts else 0, self._accept)
            for key, events in self._selector.select(self._retry_s if self._pending else None):
                key.data(events)
            pending, self._pending = self._pending, []
            for client in pending:
                self._connect(client)
            self._retry_s = min(LAST_RETRY_S, self._retry_s * 2)
        print(f"the slot's program did not listen on 127.0.0.1:{self._port} in time", flush=True)

    def _accept(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            self._count += 1
            self._pending.append(client)

    def _connect(self, client: socket.socket) -> None:
        program = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        program.setblocking(False)
        program.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        program.connect_ex(("127.0.0.1", self._port))

        def connected(_events: int) -> None:
            self._await(program, 0)
            if program.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                self._listens = True
                self._watch(Connection(client, program, self._on_activity))
                return
            program.close()
            if self._listens:
                client.close()
                self._count -= 1
            else:
                self._pending.append(client)

        self._await(program, selectors.EVENT_WRITE, connected)

    def _step(self, connection: Connection, side: socket.socket, events: int) -> None:
        try:
            connection.step(side, events)
        except OSError:
            connection.broken = True
        if not connection.over:
            self._watch(connection)
        elif connection.sockets[0].fileno() >= 0:  # one round of events may have both sides
            for each in connection.sockets:
                self._await(each, 0)
                each.close()
            self._count -= 1

    def _watch(self, connection: Connection) -> None:
        for side in connection.sockets:
            self._await(side, connection.wanted(side), functools.partial(self._step, connection, side))

    def _await(self, side: socket.socket, events: int, then: Optional[Callable[[int], None]] = None) -> None:
        """Calls `then` at each of `events`; 0 ends that."""
        known = self._selector.get_map().get(side)
        if known is None:
            if events:
                self._selector.register(side, events, then)
        elif not events:
            self._selector.unregister(side)
        elif known.events != events:
            self._selector.modify(side, events, then)


def serve(listen_fd: int, port: int, activity_fd: int, timeout_s: float) -> None:
    """Forwards connections at `listen_fd` to `port`; returns when the program has not listened in time."""
    listener = socket.socket(fileno=listen_fd)
    listener.setblocking(False)
    # The number of busy kernels is 0, because only the program knows it; its processor time shows work as well.
    Forwarder(listener, port, lambda: activity.write(activity_fd, 0), timeout_s).run()
