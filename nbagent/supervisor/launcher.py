# SPDX-License-Identifier: BSD-3-Clause
"""Starting a slot's processes: by exec of the image's program here, by a fork of its zygote in `fork_launcher`.

A launcher gets a slot, its sandbox and its listening socket, the scope to start, and a callback that makes an interface
in a network namespace; it returns when the slot's program runs. The descriptors that it returns are the caller's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbagent.core.errors import StartFailed
from nbagent.core.model import Slot
from nbagent.launch.requests import SLOT
from nbagent.sandbox.spec import SandboxSpec
from nbagent.supervisor import launch_service
from nbagent.wire import activity, limits_page
from nbagent.wire.aio import readable, receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure, StepFailed, printable
from nbagent.wire.fields import MalformedMessage
from nbagent.wire.limits_page import SlotLimits


@dataclass(frozen=True)
class Launched:
    """A slot whose program runs. `pid` is its first process; `pidfd` and `activity_fd` are open.

    `serves`: the program has reported that it takes requests; any other has to be probed. `launch` is "fork" or "exec",
    and `launch_reason` why it was not "fork" of a complete zygote.
    """

    pid: int
    pidfd: int
    activity_fd: int
    serves: bool
    launch: str = "exec"
    launch_reason: str = ""


class Scope(Protocol):
    """The scope of a slot that starts."""

    async def start(self, pids: Sequence[int]) -> None:
        """Starts it with these processes in it. Raises JobFailed or OSError."""

    async def add(self, pids: Sequence[int]) -> None:
        """Moves more processes into it, also while it is being started. Raises OSError."""

    async def stop(self) -> None:
        """Ends it and every process in it, if it exists. Raises OSError."""


Attach = Callable[[int], Awaitable[None]]


class Launcher(Protocol):
    """How slots are started."""

    def prepare(self) -> None:
        """Does the slow work of a start ahead of it, because a claim waits for a slot that will be started."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        """Starts the slot's program. Raises StartFailed; the caller then stops the scope, which ends the processes."""


class SlotStart:
    """Resources of one start, whichever way it is done; a context that closes those that were not passed on.

    `control` is the supervisor's end of the slot's control channel (nbagent.runtime.slot_process), `peer` the slot's.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._awaited = {"init", "fork_server", "netns"}
        self._received: dict[str, int] = {}

    def __enter__(self) -> SlotStart:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_received)
            self.activity_fd = activity.create()
            self._activity = stack.enter_context(contextlib.ExitStack())
            self._activity.callback(os.close, self.activity_fd)
            self.config_fd = os.memfd_create("nbagent-config", os.MFD_CLOEXEC)
            stack.callback(os.close, self.config_fd)
            settings = {"base_url": self.slot.base_path, "token": self.slot.token}
            limits_page.write(self.activity_fd, SlotLimits.of(self.slot.limits))
            os.write(self.config_fd, json.dumps(settings).encode())
            os.lseek(self.config_fd, 0, os.SEEK_SET)
            self.control, self.peer = (stack.enter_context(end) for end in Channel.pair())
            self._all = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._all.close()

    def descriptors(self, listener: socket.socket) -> dict[str, int]:
        """The descriptors that the slot's program gets, borrowed."""
        return {"listen": listener.fileno(), "activity": self.activity_fd, "config": self.config_fd}

    async def receive_fds(self, *names: str) -> list[int]:
        """The descriptors of these names, which are the caller's from then on. Raises StartFailed.

        They arrive in any order: init can send its network namespace before the zygote has forked the fork server.
        """
        while missing := set(names) - self._received.keys():
            message = await self._receive()
            if message is None:
                wanted = ", ".join(sorted(missing))
                raise StartFailed(f"the slot's processes ended before they sent: {wanted}", step="launch")
            with message:
                if not message.fds or not message.fds.keys() <= self._awaited:
                    raise _unexpected(message)
                for name in list(message.fds):
                    self._received[name] = message.take(name)
                    self._awaited.remove(name)
        return [self._received.pop(name) for name in names]

    def _close_received(self) -> None:
        while self._received:
            os.close(self._received.popitem()[1])

    async def wait_running(self, pidfd: int, spec: SandboxSpec, attach: Attach) -> Launched:
        """Returns when the slot's program runs. `pidfd`, of its first process, stays the caller's if this raises."""
        if spec.uplink is not None:
            netns_fd, = await self.receive_fds("netns")
            try:
                await attach(netns_fd)
            finally:
                os.close(netns_fd)
            self.control.send({"attached": True})
        pid = pid_of(pidfd, self.slot)
        serves = False
        while (message := await self._receive()) is not None:
            with message:
                # Once, because a peer that repeats it would keep the supervisor busy.
                if serves or "serves" not in message.body:
                    raise _unexpected(message)
            serves = True
        self._activity.pop_all()
        return Launched(pid, pidfd, self.activity_fd, serves)

    async def _receive(self) -> Message | None:
        """The next message, None at the end. Raises StartFailed for a failure, and for a malformed message."""
        try:
            message = await receive(self.control)
        except MalformedMessage as error:
            raise StartFailed(str(error), step="launch") from error
        if message is not None:
            try:
                message.raise_failure()
            except StepFailed as error:
                message.close()
                raise StartFailed.at(*error.failure) from error
            except MalformedMessage as error:
                message.close()
                raise StartFailed(str(error), step="launch") from error
        return message


class ExecLauncher:
    """Starts a slot by exec of its image's program: a second, and works with every image."""

    def prepare(self) -> None:
        """Nothing, because only milliseconds could be saved."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        with SlotStart(slot) as start:
            try:
                with start.peer:
                    process = await launch_service.spawn(SLOT, start.peer.fileno())
            except (StepFailed, MalformedMessage) as error:
                raise StartFailed.at(*Failure.of(error, "launch")) from error
            with process:
                await scope.start([pid_of(process.pidfd, slot)])
                process.release()
                start.control.send({"spec": spec.save()}, start.descriptors(listener))
                pidfd, = await start.receive_fds("init")
                try:
                    await readable(process.pidfd)
                    # Last, because a later error would leave the descriptors of the slot that runs.
                    return await start.wait_running(pidfd, spec, attach)
                except BaseException:
                    os.close(pidfd)
                    raise


def _unexpected(message: Message) -> StartFailed:
    content = printable(", ".join([*map(repr, message.body), *(f"descriptor {name!r}" for name in message.fds)]), 200)
    return StartFailed(f"unexpected message from the slot's processes: {content or 'empty'}", step="launch")


def ended(slot: Slot) -> StartFailed:
    """The error of a start whose program ended, wherever that is noticed first."""
    return StartFailed(f"the slot's program ended; for the reason see journalctl -u {slot.scope}", step="ready")


def pid_of(pidfd: int, slot: Slot) -> int:
    """The process of a pidfd. Raises StartFailed when it has ended."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:
                return pid
    raise ended(slot)


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended, also while its parent has not reaped it."""
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(0))
