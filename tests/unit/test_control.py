# SPDX-License-Identifier: BSD-3-Clause
"""The control socket: the supervisor's server and its client, against peers that send what they must not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from malformed_messages import MALFORMED, open_fds, settles_at

from nbagent.core.claim_content import File
from nbagent.core.errors import (
    BadRequest,
    NbagentError,
    StartFailed,
    SupervisorUnavailable,
)
from nbagent.supervisor import server as supervisor_server
from nbagent.supervisor.server import ControlServer, handlers
from nbagent.wire import control, operations
from nbagent.wire.channel import Channel
from nbagent.wire.control import CALLER_FD, ControlClient
from nbagent.wire.operations import ClaimArguments, SlotArguments, UpdateArguments


class FakeCalls:
    """The supervisor's calls, which record their arguments."""

    def __init__(self):
        self.received, self.abandoned, self.tasks = [], [], set()
        self.trials, self.cancelled = [], []
        self.agent = SimpleNamespace(spawn=self.spawn)
        self.blocked = None

    def spawn(self, work):
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def claim(self, options, key, client, trace):
        files = options.get("files")
        content = os.pread(files.fd, 1 << 20, 0) if files else None
        self.received.append((options, key, client, content))
        if self.blocked is not None:
            try:
                await self.blocked.wait()
            except asyncio.CancelledError:
                self.cancelled.append(key)
                raise
        return {"slot": "h-0"}

    def abandon(self, slot):
        self.abandoned.append(slot)

    def slot(self, slot):
        raise StartFailed.at("mount", 13, "refused")

    def update(self, slot, options, client):
        return {"slot": slot, **options}

    async def try_start(self):
        self.trials.append("begun")
        try:
            await asyncio.sleep(60)
        finally:
            self.trials.append("ended")

    def stats(self):
        raise RuntimeError("a fault")

    def list_slots(self):
        return [{"slot": "x" * 1000}] * 1000


@pytest.fixture
def server(tmp_path):
    """A ControlServer in a thread of its own, its calls, and its socket's path."""
    calls, path, ready, loops = FakeCalls(), tmp_path / "control.sock", threading.Event(), []

    async def serve():
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda *_: None)
            serving = asyncio.ensure_future(ControlServer(calls, listener, {os.getuid()}).serve())
            loops.append((loop, serving))
            ready.set()
            await asyncio.gather(serving, return_exceptions=True)
            await asyncio.gather(*calls.tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    yield calls, path
    loop, serving = loops[0]
    loop.call_soon_threadsafe(serving.cancel)
    thread.join()


def closed(connection):
    """Whether the server closes a connection soon."""
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_caller_that_sends_nothing_is_disconnected(server, monkeypatch):
    monkeypatch.setattr(supervisor_server, "REQUEST_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(str(server[1]))
        assert closed(silent)


def test_the_number_of_connections_is_bounded_and_others_are_refused_until_one_ends(server, monkeypatch):
    monkeypatch.setattr(supervisor_server, "CONNECTIONS_MAX", 2)
    with contextlib.ExitStack() as stack:
        def connect():
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.connect(str(server[1]))
            return connection

        silent = [connect(), connect()]
        assert closed(connect())
        silent[0].close()
        client = ControlClient(str(server[1]))
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            with contextlib.suppress(SupervisorUnavailable):
                client.call(operations.UPDATE, UpdateArguments("h-0", {"ttl": 1}, "::1"))
                return
    pytest.fail("the place of a closed connection stays taken")


def test_every_operation_has_a_handler_and_no_other():
    assert set(handlers(FakeCalls())) == {operation.name for operation in operations.OPERATIONS}


def test_the_files_of_a_claim_arrive_as_bytes_beside_the_request(server):
    calls, path = server
    files = (File("a", b"one"), File("b/c", b"\0\xff"))
    client, before = ControlClient(path, 5), open_fds()
    assert client.call(operations.CLAIM, ClaimArguments({"ttl": 60, "files": files}, "k", "::1")) == {"slot": "h-0"}
    (options, key, address, content), = calls.received
    assert (key, address, content, options["ttl"]) == ("k", "::1", b"one\0\xff", 60)
    assert options["files"].entries == (("a", 3), ("b/c", 2))
    assert settles_at(len(before))


def test_contents_are_told_apart_by_their_digest(server):
    calls, path = server
    for files in ((File("a", b"one"),), (File("a", b"two"),), (File("b", b"one"),), (File("a", b"one"),)):
        ControlClient(path, 5).call(operations.CLAIM, ClaimArguments({"files": files}, "k", "::1"))
    first, *others, again = (str(options["files"]) for options, *_ in calls.received)
    assert first == again and len({first, *others}) == 3


def test_an_error_of_the_supervisor_arrives_with_step_and_errno(server):
    with pytest.raises(StartFailed, match="mount: refused") as failed:
        ControlClient(server[1], 5).call(operations.SLOT, SlotArguments("h-0"))
    assert failed.value.details == {"step": "mount", "errno": 13}


def test_a_fault_of_the_supervisor_is_reported_without_its_text(server):
    with pytest.raises(NbagentError, match="journalctl -u nbagent"):
        ControlClient(server[1], 5).call(operations.STATS)


def connected():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


@contextlib.contextmanager
def called_by(connection):
    """As in a thread of the API that computes a response for this connection."""
    token = CALLER_FD.set(connection.fileno())
    yield
    CALLER_FD.reset(token)


@pytest.mark.parametrize("key", [operations.own_key(), "landing 192.0.2.7 key-of-a-page"], ids=["own", "landing"])
@pytest.mark.parametrize("pair", [socket.socketpair, connected], ids=["nginx", "TCP"])
def test_a_claim_of_a_client_that_has_left_is_cancelled_before_it_has_a_slot(server, pair, key, monkeypatch):
    monkeypatch.setattr(control, "HALF_CLOSED_S", 0.1)
    calls, path = server
    calls.blocked = asyncio.Event()
    client, accepted = pair()
    with accepted, called_by(accepted):
        leaving = threading.Timer(0.1, client.close)
        leaving.start()
        began_s = time.monotonic()
        with pytest.raises(SupervisorUnavailable, match="closed the connection"):
            ControlClient(path, 30).call(operations.CLAIM, ClaimArguments({}, key, "::1"))
        leaving.join()
        assert time.monotonic() - began_s < 5
    deadline_s = time.monotonic() + 10
    while not calls.cancelled and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert calls.cancelled == [key] and calls.abandoned == []


def test_a_claim_with_a_key_of_its_caller_goes_on_without_the_client(server):
    calls, path = server
    calls.blocked = asyncio.Event()
    client, accepted = socket.socketpair()
    with accepted, called_by(accepted):
        leaving = threading.Timer(0.1, client.close)
        leaving.start()
        with pytest.raises(SupervisorUnavailable, match="closed the connection"):
            ControlClient(path, 30).call(operations.CLAIM, ClaimArguments({}, "key-of-a-caller", "::1"))
        leaving.join()
    time.sleep(0.2)
    assert calls.cancelled == [] and len(calls.tasks) == 1
    calls.blocked.set()


def test_nothing_is_claimed_for_a_client_that_has_left_before(server):
    calls, path = server
    client, accepted = socket.socketpair()
    client.close()
    with accepted, called_by(accepted), pytest.raises(SupervisorUnavailable, match="closed the connection"):
        ControlClient(path, 30).call(operations.CLAIM, ClaimArguments({}, operations.own_key(), "::1"))
    assert calls.received == []


def test_a_client_that_only_sends_no_more_gets_its_slot(server):
    _, path = server
    client, accepted = connected()
    with client, accepted, called_by(accepted):
        client.shutdown(socket.SHUT_WR)
        claimed = ControlClient(path, 5).call(operations.CLAIM, ClaimArguments({}, "k", "::1"))
        assert claimed == {"slot": "h-0"}


def test_a_call_with_a_client_has_a_timeout(server):
    calls, path = server
    calls.blocked = asyncio.Event()
    client, accepted = connected()
    with client, accepted, called_by(accepted), pytest.raises(SupervisorUnavailable, match="timed out"):
        ControlClient(path, 0.2).call(operations.CLAIM, ClaimArguments({}, operations.own_key(), "::1"))


def test_a_trial_ends_when_its_caller_has_closed_the_connection(server):
    calls, path = server
    with pytest.raises(SupervisorUnavailable):
        ControlClient(path, 0.2).call(operations.TRY_START)
    deadline_s = time.monotonic() + 10
    while calls.trials != ["begun", "ended"] and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert calls.trials == ["begun", "ended"] and calls.abandoned == []


def test_a_supervisor_without_descriptors_is_unavailable_for_a_while(server, monkeypatch):
    def exhausted(self, *_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(FakeCalls, "stats", exhausted)
    with pytest.raises(SupervisorUnavailable, match="cannot serve the request: Too many open files") as refused:
        ControlClient(server[1], 5).call(operations.STATS)
    assert refused.value.details == {"retry_after_s": supervisor_server.RETRY_AFTER_S}


def test_a_result_of_a_megabyte_arrives_whole(server):
    assert len(ControlClient(server[1], 5).call(operations.SLOTS)) == 1000


@pytest.mark.parametrize("payload", [
    *MALFORMED, b"{}", b'{"op": 7, "args": {}}', b'{"op": "none", "args": {}}', b'{"op": "slot"}',
    b'{"op": "slot", "args": []}', b'{"op": "slot", "args": {"id": 7}}',
    b'{"op": "update", "args": {"id": "x"}}',
    b'{"op": "claim", "args": {"options": {}, "client": ""}}',
    b'{"op": "claim", "args": {"options": {}, "key": "k", "client": "::1\\nslot x removed"}}',
    b'{"op": "claim", "args": {"options": {}, "key": "k\\u0000", "client": ""}}',
    b'{"op": "claim", "args": {"options": {}, "key": "k", "client": "' + 65 * b"1" + b'"}}',
    b'{"op": "claim", "args": {"options": {}, "key": "k", "client": "\\ud800"}}',
    b'{"op": "claim", "args": {"options": {"files": {}}, "key": "k", "client": ""}}',
    b'{"op": "claim", "args": {"options": {}, "key": "k", "client": "", "files": {"entries": [["a", 1]]}}}',
    b'{"fds": ["content"], "op": "claim", "args": {"options": {}, "key": "k", "client": "", "files": {"entries": []}}}',
])
def test_a_malformed_request_is_a_bad_request_and_leaks_nothing(server, file, payload):
    calls, path = server
    before = open_fds()
    with Channel.unconnected() as channel:
        channel.socket.connect(str(path))
        socket.send_fds(channel.socket, [payload], [file])
        response = channel.receive()
        assert response.body["error"]["code"] == BadRequest.code
    assert calls.received == []
    with Channel.unconnected() as channel:
        channel.socket.connect(str(path))
        channel.send({"op": "update", "args": UpdateArguments("h-0", {"ttl": 1}, "::1").save()})
        assert channel.receive().body == {"ok": {"slot": "h-0", "ttl": 1}}
    assert settles_at(len(before))
