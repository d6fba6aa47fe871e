# SPDX-License-Identifier: BSD-3-Clause
"""The users of the wire against peers that send what they must not: one typed error, and no descriptor is leaked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.content.deliver import ENTER, UNPACK, WRITE, Order
from nbagent.core.claim_content import Content, File, FileBundle
from nbagent.core.errors import (
    ArchiveFailed,
    BadRequest,
    ContentFailed,
    NbagentError,
    StartFailed,
    SupervisorUnavailable,
)
from nbagent.core.events import Event
from nbagent.network import requests
from nbagent.runtime import init, zygote_service
from nbagent.runtime.zygote_service import ModuleFailed, ZygoteFailed, ZygoteService
from nbagent.supervisor import content_injector
from nbagent.supervisor import network as supervisor_network
from nbagent.supervisor import server as supervisor_server
from nbagent.supervisor.server import ControlServer, handlers
from nbagent.wire import control, operations
from nbagent.wire.channel import Channel
from nbagent.wire.control import CALLER_FD, ControlClient
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage
from nbagent.wire.operations import ClaimArguments, SlotArguments, UpdateArguments
from nbagent.zygote.forkserver import ForkFailed, ForkServerClient

MALFORMED = [
    b"{", b"[]", b'{"failure": {"step": "x", "errno": 1e999, "text": ""}}', b'{"fds": ["a", "b"]}', b"x" * 200_000,
]


def open_fds():
    return set(os.listdir("/proc/self/fd"))


def settles_at(count):
    """Whether as many descriptors are open soon; a server closes its connection after the client has its response."""
    deadline_s = time.monotonic() + 5
    while len(open_fds()) != count and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return len(open_fds()) == count


@pytest.fixture
def file(tmp_path):
    """The descriptor of a file."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def pair():
    one, other = Channel.pair()
    with one, other:
        yield one, other


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


def test_an_order_for_content_is_restored_as_it_was_saved():
    order = Order(1, 2, "", [("a", 1)], None, [], 3, 4, 5.0, "10.1.0.8:3128", ["10.2.0.0/16"])
    assert Order.restore(order.save()) == order


async def deliver(send):
    """The injector's result for a peer that does `send` with its channel and closes it."""
    control, peer = Channel.pair()
    with control:
        with peer:
            send(peer)
        return await content_injector._result(control, Content())


def test_the_result_of_a_delivery_is_two_counts():
    assert asyncio.run(deliver(lambda peer: peer.send({"files": 1, "entries": 2}))) == (1, 2)


@pytest.mark.parametrize(("step", "kind"), [(ENTER, StartFailed), (WRITE, ContentFailed), (UNPACK, ArchiveFailed)])
def test_a_failed_delivery_is_the_error_of_its_step(step, kind):
    with pytest.raises(NbagentError, match="no space") as failed:
        asyncio.run(deliver(lambda peer: peer.send(Failure(step, 28, "no space").save())))
    assert type(failed.value) is kind


@pytest.mark.parametrize("payload", [
    *MALFORMED, b"{}", b'{"files": "1", "entries": 0}', b'{"files": 1e999, "entries": 0}',
    b'{"files": -1, "entries": 0}',
])
def test_a_malformed_response_to_a_delivery_is_a_content_failure(file, payload):
    before = open_fds()
    with pytest.raises(ContentFailed, match="malformed"):
        asyncio.run(deliver(lambda peer: socket.send_fds(peer.socket, [payload], [file])))
    assert open_fds() == before


def test_a_second_response_to_a_delivery_is_refused():
    def twice(peer):
        for _ in range(2):
            peer.send({"files": 0, "entries": 0})

    with pytest.raises(ContentFailed, match="more than one response"):
        asyncio.run(deliver(twice))


def test_a_delivery_that_was_killed_is_a_content_failure():
    with pytest.raises(ContentFailed, match="memory ran out"):
        asyncio.run(deliver(lambda peer: peer.send({"begun": True})))


def test_a_delivery_that_did_not_begin_is_a_failure_of_the_host_and_the_claim_can_be_repeated():
    with pytest.raises(StartFailed, match="before it could begin") as failed:
        asyncio.run(deliver(lambda peer: None))
    assert failed.value.http_status == 503


class SilentProcess:
    """A process that delivers nothing, with its end of the channel."""

    pidfd = -1

    def __init__(self, fd):
        self.fd = os.dup(fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)

    def release(self):
        pass


@pytest.mark.parametrize(("archive", "kind", "status"), [
    (None, StartFailed, 503), ("https://data.example.org/a.tar", ArchiveFailed, 502),
])
def test_files_that_are_not_delivered_in_time_are_a_failure_of_the_host_and_an_archive_is_one_of_its_server(
    monkeypatch, archive, kind, status
):
    async def spawn(_what, fd):
        return SilentProcess(fd)

    async def join_scope(_pid):
        pass

    monkeypatch.setattr(content_injector.launch_service, "spawn", spawn)
    monkeypatch.setattr(content_injector, "pid_of", lambda _pidfd, _slot: 7)
    monkeypatch.setattr(content_injector, "_HEAD_START_S", 0.01)
    monkeypatch.setattr(content_injector, "_order", lambda *_: Order(1, 2, "", [], None, [], 3, 4, 5.0))
    settings = host_config.parse({"claims": {"timeout": 0.01}})
    with open("/dev/null") as file, pytest.raises(kind, match="not delivered within") as failed:
        asyncio.run(content_injector.inject(None, file.fileno(), Content(archive=archive), settings, join_scope))
    assert failed.value.http_status == status


class EndedProcess(SilentProcess):
    """A process that the end of the launch service has killed before it was in the slot's scope."""

    def __init__(self, fd, pidfd):
        super().__init__(fd)
        self.pidfd = pidfd


class DeliveringProcess(SilentProcess):
    """A process that delivers a file when it is released, and ends."""

    def __init__(self, fd):
        self.peer = Channel.from_fd(os.dup(fd))

    def __exit__(self, *_):
        pass

    def release(self):
        with self.peer as peer, peer.receive():
            peer.send({"begun": True})
            peer.send({"files": 1, "entries": 0})


@pytest.mark.parametrize(("ends", "is_delivered"), [(0, True), (1, True), (2, True), (3, False)])
def test_a_delivery_whose_process_ends_with_the_launch_service_is_repeated(monkeypatch, ends, is_delivered):
    spawned = []
    child = os.fork()
    if child == 0:
        os._exit(0)
    pidfd = os.pidfd_open(child)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)

    async def spawn(_what, fd):
        spawned.append(EndedProcess(fd, pidfd) if len(spawned) < ends else DeliveringProcess(fd))
        return spawned[-1]

    async def join_scope(pid):
        if spawned[-1].pidfd == pidfd:
            raise ProcessLookupError(errno.ESRCH, f"process {pid}")

    monkeypatch.setattr(content_injector.launch_service, "spawn", spawn)
    monkeypatch.setattr(content_injector, "pid_of", lambda _pidfd, _slot: 7)
    monkeypatch.setattr(content_injector, "_order", lambda *_: Order(1, 2, "", [], None, [], 3, 4, 5.0))
    before = open_fds()
    with open("/dev/null") as file:
        injecting = content_injector.inject(None, file.fileno(), Content(), host_config.parse({}), join_scope)
        if is_delivered:
            assert asyncio.run(injecting) == (1, 0)
        else:
            with pytest.raises(StartFailed, match="before it could begin"):
                asyncio.run(injecting)
    assert len(spawned) == min(ends + 1, 3) and open_fds() == before
    os.close(pidfd)


def test_a_delivery_that_has_begun_has_a_result():
    def both(peer):
        peer.send({"begun": True})
        peer.send({"files": 1, "entries": 2})

    assert asyncio.run(deliver(both)) == (1, 2)


def test_files_without_a_bundle_are_never_dropped_silently(file):
    with pytest.raises(TypeError):
        content_injector._descriptors(file, Content((File("a", b""),)))
    assert content_injector._descriptors(file, Content(FileBundle((("a", 0),), "", file))) == {
        "init": file, "content": file,
    }


@pytest.fixture
def zygote(pair):
    """A zygote service whose zygote is `peer`, and which takes the children of this process for the zygote's."""
    read_fd, write_fd = os.pipe()
    stream, entries = socket.socketpair()
    with stream, entries:
        subject = {"zygote": "minimal:0"}
        output = init.Output(Event.ZYGOTE_OUTPUT_DROPPED, subject, read_fd, stream, entries, "nbagent-zygote")
        yield ZygoteService(pair[0], output, {}, pair[0], os.getpid()), pair[1]
    os.close(read_fd)
    os.close(write_fd)


@pytest.fixture
def pidns():
    fd = os.open("/proc/self/ns/pid", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("payload", [*MALFORMED, b"{}", b'{"fds": ["init"]}', b'{"fds": ["fork_server"]}'])
def test_a_malformed_message_of_a_zygote_is_an_error_and_leaks_nothing(zygote, pidns, file, payload):
    service, peer = zygote
    socket.send_fds(peer.socket, [payload], [file])
    before = open_fds()
    with pytest.raises(MalformedMessage):
        service._forked(pidns)
    assert open_fds() == before


@pytest.mark.skipif(os.getuid() != 0, reason="a pid namespace is made by root")
def test_a_zygote_that_is_ready_has_left_no_ended_process(zygote):
    service, peer = zygote
    peer.send({"ready": True, "notes": ["a note"]})
    assert service.begin([], []) == ["a note"]
    with peer.receive() as order:
        assert order.fds.keys() == {"nowhere"}
    assert [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE] == []


def ends(how):
    if how in ("SIGILL", "SIGKILL"):
        if how == "SIGILL":
            signal.signal(signal.SIGILL, signal.SIG_DFL)  # pytest's handler prints a traceback
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "exit":
        os._exit(3)
    time.sleep(600)


@pytest.mark.skipif(os.getuid() != 0, reason="a pid namespace is made by root")
@pytest.mark.parametrize(("how", "module", "text"), [
    ("SIGILL", "bad", "its import ended the zygote, which was killed by SIGILL"),
    ("exit", "bad", "its import ended the zygote, which exited with status 3"),
    ("sleep", "bad", "its import has waited for 0.3 s"),
    # Probably for want of memory, which other modules have taken too.
    ("SIGKILL", None, "was killed by SIGKILL while it imported the module bad"),
])
def test_a_module_whose_import_ends_a_zygote_or_never_ends_is_named(zygote, monkeypatch, how, module, text):
    service, peer = zygote
    monkeypatch.setattr(zygote_service, "IMPORT_ASLEEP_S", 0.3)
    monkeypatch.setattr(zygote_service, "LOOK_S", 0.1)
    service.pid = os.fork()
    if service.pid == 0:
        os.setsid()
        peer.send({"imports": "good"})
        peer.send({"imports": "bad"})
        service.zygote.close()
        peer.receive()
        ends(how)
    peer.close()
    with pytest.raises(ZygoteFailed, match=text) as raised:
        service.begin(["good", "bad", "other"], [], {"other": "reason"})
    assert (raised.value.module if isinstance(raised.value, ModuleFailed) else None) == module
    service.abandon()
    with pytest.raises(ChildProcessError):
        os.waitpid(service.pid, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="a pid namespace is made by root")
def test_a_zygote_that_imports_its_modules_is_ready_without_those_left_out(zygote):
    service, peer = zygote
    for module in ("good", ""):
        peer.send({"imports": module})
    peer.send({"ready": True, "notes": []})
    assert service.begin(["good", "bad"], [], {"bad": "reason"}) == []
    with peer.receive() as order:
        assert order.body["left_out"] == {"bad": "reason"}
    peer.send({"imports": "another"})
    with pytest.raises(MalformedMessage, match="a module to preload"):
        service.begin(["good"], [])


def test_only_a_child_of_the_zygote_in_the_slots_pid_namespace_is_its_fork_server(zygote, pidns, file):
    service, peer = zygote
    child = subprocess.Popen(["sleep", "60"])
    grandchild = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    try:
        pids = {"child": child.pid, "grandchild": int(grandchild.stdout.readline()), "the zygote itself": os.getpid()}
        fds = {name: os.pidfd_open(pid) for name, pid in pids.items()}
        for name, fd in fds.items():
            peer.send({}, {"fork_server": fd})
            if name == "child":
                os.close(service._forked(pidns))
                continue
            with pytest.raises(MalformedMessage, match="is not a child of the zygote"):
                service._forked(pidns)
        # A child, but not in the slot's pid namespace.
        peer.send({}, {"fork_server": fds["child"]})
        with pytest.raises(MalformedMessage, match="is not a child of the zygote"):
            service._forked(file)
        os.kill(pids["grandchild"], signal.SIGKILL)
        for process in (child, grandchild):
            process.kill()
            process.wait()
        peer.send({}, {"fork_server": fds["child"]})
        with pytest.raises(ProcessLookupError, match="exited before it was in its scope"):
            service._forked(pidns)
        for fd in fds.values():
            os.close(fd)
    finally:
        for process in (child, grandchild):
            process.kill()
            process.wait()
        grandchild.stdout.close()


def test_a_zygote_that_cannot_fork_and_one_whose_child_has_ended_are_told_apart(zygote, pidns):
    service, peer = zygote
    peer.send(Failure("fork", 11, "no process").save())
    with pytest.raises(StepFailed, match="fork: no process"):
        service._forked(pidns)
    peer.send({"ended": True})
    with pytest.raises(ProcessLookupError, match="exited before it was in its scope"):
        service._forked(pidns)


def test_a_zygote_that_does_not_respond_has_failed(zygote, monkeypatch):
    with pytest.raises(ZygoteFailed, match=r"did not respond within 0\.01 s"):
        zygote[0].receive(0.01)


@pytest.mark.parametrize("payload", [*MALFORMED, b'{"pid": -1}', b'{"pid": 5}', b'{"pid": 1e999}', b""])
def test_a_malformed_message_of_a_fork_server_is_a_failed_fork(pair, file, payload):
    async def fork():
        client = ForkServerClient(0, pair[0])
        forking = asyncio.ensure_future(client.fork({"connection_file": "x"}))
        await asyncio.sleep(0)
        with pair[1].receive() as order, Channel.from_fd(order.take("channel")) as channel:
            assert order.body == {"connection_file": "x"}
            if payload:
                socket.send_fds(channel.socket, [payload], [file] if b"fds" in payload else [])
        await forking

    before = open_fds()
    with pytest.raises(ForkFailed):
        asyncio.run(fork())
    assert open_fds() == before


class FakeKernel:
    """Records the calls of the network service; the first fails with `error`, if there is one."""

    def __init__(self):
        self.calls = []
        self.error = None

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if error := self.error:
                self.error = None
                raise error

        return call


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The supervisor's Network, whose service is `_serve` with a FakeKernel."""
    kernel, path = FakeKernel(), tmp_path / "network.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    monkeypatch.setattr(supervisor_network.paths, "NETWORK_SOCKET", path)

    def serve():
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            requests.serve(kernel, connection, kernel)

    thread = threading.Thread(target=serve)
    thread.start()
    yield supervisor_network.Network._call, kernel, path
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


NAME = "nb-0123456789ab"


@pytest.mark.skipif(os.getuid() != 0, reason="the network service serves root only")
def test_the_network_service_gets_typed_arguments_and_the_namespace(network, file):
    call, kernel, _ = network
    before = open_fds()
    asyncio.run(call(None, "attach", {"netns": file}, name=NAME, inner="net0", addresses=["10.0.0.2"], rate=5))
    (op, name, inner, netns, addresses, rate), = kernel.calls
    assert (op, name, inner, addresses, rate) == ("attach", NAME, "net0", ["10.0.0.2"], 5) and netns > 2
    assert settles_at(len(before))


@pytest.mark.skipif(os.getuid() != 0, reason="the network service serves root only")
def test_rules_that_cannot_be_written_are_a_fault_of_the_network(monkeypatch, tmp_path):
    """As while /run is full; callers expect no other error, and try again."""
    monkeypatch.setattr(supervisor_network, "RULES_PATH", tmp_path / "full" / "network.json")
    config = CurrentConfig(host_config.parse({"network": {"allow": ["none", "internet"]}}))
    with pytest.raises(StartFailed, match=r"network\.json was not written: No such file") as failed:
        asyncio.run(supervisor_network.Network(config, None).set_up())
    assert failed.value.details == {"step": "network", "errno": errno.ENOENT}


def test_a_request_of_the_network_is_repeated_after_a_repair(network):
    """Another program deletes the nftables table, and the slot's addresses are added before the service knows."""
    call, kernel, _ = network
    kernel.error = OSError("nft: No such file or directory")
    asyncio.run(call(None, "open", name=NAME))
    assert kernel.calls == [("open", NAME), ("check",), ("open", NAME)]


@pytest.mark.skipif(os.getuid() != 0, reason="the network service serves root only")
@pytest.mark.parametrize("arguments", [
    {"name": "eth0"}, {"name": 7}, {}, {"name": NAME + "\n"},
])
def test_the_network_service_refuses_other_interfaces(network, arguments):
    call, kernel, _ = network
    with pytest.raises(StartFailed, match="nbagent-network: open: ") as failed:
        asyncio.run(call(None, "open", **arguments))
    assert failed.value.details["step"] == "network" and kernel.calls == []


@pytest.mark.parametrize(
    "payload", [*MALFORMED, b"{}", b'{"op": "none"}', b'{"op": "attach", "inner": "x", "rate": 1e999}']
)
def test_the_network_service_responds_to_a_malformed_request_with_a_failure(network, file, payload):
    _, kernel, path = network
    before = open_fds()
    with Channel.unconnected() as channel:
        channel.socket.connect(str(path))
        socket.send_fds(channel.socket, [payload], [file])
        with channel.receive() as response, pytest.raises(StepFailed):
            response.raise_failure()
    assert kernel.calls == [] and settles_at(len(before))
