# SPDX-License-Identifier: BSD-3-Clause
"""The delivery of a claim's content: the orders, and what the process in the slot may respond."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest
from malformed_messages import MALFORMED, open_fds

from nbagent.config import host_config
from nbagent.content.deliver import ENTER, UNPACK, WRITE, Order
from nbagent.core.claim_content import Content, File, FileBundle
from nbagent.core.errors import ArchiveFailed, ContentFailed, NbagentError, StartFailed
from nbagent.supervisor import content_injector
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure


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
