# SPDX-License-Identifier: BSD-3-Clause
"""A zygote service and its zygote, and a server and its fork server: malformed messages are errors of one type."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time

import psutil
import pytest
from malformed_messages import MALFORMED, open_fds

from nbagent.core.events import Event
from nbagent.runtime import init, zygote_service
from nbagent.runtime.zygote_service import ModuleFailed, ZygoteFailed, ZygoteService
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage
from nbagent.zygote.forkserver import ForkFailed, ForkServerClient


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
