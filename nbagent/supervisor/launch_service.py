# SPDX-License-Identifier: BSD-3-Clause
"""The supervisor's side of the launch service (nbagent.launch), which has the rights that the supervisor lacks: to make
and to enter the namespaces of slots, and to open files of their processes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from types import TracebackType

from nbagent.core import paths
from nbagent.launch.requests import OpenedSlot
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

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
    return BlockedProcess(*await _call({"op": "spawn", "program": program}, {"control": control_fd}, ("process", "go")))


async def open_slot(scope: str, pid: int) -> OpenedSlot:
    """The descriptors of a running slot, which are the caller's. Raises OSError, StepFailed or MalformedMessage."""
    return OpenedSlot(*await _call({"op": "open", "scope": scope, "pid": pid}, {}, ("process", "activity", "root")))


async def _call(request: Mapping[str, object], fds: Mapping[str, int], expected: Sequence[str]) -> list[int]:
    """The descriptors of the response, which are the caller's."""
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
            with response:
                response.raise_failure()
                if missing := set(expected) - response.fds.keys():
                    raise MalformedMessage(f"no descriptor {', '.join(sorted(missing))}")
                return [response.take(name) for name in expected]
    raise StepFailed(failure._replace(text=f"nbagent-launch: {failure.text}"))


async def _request(request: Mapping[str, object], fds: Mapping[str, int]) -> Message | None:
    with Channel.unconnected() as channel:
        channel.socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(channel.socket, str(paths.LAUNCH_SOCKET))
        channel.send(request, fds)
        return await receive(channel)
