# SPDX-License-Identifier: BSD-3-Clause
"""Starting a slot by a fork of its image's zygote, and by exec where there is none.

The zygote runs the code of an image. The pidfds that it sends are checked, and a zygote that does not fork is given up.
A start whose zygote ends meanwhile is repeated, by the next zygote or by exec, because the image has not failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import replace

from nbagent.core.errors import StartFailed
from nbagent.core.model import Slot
from nbagent.linux import cgroup, journal
from nbagent.sandbox.spec import SandboxSpec
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.launcher import Attach, ExecLauncher, Launched, Scope, SlotStart, has_ended, pid_of
from nbagent.supervisor.sandbox_specs import forked_filter
from nbagent.supervisor.systemd import JobFailed
from nbagent.supervisor.zygotes import Zygote, Zygotes

# From a request to the processes of the slot; the zygote service's own timeout for its zygote is shorter.
FORK_TIMEOUT_S = 10.0
# To the pipe and to the slot's control socket. One write without a message, because its reader may touch no memory
# before it is in the slot's scope.
GO = b"go"


class ZygoteServiceFailed(Exception):
    """A zygote service did not fork: it ended, or does not respond, or what it forked has ended before it ran."""


class ForkLauncher:
    """Starts a slot by a fork of its image's zygote, in milliseconds; by exec where there is none."""

    def __init__(self, zygotes: Zygotes) -> None:
        self.zygotes = zygotes
        self._exec = ExecLauncher()
        self._under_way = 0
        self._execs = asyncio.Semaphore(os.cpu_count() or 1)

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        while (zygote := self.zygotes.zygote_for(slot)) is not None:
            self._under_way += 1
            try:
                forked = spec._replace(forked=True, forked_filter=forked_filter())
                launched = await self._fork(zygote, slot, forked, listener, scope, attach)
                return replace(launched, launch="fork", launch_reason=zygote.reason)
            except ZygoteServiceFailed as error:
                self.zygotes.give_up(zygote, str(error))
                await scope.stop()
            except (StartFailed, JobFailed, OSError):
                # systemd ends all processes of a zygote's unit, also those that are being moved into their scope.
                if not await self.zygotes.has_ended(zygote):
                    raise
                await scope.stop()
            finally:
                self._under_way -= 1
        # Many starts that were admitted as forks come here at once when their zygote fails, and an exec takes a
        # processor for a second.
        async with self._execs:
            reason = self.zygotes.reason(slot.image)
            return replace(await self._exec.launch(slot, spec, listener, scope, attach), launch_reason=reason)

    async def _fork(
        self, zygote: Zygote, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        with SlotStart(slot) as start, contextlib.ExitStack() as stack:
            go_fd = _request_fork(zygote, slot, spec, listener, start)
            stack.callback(os.close, go_fd)
            self.zygotes.forked(zygote)
            init, = await _forked(start, "init")
            reach(Point.FORKED)
            mine = stack.enter_context(contextlib.ExitStack())
            mine.callback(os.close, init)
            pids = _pids([init], slot, zygote)
            # A slot that starts alone gets its scope and builds its root while the zygote still forks. That is one
            # call of PID 1 more, a millisecond, which delays slots that start at the same time.
            early = asyncio.ensure_future(_enclose(scope, pids[:], start)) if self._under_way == 1 else None
            try:
                server_fd, = await _forked(start, "fork_server")
                stack.callback(os.close, server_fd)
                pids += _pids([server_fd], slot, zygote)
                if early is None:
                    await _enclose(scope, pids, start)
                else:
                    # Requested before the scope has started, so that the service adds the process at once.
                    await asyncio.gather(early, scope.add(pids[1:]))
            finally:
                if early is not None:
                    early.cancel()
                    await asyncio.gather(early, return_exceptions=True)
            os.write(go_fd, GO)
            launched = await start.wait_running(init, spec, attach)
            mine.pop_all()
            return launched

    def prepare(self) -> None:
        """Primes PID 1, so that moving the slot's processes into their scope does not wait for an RCU grace period."""
        if self._under_way == 0:
            self.zygotes.prime()


def _request_fork(zygote: Zygote, slot: Slot, spec: SandboxSpec, listener: socket.socket, start: SlotStart) -> int:
    """Requests a slot from the zygote service. Raises ZygoteServiceFailed.

    Returns the end of the pipe that unblocks the slot's fork server; it is the caller's.
    """
    go_read, go_write = os.pipe()
    with start.peer, open(go_read), journal.stream(slot.id, slot.scope) as stream:
        fds = {"control": start.peer.fileno(), "stream": stream.fileno(), "go": go_read, **start.descriptors(listener)}
        try:
            zygote.channel.send({"spec": spec.save()}, fds)
        except OSError as error:
            os.close(go_write)
            raise ZygoteServiceFailed(f"the zygote service takes no request: {error}") from error
    return go_write


async def _forked(start: SlotStart, name: str) -> list[int]:
    """The pidfd of a forked process. Raises ZygoteServiceFailed."""
    try:
        async with asyncio.timeout(FORK_TIMEOUT_S):
            return await start.receive_fds(name)
    except (TimeoutError, StartFailed) as error:
        raise ZygoteServiceFailed(str(error) or f"no fork within {FORK_TIMEOUT_S:g} s") from error


async def _enclose(scope: Scope, pids: list[int], start: SlotStart) -> None:
    """Starts the slot's scope, and unblocks the first process in it."""
    await scope.start(pids)
    start.control.socket.send(GO)


def _pids(pidfds: list[int], slot: Slot, zygote: Zygote) -> list[int]:
    """The processes of pidfds. Raises ZygoteServiceFailed when one has ended, which none does before it is in its
    scope, and StartFailed when one is not of the zygote's unit.

    The zygote, which is an image's code, sent the pidfds, so a process is accepted only when it was forked in the unit.
    """
    pids = []
    for fd in pidfds:
        pid, unit = 0, ""
        with contextlib.suppress(StartFailed, OSError):
            pid = pid_of(fd, slot)
            unit = cgroup.unit_of_process(pid)
        # After the unit, because a process that ends meanwhile has none.
        if has_ended(fd):
            raise ZygoteServiceFailed("a process that it forked ended before it was in the slot's scope")
        if unit != zygote.unit:
            raise StartFailed(f"process {pid} does not belong to {zygote.unit}", step="fork")
        pids.append(pid)
    return pids
