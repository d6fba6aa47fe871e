# SPDX-License-Identifier: BSD-3-Clause
"""The supervisor's side of the launch service (nbagent.launch), which has the rights that the supervisor lacks: to make
and to enter the namespaces of slots, and to open files of their processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from types import MappingProxyType, TracebackType

from nbagent.core import paths
from nbagent.launch.requests import OpenedSlot
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure, StepFailed

# The service responds in milliseconds; its first start may take seconds on a busy machine.
TIMEOUT_S = 20.0
# The service may be restarted at any moment, and every request may be repeated.
TRIES = 3


class BlockedProcess:
    """A process that is blocked until `release`, and ends if the context ends before. Owns its descriptors."""

    def __init__(self, pidfd: int, go_fd: int) -> None:
        self.pidfd = pidfd
        self._go_fd = go_fd

    def __enter__(self) -> BlockedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self.pidfd, self._go_fd):
            os.close(fd)

    def release(self) -> None:
        """Unblocks the process, which is in its scope. Raises OSError when it has ended."""
        os.write(self._go_fd, b"go\n")


async def spawn(program: str, control_fd: int) -> BlockedProcess:
    """Starts one of nbagent.launch.requests.PROGRAMS with a channel. Raises OSError, StepFailed or MalformedMessage."""
    with await _call({"op": "spawn", "program": program}, {"control": control_fd}) as response:
        with contextlib.ExitStack() as stack:
            pidfd = response.take("process")
            stack.callback(os.close, pidfd)
            process = BlockedProcess(pidfd, response.take("go"))
            stack.pop_all()
            return process


async def open_slot(scope: str, pid: int) -> OpenedSlot:
    """The descriptors of a running slot, which are the caller's. Raises OSError, StepFailed or MalformedMessage."""
    with await _call({"op": "open", "scope": scope, "pid": pid}) as response:
        taken: list[int] = []
        try:
            for name in ("process", "activity", "root"):
                taken.append(response.take(name))
        except BaseException:
            for fd in taken:
                os.close(fd)
            raise
        return OpenedSlot(*taken)


async def _call(request: Mapping[str, object], fds: Mapping[str, int] = MappingProxyType({})) -> Message:
    failure = Failure("launch", 0, "nbagent-launch.service ended without a response")
    for _ in range(TRIES):
        try:
            async with asyncio.timeout(TIMEOUT_S):
                response = await _request(request, fds)
        except TimeoutError:
            raise StepFailed(Failure("launch", 0, f"nbagent-launch: no response within {TIMEOUT_S:g} s")) from None
        except ConnectionError as error:
            failure = Failure.of(error, "launch")
            continue
        if response is not None:
            try:
                response.raise_failure()
            except BaseException:
                response.close()
                raise
            return response
    raise StepFailed(failure._replace(text=f"nbagent-launch: {failure.text}"))


async def _request(request: Mapping[str, object], fds: Mapping[str, int]) -> Message | None:
    with Channel.unconnected() as channel:
        channel.socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(channel.socket, str(paths.LAUNCH_SOCKET))
        channel.send(request, fds)
        return await receive(channel)
