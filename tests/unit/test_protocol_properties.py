# SPDX-License-Identifier: BSD-3-Clause
"""Arbitrary bytes, descriptors, orders and ends, thrown at each protocol.

For every input: the receiver's documented errors and no other, and afterwards no descriptor, task, start or slot is
left. A run has the same examples each time; `make fuzz` and NBAGENT_HYPOTHESIS=deep try others and more.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import Host, kinds, until
from hypothesis import given
from hypothesis import strategies as st
from strategies import DESCRIPTORS, ENDS, Packet, documents, ended, packets, payloads, values

from nbagent.content import deliver
from nbagent.core.claim_content import Content
from nbagent.core.errors import BadRequest, NbagentError
from nbagent.core.events import Event
from nbagent.network import requests
from nbagent.runtime import port_forward
from nbagent.supervisor import content_injector
from nbagent.supervisor.content_injector import Injected
from nbagent.supervisor.server import ControlServer
from nbagent.wire import activity, aio, operations
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import StepFailed
from nbagent.wire.fields import MalformedMessage
from nbagent.zygote.forkserver import ForkFailed, ForkServerClient

FAILURE = {"failure": {"step": "x", "errno": 5, "text": "x"}}
ends = st.sampled_from(ENDS)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fails when a descriptor is open afterwards that was not before.

    Without garbage collection, which would close descriptors that were left, and would run finalizers of event loops
    inside the recursion of a JSON decoder, where they fail.
    """
    before = sorted(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        yield
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


@given(
    st.lists(packets(payloads({}, FAILURE, {"fds": ["x"]})), max_size=4), ends, st.sampled_from([64, 65536, 1 << 20]),
)
def test_a_channel_returns_messages_or_one_error(sent: list[Packet], end: str, limit_bytes: int) -> None:
    with nothing_left():
        one, other = Channel.pair(limit_bytes)
        with one, other:
            for packet in sent:
                packet.send(other.socket)
            with ended(other.socket, end):
                for _ in range(len(sent) + 1):
                    try:
                        message = one.receive(wait=False)
                    except BlockingIOError:
                        break
                    except MalformedMessage:
                        continue
                    if message is None:
                        break
                    with message, contextlib.suppress(StepFailed, MalformedMessage):
                        message.raise_failure()


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_a_descriptor_of_any_kind_is_a_body_or_malformed(kind: str) -> None:
    with nothing_left():
        one, other = Channel.pair(1 << 20)
        with one, other:
            Packet(b"{}", (kind,), ("body",)).send(other.socket)
            with contextlib.nullcontext() if kind == "sealed" else pytest.raises(MalformedMessage):
                assert one.receive(wait=False) is not None


CLAIM: dict[str, Any] = {
    "options": {"ttl": 60, "memory": "1G", "cpus": 0.5, "path": "lab", "image": "minimal", "network": "none"},
    "key": "k", "client": "192.0.2.1",
}
WITH_FILES = {**CLAIM, "files": {"entries": [["a", 1], ["b/c", 1]], "digest": "0" * 64}}
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "claim": [CLAIM, WITH_FILES, {**CLAIM, "key": operations.own_key()}],
    "slot": [{"id": "x"}], "release": [{"id": "x"}], "update": [{"id": "x", "options": {"ttl": 5, "memory": "1G"}}],
}
NAMES = sorted(operation.name for operation in operations.OPERATIONS)
REQUESTS = [{"op": name, "args": args} for name in NAMES for args in ARGUMENTS.get(name, [{}])]


@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda operation: operation.name)
@given(st.data())
def test_the_arguments_of_an_operation_are_typed_or_malformed(operation: Any, data: st.DataObject) -> None:
    args = data.draw(st.one_of(documents(*ARGUMENTS.get(operation.name, [{}])), st.dictionaries(st.text(), values)))
    kind = data.draw(st.sampled_from([None, *DESCRIPTORS]))
    with nothing_left(), Message({}, {} if kind is None else {"content": DESCRIPTORS[kind]()}) as request:
        try:
            restored = operation.restore(args, request)
        except (MalformedMessage, BadRequest):
            return
        assert isinstance(hash(str(restored)), int)


def serving() -> list[str]:
    """The tasks that serve a connection."""
    return [str(task) for task in asyncio.all_tasks() if "_serve_one" in str(task.get_coro())]


async def serve(path: Path, connections: list[tuple[list[Packet], str, bool]]) -> list[dict[str, Any]]:
    """Sends packets on each connection to the supervisor's control socket; the responses to those that are awaited."""
    responses = []
    faults: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: faults.append(context))
    async with Host(path) as host:
        await host.until_states("warm")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as kept:
            listener.bind(str(path / "control.sock"))
            listener.listen()
            server = asyncio.ensure_future(ControlServer(host.calls, listener, {os.getuid()}).serve())
            for sent, end, awaits in connections:
                channel = Channel.unconnected()
                channel.socket.setblocking(False)
                channel.socket.connect(str(path / "control.sock"))
                for packet in sent:
                    packet.send(channel.socket)
                if awaits and sent:
                    response = await asyncio.wait_for(aio.receive(channel), 10)
                    if response is not None:
                        responses.append(response.body)
                        response.close()
                if end == "close":
                    channel.close()
                else:
                    kept.enter_context(channel)
                    if end == "shutdown":
                        channel.socket.shutdown(socket.SHUT_WR)
                await asyncio.sleep(0)
            kept.close()
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)
        # A request for a claim of which the connection is closed may still be served.
        await until(lambda: not serving(), serving)
        host.calls.set_draining(False)
        for live in list(host.slots.values()):
            host.supervisor.stopper.end(live, Event.SLOT_RELEASED, client="a test")
        await host.until_states("warm")
        assert host.calls._claims._pending == {}
    assert faults == []
    return responses


@given(st.lists(st.tuples(
    st.lists(packets(payloads(*REQUESTS, WITH_FILES), "content"), max_size=2), ends, st.booleans(),
), max_size=4))
def test_the_control_socket_responds_and_is_as_before(connections: list[tuple[list[Packet], str, bool]]) -> None:
    path = Path(tempfile.mkdtemp(prefix=f"nbagent-properties-{os.getpid()}-", dir="/dev/shm"))
    try:
        with nothing_left():
            for response in asyncio.run(serve(path, connections)):
                assert set(response) in ({"ok"}, {"error"}), response
                if "error" in response:
                    assert response["error"]["code"] != "internal", response
    finally:
        shutil.rmtree(path)


RESULT = {"files": 1, "entries": 2}


@given(st.lists(packets(payloads(RESULT, FAILURE)), max_size=3), st.booleans())
def test_the_response_of_a_delivery_is_a_result_or_an_error(sent: list[Packet], archive: bool) -> None:
    async def receive() -> Injected:
        control, peer = Channel.pair()
        with control:
            with peer:
                for packet in sent:
                    packet.send(peer.socket)
            return await content_injector._result(control, Content(archive="https://x/" if archive else None))

    with nothing_left(), contextlib.suppress(NbagentError):
        injected = asyncio.run(receive())
        assert injected.files >= 0 and injected.entries >= 0


@given(st.lists(packets(payloads({"pid": 5}, FAILURE)), max_size=3))
def test_the_response_of_a_fork_server_is_a_pid_or_a_failed_fork(sent: list[Packet]) -> None:
    async def fork() -> None:
        one, other = Channel.pair()
        with one, other:
            forking = asyncio.ensure_future(ForkServerClient(0, one).fork({"connection_file": "x"}))
            await asyncio.sleep(0)
            order = other.receive(wait=False)
            assert order is not None
            with order, Channel.from_fd(order.take("channel")) as channel:
                for packet in sent:
                    packet.send(channel.socket)
            await forking

    with nothing_left(), contextlib.suppress(ForkFailed):
        asyncio.run(fork())


class Kernel:
    """A kernel whose every operation fails with what netlink may raise, or succeeds."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> None:
            if self.error is not None:
                raise self.error

        return call


NAME = "nb-0123456789ab"
NETWORK_REQUESTS = [
    {"op": "rules"}, {"op": "check"}, {"op": "open", "name": NAME}, {"op": "sweep", "keep": [NAME]},
    {"op": "remove", "name": NAME, "addresses": ["198.18.0.2", "fd00::2"]},
    {"op": "attach", "name": NAME, "inner": "net0", "addresses": ["198.18.0.2"], "rate": 5},
]


FAULTS = [None, OSError(19, "No such device"), ValueError("x" * 70_000), KeyError("\ud800"), RecursionError()]


@given(packets(payloads(*NETWORK_REQUESTS), "netns"), ends, st.sampled_from(FAULTS))
def test_the_network_service_responds_to_every_request(sent: Packet, end: str, error: Exception | None) -> None:
    with nothing_left():
        one, other = Channel.pair()
        with other:
            sent.send(other.socket)
            if end == "keep" and sent.payload:
                requests.serve(Kernel(error), one.socket, Kernel(error))
                with contextlib.suppress(BlockingIOError):
                    response = other.receive(wait=False)
                    assert response is None or response.body == {"ok": True} or "failure" in response.body
            else:
                with ended(other.socket, "close"):
                    requests.serve(Kernel(error), one.socket, Kernel(error))


@given(st.binary(min_size=12, max_size=12), st.floats(0, 1e9))
def test_an_activity_page_has_a_time_that_is_not_in_the_future(content: bytes, now_s: float) -> None:
    with nothing_left():
        fd = activity.create()
        try:
            os.pwrite(fd, content, 0)
            found = activity.read(fd, now_s)
        finally:
            os.close(fd)
    assert not math.isnan(found.last_s) and found.last_s <= now_s and 0 <= found.busy < 1 << 32


ORDER = deliver.Order(1000, 5, "", [("a", 1)], None, [], 1 << 20, 100, 5.0).save()


@given(documents(ORDER))
def test_an_order_for_content_is_restored_or_incomplete(saved: dict[str, Any]) -> None:
    with contextlib.suppress(TypeError):
        assert deliver.Order.restore(saved).save() == saved


# How a client and the program of a slot behave on a connection: bytes to send, or an end.
steps = st.lists(st.one_of(
    st.tuples(st.sampled_from(["client", "program"]), st.binary(min_size=1, max_size=20)),
    st.tuples(st.sampled_from(["client", "program"]), st.sampled_from(["shutdown", "close", "reset", "read"])),
), max_size=8)


class Ended(Exception):
    """The end of the forwarder's loop in a test."""


@contextlib.contextmanager
def forwarding(directory: str, port: int) -> Iterator[port_forward.Forwarder]:
    """A forwarder in a thread, which ends with the context. Fails when it has raised."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{directory}/http.sock")
        listener.listen()
        listener.setblocking(False)
        woken, waker = (stack.enter_context(end) for end in socket.socketpair())
        forwarder = port_forward.Forwarder(listener, port, lambda: None, 60)
        stack.callback(forwarder._selector.close)
        raised: list[BaseException] = []

        def end(_events: int) -> None:
            raise Ended

        def run() -> None:
            try:
                forwarder.run()
            except BaseException as error:
                raised.append(error)

        forwarder._await(woken, selectors.EVENT_READ, end)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield forwarder
        finally:
            waker.send(b"x")
            thread.join()
    assert [type(error) for error in raised] == [Ended]


def holds_soon(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return condition()


@given(st.lists(steps, min_size=1, max_size=3))
def test_the_forwarder_ends_every_connection_whatever_both_sides_do(scripts: list[Any]) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_left())
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="forward-", dir="/dev/shm"))
        program = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        forwarder = stack.enter_context(forwarding(directory, program.getsockname()[1]))
        for script in scripts:
            play(forwarder, f"{directory}/http.sock", program, script)
        assert holds_soon(lambda: forwarder._count == 0), "connections are left although both sides have closed"
        assert not forwarder._pending


def play(forwarder: port_forward.Forwarder, path: str, program: socket.socket, script: list[Any]) -> None:
    """One connection of a client to the program; both sides are closed at the end."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        program.settimeout(10)
        accepted, _ = program.accept()
        # A reset before that would be a program that does not listen yet, to which the forwarder connects again.
        assert holds_soon(lambda: forwarder._listens)
        with accepted:
            sides = {"client": client, "program": accepted}
            for side in sides.values():
                side.setblocking(False)
            for name, what in script:
                side = sides[name]
                with contextlib.suppress(OSError):
                    if isinstance(what, bytes):
                        side.send(what, socket.MSG_NOSIGNAL)
                    elif what == "read":
                        side.recv(64)
                    elif what == "shutdown":
                        side.shutdown(socket.SHUT_WR)
                    else:
                        if what == "reset" and side.family == socket.AF_INET:
                            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        side.close()


def test_the_examples_reach_claims_and_refusals(journal: list[dict[str, str]], tmp_path: Path) -> None:
    """The property of the control socket would hold for a server that refuses everything."""
    claim = Packet(json.dumps({"op": "claim", "args": CLAIM | {"options": {}}}).encode(), (), None)
    (response,) = asyncio.run(serve(tmp_path, [([claim], "keep", True)]))
    assert "slot" in response["ok"]
    assert Event.SLOT_CLAIMED in kinds(journal)
