# SPDX-License-Identifier: BSD-3-Clause
"""The launch service and the supervisor's side of it, over a real socket with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
from fakes import until

from nbagent.core import paths
from nbagent.launch import requests
from nbagent.linux import cgroup
from nbagent.sandbox.spec import ACTIVITY_FD
from nbagent.supervisor import launch_service
from nbagent.wire import activity, limits_page
from nbagent.wire.aio import readable
from nbagent.wire.channel import Channel
from nbagent.wire.failure import StepFailed
from nbagent.wire.limits_page import SlotLimits

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="the launch service serves root only")
MALFORMED = [
    b"{", b"[]", b"{}", b'{"op": 7}', b'{"op": "spawn"}', b'{"op": "spawn", "program": "sh"}', b'{"op": "open"}',
    b'{"op": "spawn", "program": "slot"}', b'{"op": "open", "scope": "ssh.service", "pid": 1}',
    b'{"op": "open", "scope": "nbagent-x.scope", "pid": 1e999}', b"x" * 10_000,
]


class Service:
    """`requests.serve` in a thread; `spawned` has the processes that it started."""

    def __init__(self, path):
        self.spawned: list[subprocess.Popen] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            requests.serve(connection, self.spawned.append)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        for process in self.spawned:
            process.wait(10)


@pytest.fixture
def service(tmp_path, monkeypatch):
    path = tmp_path / "launch.sock"
    monkeypatch.setattr(paths, "LAUNCH_SOCKET", path)
    service = Service(path)
    yield service
    service.close()


def open_fds():
    return set(os.listdir("/proc/self/fd"))


def settles_at(before):
    """Whether as many descriptors are open soon; the service closes its own after the response was received."""
    deadline_s = time.monotonic() + 5
    while len(open_fds()) != len(before) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return len(open_fds()) == len(before)


def name_of(process):
    with open(f"/proc/{process.pid}/comm") as file:
        return file.read().strip()


async def test_a_process_blocks_until_it_is_released(service, monkeypatch):
    monkeypatch.setitem(requests.PROGRAMS, requests.SLOT, ("json.tool", subprocess.DEVNULL))
    before = open_fds()
    own, peer = socket.socketpair()
    with own, peer, await launch_service.spawn(requests.SLOT, peer.fileno()) as process:
        await until(lambda: name_of(service.spawned[0]) == "sh")
        assert service.spawned[0].poll() is None
        process.release()
        async with asyncio.timeout(10):
            await readable(process.pidfd)
    # json.tool was given a number as its file, which does not exist.
    assert service.spawned[0].wait(10) != 0 and settles_at(before)


async def test_a_process_that_is_not_released_ends(service):
    with open("/dev/null") as null, await launch_service.spawn(requests.CONTENT, null.fileno()):
        assert service.spawned[0].poll() is None
    assert service.spawned[0].wait(10) == 1


async def test_the_descriptors_of_a_slot_are_those_of_its_first_process(service, monkeypatch):
    page = activity.create()
    actions = [(os.POSIX_SPAWN_DUP2, page, ACTIVITY_FD)]
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, file_actions=actions)
    monkeypatch.setattr(cgroup, "unit_of_process", lambda pid: "nbagent-h-1.scope")
    try:
        before = open_fds()
        opened = await launch_service.open_slot("nbagent-h-1.scope", pid)
        activity.write(page, 3)
        assert activity.read(opened.activity_fd, 1e12).busy == 3
        limits_page.write(opened.activity_fd, SlotLimits(1 << 30, 2.0))
        assert limits_page.read(page) == SlotLimits(1 << 30, 2.0)
        assert os.fstatvfs(opened.root_fd).f_blocks == os.statvfs("/").f_blocks
        for fd in opened:
            os.close(fd)
        assert settles_at(before)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(page)


@pytest.mark.parametrize("pid", [1, 0, -7, (1 << 22) + 1])
async def test_a_process_outside_of_the_scope_is_not_opened(service, pid):
    before = open_fds()
    with pytest.raises(StepFailed) as failed:
        await launch_service.open_slot("nbagent-h-1.scope", pid)
    assert failed.value.failure.errno and settles_at(before)


@pytest.mark.parametrize("payload", MALFORMED)
def test_a_malformed_request_starts_no_process_and_leaks_nothing(service, payload):
    before = open_fds()
    with Channel.unconnected() as channel:
        channel.socket.connect(str(paths.LAUNCH_SOCKET))
        channel.socket.send(payload)
        with channel.receive() as response, pytest.raises(StepFailed):
            response.raise_failure()
    assert service.spawned == [] and settles_at(before)


async def test_a_service_that_was_restarted_gets_the_request_again(service, monkeypatch):
    serve, calls = requests.serve, []

    def first_ends(connection, spawned):
        calls.append(1)
        if len(calls) == 1:
            connection.close()
        else:
            serve(connection, spawned)

    monkeypatch.setattr(requests, "serve", first_ends)
    with open("/dev/null") as null, await launch_service.spawn(requests.CONTENT, null.fileno()):
        assert len(calls) == 2
