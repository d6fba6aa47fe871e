# SPDX-License-Identifier: BSD-3-Clause
"""An HTTP server for WSGI applications in which a connection uses a thread only while its request is computed.

One thread, that of the loop, owns all sockets and never blocks: it accepts, reads and writes. A request is computed
by a thread of its lane after it was received completely, and the loop sends the response. So a peer that is silent, or
that sends or reads slowly, occupies memory within bounds, but no thread:

- a whole request has a deadline, from its first byte to the last byte of its body; a response and an idle connection
  have one as well
- the connections of an address and of a lane have an upper bound. Beyond it the oldest connection that waits for data
  is closed, so that a request which arrives at once is served. The bytes that a lane has received are bounded as well
- while no descriptor or thread can be had, the next request is refused by 503, and requests that are computed go on.
  While all open files of the machine are used, not even that can be done: connections that wait are reset
- the lane of a connection is selected by its listener and the peer's address before anything is read, so that strangers
  share no thread with trusted callers

`wsgi` has the requests and responses themselves.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import h11

from nbagent.core.errors import Full
from nbagent.web import problems, wsgi
from nbagent.web.wsgi import HEAD_MAX_BYTES, Refused
from nbagent.wire.accepting import ACCEPT_PAUSE_S, EXHAUSTED
from nbagent.wire.control import CALLER_FD

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment
    from flask import Response

_LOG = logging.getLogger(__name__)
# The time from the first byte of a request to the end of its headers, and to the end of its body.
HEAD_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
RESPONSE_TIMEOUT_S = 30.0
KEEPALIVE_S = 30.0
# A response that is sent before the body was read would be lost, because closing a socket with unread data resets the
# connection. So the rest of the body is read and discarded.
LINGER_S = 2.0
LINGER_MAX_BYTES = 32 << 20
# After a stop: how long connections are read from which nothing, or a part of a request, was received.
STOP_SILENT_S, STOP_PARTIAL_S = 0.3, 2.0
# For each lane of a process. A class behind one address, or a load balancer, needs less.
LANE_CONNECTIONS = 1024
ADDRESS_CONNECTIONS = 256
LANE_MAX_BYTES = 64 << 20
RETRY_AFTER_S = 1
# So many times in a row accept(2) fails, with a pause each, before the connections that wait are reset.
FAILED_ACCEPTS_MAX = 10
BACKLOG = 4096
_READ_BYTES = 64 << 10
_SWEEP_S = 0.25


@dataclass(frozen=True, eq=False)
class Lane:
    """Connections with threads and bounds of their own. `promote` may select another lane's threads for a request."""

    app: WSGIApplication
    threads: int
    promote: Callable[[WSGIEnvironment], Lane | None] = lambda _: None
    connections: int = LANE_CONNECTIONS
    # None for a socket whose only peer is a proxy.
    address_connections: int | None = ADDRESS_CONNECTIONS


@dataclass(frozen=True)
class Service:
    """Selects the lane of a new connection by the address of its listener, as of getsockname(2), and of its peer.

    `body_max_bytes` is the length of the longest body of any request.
    """

    lane_of: Callable[[object, str], Lane]
    body_max_bytes: int


class _State(Enum):
    READING = auto()
    SERVING = auto()
    WRITING = auto()
    LINGERING = auto()


@dataclass(eq=False)
class _LaneState:
    """A lane in one process. `waiting` has the connections in READING, the oldest first."""

    lane: Lane
    threads: ThreadPoolExecutor
    waiting: dict[_Connection, None] = field(default_factory=dict)
    by_address: dict[str, set[_Connection]] = field(default_factory=dict)
    connections: int = 0
    received_bytes: int = 0


class _Connection:
    """A connection and the request that is read from it."""

    def __init__(self, sock: socket.socket, peer: object, local: object, lane: _LaneState) -> None:
        self.sock, self.local, self.lane = sock, local, lane
        self.host, self.port = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("", 0)
        self.network = network_of(self.host)
        self.state = _State.READING
        self.parser = h11.Connection(h11.SERVER, HEAD_MAX_BYTES)
        self.unsent = memoryview(b"")
        self.deadline_s = 0.0
        self.is_broken = False
        self.renew()

    def renew(self) -> None:
        """Before the first and each further request."""
        self.request: h11.Request | None = None
        # A part of the next request may have been received with the former one.
        self.head, self.body = bytearray(self.parser.trailing_data[0]), bytearray()
        self.begun_s: float | None = None
        self.discarded_bytes = 0


class Server:
    """Serves `listeners`, which are non-blocking, by `turn` until `is_finished` after `stop`."""

    def __init__(self, listeners: Sequence[socket.socket], service: Service) -> None:
        self.service = service
        self._listeners = list(listeners)
        self._lanes: dict[Lane, _LaneState] = {}
        self._connections: set[_Connection] = set()
        self._computed: deque[_Connection] = deque()
        self._poller = selectors.DefaultSelector()
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # A descriptor in reserve, to refuse a connection while there is no other; None when it was not had again.
        self._reserve: int | None = None
        self._restore_reserve()
        self._failed_accepts = 0
        self._stop_s: float | None = None
        self._sweep_s = 0.0
        self._poller.register(self._woken, selectors.EVENT_READ)
        for listener in self._listeners:
            self._poller.register(listener, selectors.EVENT_READ, (listener, listener.getsockname()))

    def wake(self) -> None:
        """Ends the wait of `turn`; threads and signal handlers may call it."""
        with contextlib.suppress(OSError):  # closed, because graceful_s is over
            os.eventfd_write(self._woken, 1)

    def stop(self) -> None:
        """Accepts no further connection, so that those in the backlog are for the next process.

        A repeated call does nothing.
        """
        if self._stop_s is None:
            self._stop_s = time.monotonic()
            for listener in self._listeners:
                self._poller.unregister(listener)

    @property
    def is_finished(self) -> bool:
        """Whether the server was stopped and no connection is left."""
        return self._stop_s is not None and not self._connections

    def close(self) -> None:
        """Closes every connection. The listeners stay open."""
        for connection in list(self._connections):
            self._close(connection)
        for state in self._lanes.values():
            state.threads.shutdown(wait=False)
        self._poller.close()
        os.close(self._woken)
        if self._reserve is not None:
            os.close(self._reserve)

    def turn(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` for events, and handles them."""
        for key, _ in self._poller.select(min(timeout_s, _SWEEP_S) if self._connections else timeout_s):
            if isinstance(key.data, _Connection):
                self._handle(key.data)
            elif key.data is not None:
                self._accept(*key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._woken)
        while self._computed:
            self._write(self._computed.popleft())
        now_s = time.monotonic()
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + _SWEEP_S
            self._close_expired(now_s)

    # Connections

    def _accept(self, listener: socket.socket, local: object) -> None:
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._refuse_next(listener, error)
            elif error.errno == errno.EINVAL and listener.family != socket.AF_UNIX:
                listener.listen(BACKLOG)  # another worker is about to do so, or has ended before it did: _refuse_next
            else:
                raise
            return
        self._failed_accepts = 0
        sock.setblocking(False)
        lane = self._lane_state(self.service.lane_of(local, str(peer[0]) if isinstance(peer, tuple) else ""))
        connection = _Connection(sock, peer, local, lane)
        if not self._make_room(connection):
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lane.connections += 1
        lane.by_address.setdefault(connection.network, set()).add(connection)
        self._connections.add(connection)
        connection.deadline_s = time.monotonic() + HEAD_TIMEOUT_S
        lane.waiting[connection] = None
        # Most requests arrive with the connection, and need no registration.
        self._read(connection)
        if connection.state is _State.READING and connection in self._connections:
            self._poller.register(sock, selectors.EVENT_READ, connection)

    def _refuse_next(self, listener: socket.socket, reason: OSError) -> None:
        """Refuses the next connection with the descriptor in reserve; without one, resets all that wait after a second.
        """
        self._failed_accepts += 1
        if self._reserve is not None:
            os.close(self._reserve)
            try:
                with listener.accept()[0] as sock:
                    self._failed_accepts = 0
                    # Longer than a caller takes from connect(2) to its request, because a silent one delays the loop.
                    sock.settimeout(ACCEPT_PAUSE_S)
                    # Closing a socket with unread data would reset the connection.
                    sock.recv(_READ_BYTES)
                    response = _refusal(f"the service cannot accept connections: {reason.strerror}")
                    headers = [*response.headers, ("Connection", "close")]
                    sock.send(wsgi.frame(h11.Connection(h11.SERVER), response.status, headers, response.get_data()))
            except BlockingIOError:  # another worker has accepted it
                self._failed_accepts = 0
            except OSError:  # the kernel's total may be used up again by another process
                pass
        self._restore_reserve()
        if 0 < self._failed_accepts < FAILED_ACCEPTS_MAX or listener.family == socket.AF_UNIX:
            time.sleep(ACCEPT_PAUSE_S)
        elif self._failed_accepts:
            if self._failed_accepts == FAILED_ACCEPTS_MAX:
                _LOG.warning("connections to %s are reset: %s", listener.getsockname(), reason.strerror)
            # The peers learn at once that they are not served, and a gateway selects another host. A unix socket would
            # never listen again.
            listener.shutdown(socket.SHUT_RD)
            listener.listen(BACKLOG)

    def _restore_reserve(self) -> None:
        try:
            self._reserve = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:
            self._reserve = None

    def _lane_state(self, lane: Lane) -> _LaneState:
        if lane not in self._lanes:
            self._lanes[lane] = _LaneState(lane, ThreadPoolExecutor(lane.threads))
        return self._lanes[lane]

    def _make_room(self, new: _Connection) -> bool:
        """Closes the oldest waiting connections where a bound is reached; False when none waits."""
        lane = new.lane
        of_address = lane.by_address.get(new.network, set())
        bound = lane.lane.address_connections
        if bound is not None and len(of_address) >= bound and not self._close_oldest(lane, of_address):
            return False
        return lane.connections < lane.lane.connections or self._close_oldest(lane, None)

    def _close_oldest(self, lane: _LaneState, among: set[_Connection] | None) -> bool:
        for connection in lane.waiting:
            if among is None or connection in among:
                self._close(connection)
                return True
        return False

    def _wait_for_request(self, connection: _Connection) -> None:
        connection.state = _State.READING
        connection.lane.waiting[connection] = None
        self._poller.register(connection.sock, selectors.EVENT_READ, connection)

    def _close(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        lane = connection.lane
        lane.waiting.pop(connection, None)
        lane.connections -= 1
        lane.received_bytes -= len(connection.body)
        of_address = lane.by_address[connection.network]
        of_address.remove(connection)
        if not of_address:
            del lane.by_address[connection.network]
        self._unregister(connection)
        connection.sock.close()

    def _unregister(self, connection: _Connection) -> None:
        if connection.sock.fileno() in self._poller.get_map():
            self._poller.unregister(connection.sock)

    def _close_expired(self, now_s: float) -> None:
        for connection in list(self._connections):
            if connection.state is _State.SERVING:
                continue
            if self._stop_s is not None and connection.state is _State.READING:
                rest_s = STOP_SILENT_S if connection.begun_s is None else STOP_PARTIAL_S
                connection.deadline_s = min(connection.deadline_s, self._stop_s + rest_s)
            if now_s < connection.deadline_s:
                continue
            if connection.state is _State.READING and connection.begun_s is not None:
                self._refuse(connection, Refused(408, "the request was not received completely in time"))
            else:
                self._close(connection)

    # Events of a connection

    def _handle(self, connection: _Connection) -> None:
        # An earlier event of the same turn may have closed the connection.
        if connection not in self._connections:
            return
        if connection.state is _State.READING:
            self._read(connection)
        elif connection.state is _State.WRITING:
            self._write(connection)
        elif connection.state is _State.LINGERING:
            data = _receive(connection)
            connection.discarded_bytes += len(data or b"")
            if data == b"" or connection.discarded_bytes > LINGER_MAX_BYTES:
                self._close(connection)

    def _read(self, connection: _Connection) -> None:
        if (data := _receive(connection)) is None:
            return
        if not data and connection.begun_s is None:
            self._close(connection)
            return
        connection.head += data if connection.request is None else b""
        connection.parser.receive_data(data)
        self._parse(connection)

    def _parse(self, connection: _Connection) -> None:
        try:
            self._advance(connection)
        except h11.RemoteProtocolError as error:
            self._refuse(connection, Refused(error.error_status_hint, str(error)))
        except Refused as error:
            self._refuse(connection, error)

    def _advance(self, connection: _Connection) -> None:
        """Starts to compute the request when it is complete. Raises RemoteProtocolError and Refused."""
        parser = connection.parser
        if connection.begun_s is None and connection.head:
            connection.begun_s = time.monotonic()
            connection.deadline_s = connection.begun_s + HEAD_TIMEOUT_S
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Request):
                connection.request = event
                connection.deadline_s += REQUEST_TIMEOUT_S - HEAD_TIMEOUT_S
                wsgi.check(event, bytes(connection.head), self.service.body_max_bytes)
                connection.head.clear()
                if parser.they_are_waiting_for_100_continue:
                    # A new connection's buffer has room for it.
                    with contextlib.suppress(OSError):
                        connection.sock.send(parser.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            elif isinstance(event, h11.Data):
                connection.body += event.data
                connection.lane.received_bytes += len(event.data)
                if len(connection.body) > self.service.body_max_bytes:
                    raise Refused(413, f"the body is longer than {self.service.body_max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                self._compute(connection, connection.request)
                return
            elif isinstance(event, h11.ConnectionClosed):
                self._close(connection)
                return
            else:
                self._bound_received(connection.lane)
                return

    def _bound_received(self, lane: _LaneState) -> None:
        while lane.received_bytes > LANE_MAX_BYTES:
            self._close(max(lane.waiting, key=lambda connection: len(connection.body)))

    def _compute(self, connection: _Connection, request: h11.Request | None) -> None:
        if request is None:
            raise RuntimeError("h11 has sent the end of a request without its head")
        environ = wsgi.environ_of(
            request, bytes(connection.body), connection.local, connection.host, connection.port
        )
        threads = connection.lane
        if other := connection.lane.lane.promote(environ):
            threads = self._lane_state(other)
        self._end_reading(connection)
        connection.state = _State.SERVING
        taken = threading.Lock()
        try:
            threads.threads.submit(self._respond, connection, environ, taken)
        except RuntimeError as error:  # all threads are busy, and no process id or memory is left for another
            # The request is in the queue nevertheless, and a thread may just have taken it.
            if taken.acquire(blocking=False):
                self._answer(connection, _refusal(f"the service cannot compute the request: {error}"))

    def _end_reading(self, connection: _Connection) -> None:
        connection.lane.waiting.pop(connection, None)
        connection.lane.received_bytes -= len(connection.body)
        connection.body.clear()
        self._unregister(connection)

    def _respond(self, connection: _Connection, environ: WSGIEnvironment, taken: threading.Lock) -> None:
        """Runs in a thread of the lane. Sends at once what the socket's buffer takes; the loop sends the rest."""
        if not taken.acquire(blocking=False):  # refused
            return
        # Nothing else reads from the connection meanwhile.
        CALLER_FD.set(connection.sock.fileno())
        try:
            status, headers, body = wsgi.run(connection.lane.lane.app, environ)
            if self._stop_s is not None:
                headers = [*headers, ("Connection", "close")]
            connection.unsent = memoryview(wsgi.frame(connection.parser, status, headers, body))
            _send(connection)
        except Exception as error:
            problems.log_unexpected(error)
            connection.is_broken = True
        self._computed.append(connection)
        self.wake()

    def _refuse(self, connection: _Connection, error: Refused) -> None:
        """Sends a problem document for a request that is not computed."""
        response = problems.for_status(error.status, str(error)[:200], is_body=connection.request is not None)
        self._end_reading(connection)
        self._answer(connection, response)

    def _answer(self, connection: _Connection, response: Response) -> None:
        """Sends a response that no thread computes, and closes the connection."""
        headers = [*response.headers, ("Connection", "close")]
        try:
            connection.unsent = memoryview(wsgi.frame(connection.parser, response.status, headers, response.get_data()))
        except h11.LocalProtocolError:
            connection.is_broken = True
        self._write(connection)

    def _write(self, connection: _Connection) -> None:
        """Sends what is unsent, and then waits for the next request or closes the connection."""
        self._unregister(connection)
        if connection.unsent and not connection.is_broken:
            _send(connection)
        if connection.is_broken:
            self._close(connection)
        elif connection.unsent:
            if connection.state is not _State.WRITING:
                connection.state = _State.WRITING
                connection.deadline_s = time.monotonic() + RESPONSE_TIMEOUT_S
            self._poller.register(connection.sock, selectors.EVENT_WRITE, connection)
        elif connection.parser.our_state is h11.DONE and connection.parser.their_state is h11.DONE:
            self._next_request(connection)
        else:
            self._linger(connection)

    def _next_request(self, connection: _Connection) -> None:
        connection.parser.start_next_cycle()
        connection.renew()
        connection.deadline_s = time.monotonic() + KEEPALIVE_S
        self._wait_for_request(connection)
        if any(connection.parser.trailing_data):
            self._parse(connection)

    def _linger(self, connection: _Connection) -> None:
        connection.state = _State.LINGERING
        connection.deadline_s = time.monotonic() + LINGER_S
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        self._poller.register(connection.sock, selectors.EVENT_READ, connection)


@functools.lru_cache(4096)
def network_of(address: str) -> str:
    """The IPv4 address, or the IPv6 /64 network, which one subscriber has; "" for a unix socket."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.IPv6Address(int(found) >> 64 << 64))


def _refusal(text: str) -> Response:
    return problems.from_error(Full(text, retry_after_s=RETRY_AFTER_S))


def _receive(connection: _Connection) -> bytes | None:
    """Data from the socket; b"" at its end or after an error, None when there is no data yet."""
    try:
        return connection.sock.recv(_READ_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _send(connection: _Connection) -> None:
    try:
        while connection.unsent:
            connection.unsent = connection.unsent[connection.sock.send(connection.unsent):]
    except BlockingIOError:
        pass
    except OSError as error:
        connection.is_broken = True
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
            raise
