# SPDX-License-Identifier: BSD-3-Clause
"""A start by fork whose zygote ends meanwhile is repeated; any other failure is that of the start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nbagent.core.errors import StartFailed
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.linux import cgroup
from nbagent.sandbox.spec import SandboxSpec
from nbagent.supervisor import fork_launcher, zygotes
from nbagent.supervisor.fork_launcher import ForkLauncher
from nbagent.supervisor.launcher import Launched
from nbagent.supervisor.systemd import JobFailed
from nbagent.supervisor.zygotes import Zygote, Zygotes
from nbagent.wire.aio import readable, receive
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure

SLOT = Slot(
    id="h-0", image="minimal", digest="d", id_base=1 << 20, uid=2000, state=SlotState.STARTING,
    limits=Limits(1 << 30, 100, None, 256), token="t", created_s=0.0,
)
SPEC = SandboxSpec(*("" for _ in SandboxSpec._fields))._replace(uplink=None)
BY_EXEC = Launched(1, -1, -1, True)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for one that a zygote service has forked."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


class Scope:
    """A scope that was stopped so often; `error` is that of its start."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stopped = error, 0

    async def start(self, pids) -> None:
        if self.error is not None:
            raise self.error

    async def add(self, pids) -> None:
        if self.error is not None:
            raise self.error

    async def stop(self) -> None:
        self.stopped += 1


class OneZygote(Zygotes):
    """A zygote that forks until it ends; then slots start by exec. `reasons` are those for which it was given up."""

    def __init__(self, channel: Channel) -> None:
        self.zygote, self.reasons = Zygote("minimal:0", None, channel, 0.0), []

    def zygote_for(self, slot):
        return None if self.zygote.ended.is_set() else self.zygote

    def give_up(self, zygote, text):
        zygote.ended.set()
        self.reasons.append(text)

    def forked(self, zygote):
        zygote.forks += 1

    def reason(self, image):
        return "its zygote ended"


class ByExec:
    async def launch(self, *_):
        return BY_EXEC


@pytest.fixture
def launch(monkeypatch, process):
    """Starts a slot by a zygote service that does `act` with the control channel of each slot."""
    unit = cgroup.unit_of_process(os.getpid())
    monkeypatch.setattr(Zygote, "unit", unit)
    monkeypatch.setattr(zygotes, "END_SEEN_S", 0.3)
    monkeypatch.setattr(fork_launcher.journal, "stream", lambda *_: socket.socket())
    monkeypatch.setattr(fork_launcher, "forked_filter", lambda: "")

    async def interface(fd: int) -> None:
        raise AssertionError("a slot without a network has no interface")

    async def run(act, scope):
        own, service = Channel.pair()
        for end in (own, service):
            end.socket.setblocking(False)
        supervisor = OneZygote(own)
        launcher = ForkLauncher(supervisor)
        launcher._exec = ByExec()

        async def serve():
            while (request := await receive(service)) is not None:
                with request, Channel.from_fd(request.take("control")) as control:
                    await act(control, supervisor)

        serving = asyncio.ensure_future(serve())
        listener = socket.socket(socket.AF_UNIX)
        try:
            return await launcher.launch(SLOT, SPEC, listener, scope, interface), supervisor
        finally:
            listener.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            for end in (own, service):
                end.close()

    return run


def send(control: Channel, process: subprocess.Popen[bytes], *names: str) -> None:
    for name in names:
        fd = os.pidfd_open(process.pid)
        with contextlib.closing(os.fdopen(fd)):
            control.send({}, {name: fd})


@pytest.mark.parametrize("first", [[], ["init"]], ids=["before the init is seen", "between init and fork server"])
async def test_a_start_whose_process_ended_before_it_was_in_its_scope_is_repeated_by_exec(launch, process, first):
    async def act(control, supervisor):
        send(control, process, *first)
        if first:
            await readable(control.fileno())
            assert control.socket.recv(16) == fork_launcher.GO
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as until its parent reaps it
        send(control, process, *({"init", "fork_server"} - {*first}))

    scope = Scope()
    launched, supervisor = await launch(act, scope)
    assert launched == replace(BY_EXEC, launch_reason="its zygote ended")
    assert supervisor.reasons == ["a process that it forked ended before it was in the slot's scope"]
    assert supervisor.zygote.forks == 1 and scope.stopped == 1


@pytest.mark.parametrize("error", [JobFailed("no process to move"), OSError("no such process")])
async def test_a_start_is_repeated_when_its_scope_fails_and_its_zygote_has_ended(launch, process, error):
    async def act(control, supervisor):
        send(control, process, "init", "fork_server")
        # Its end is noticed a little later than that of its processes.
        asyncio.get_running_loop().call_later(0.05, supervisor.zygote.ended.set)

    scope = Scope(error)
    launched, _ = await launch(act, scope)
    assert launched == replace(BY_EXEC, launch_reason="its zygote ended") and scope.stopped == 1


async def test_a_start_is_repeated_when_its_program_ends_with_its_zygote(launch, process):
    async def act(control, supervisor):
        send(control, process, "init", "fork_server")
        control.send(Failure("launch", 0, "killed").save())
        supervisor.zygote.ended.set()

    launched, _ = await launch(act, Scope())
    assert launched == replace(BY_EXEC, launch_reason="its zygote ended")


@pytest.mark.parametrize("error", [JobFailed("no answer"), OSError("no units service")])
async def test_the_failure_of_a_scope_of_a_zygote_that_goes_on_is_that_of_the_start(launch, process, error):
    async def act(control, supervisor):
        send(control, process, "init", "fork_server")

    scope = Scope(error)
    with pytest.raises(type(error)):
        await launch(act, scope)
    assert scope.stopped == 0


async def test_a_process_of_another_unit_is_refused(launch, process, monkeypatch):
    monkeypatch.setattr(Zygote, "unit", "nbagent-zygote@minimal:0.service")

    async def act(control, supervisor):
        send(control, process, "init")

    with pytest.raises(StartFailed, match=f"process {process.pid} does not belong to nbagent-zygote@minimal:0.service"):
        await launch(act, Scope())


async def test_a_descriptor_that_is_no_process_is_refused(launch, monkeypatch):
    monkeypatch.setattr(Zygote, "unit", "nbagent-zygote@minimal:0.service")

    async def act(control, supervisor):
        read_fd, write_fd = os.pipe()
        control.send({}, {"init": read_fd})
        os.close(read_fd)
        await asyncio.sleep(0.2)  # without an end that would make it readable
        os.close(write_fd)

    with pytest.raises(StartFailed, match="process 0 does not belong to"):
        await launch(act, Scope())
