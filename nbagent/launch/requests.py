# SPDX-License-Identifier: BSD-3-Clause
"""The requests of the launch service, one a connection of nbagent.wire.channel. Every request may be repeated.

    {"op": "spawn", "program": str, "fds": ["control"]}
        starts a process that blocks before its first instruction of Python; a line in the pipe "go" unblocks it, and
        it ends when the pipe is closed without one
        response: {"fds": ["process", "go"]}, the first a pidfd
    {"op": "open", "scope": str, "pid": int}
        opens the first process of a running slot, if it is in that scope
        response: {"fds": ["process", "activity", "root"]}: a pidfd, the activity page, and the root directory (O_PATH)

Instead of these, the response may be a failure. The programs are those of PROGRAMS: they run as root of the host until
they have entered the namespaces of a slot, and receive their orders over the descriptor "control".

The blocked process is a shell that reads a line from its standard input and then execs Python, which touches all its
memory in the slot's scope. A Python that blocked itself would leave 5 MiB charged to this service.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from nbagent.linux import cgroup
from nbagent.sandbox.spec import ACTIVITY_FD
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure

SLOT, CONTENT = "slot", "content"
# Each with its standard output and error, as a parameter of subprocess. The second process of `deliver` is in the slot,
# so it gets no descriptor of the journal.
PROGRAMS: dict[str, tuple[str, int | None]] = {
    SLOT: ("nbagent.runtime.exec_slot", None), CONTENT: ("nbagent.content.deliver", subprocess.DEVNULL),
}
REQUEST_MAX_BYTES = 4096
_PID_MAX = (1 << 31) - 1
_GATE = 'read -r go && exec "$@" </dev/null'
_SCOPE = re.compile(r"nbagent-[0-9a-z-]+\.scope")
# One connection is served at a time, so a caller that sends nothing may not block the others.
_TIMEOUT_S = 5.0

Response = dict[str, int]
Spawned = Callable[["subprocess.Popen[bytes]"], None]


class OpenedSlot(NamedTuple):
    """Descriptors of a running slot, which are the caller's: its first process, its activity page, its root."""

    pidfd: int
    activity_fd: int
    root_fd: int


def serve(connection: socket.socket, spawned: Spawned) -> None:
    """Serves one connection, and closes it. `spawned` gets each process, which has to be reaped."""
    with Channel(connection, REQUEST_MAX_BYTES) as channel, contextlib.suppress(OSError):
        channel.socket.settimeout(_TIMEOUT_S)
        response: Response = {}
        try:
            if (request := channel.receive()) is None:
                return
            with request:
                if (uid := channel.peer_uid()) != 0:
                    raise PermissionError(errno.EPERM, f"user id {uid} may not use the launch service")
                response = _do(request, spawned)
            channel.send({}, response)
        except Exception as error:  # the service has to serve the other slots' requests
            channel.send(Failure.of(error, "launch").save())
        finally:
            for fd in response.values():
                os.close(fd)


def _do(request: Message, spawned: Spawned) -> Response:
    body = request.body
    match body.get("op"):
        case "spawn":
            name = fields.text(body, "program")
            if name not in PROGRAMS:
                raise ValueError(f"unknown program {name[:40]!r}, expected one of: {', '.join(PROGRAMS)}")
            process, go_fd = spawn(*PROGRAMS[name], request.fds["control"])
            spawned(process)
            return {"process": os.pidfd_open(process.pid), "go": go_fd}
        case "open":
            opened = open_slot(fields.text(body, "scope"), fields.integer(body, "pid", -_PID_MAX, _PID_MAX))
            return {"process": opened.pidfd, "activity": opened.activity_fd, "root": opened.root_fd}
        case unknown:
            raise ValueError(f"unknown operation {str(unknown)[:40]!r}")


def spawn(module: str, output: int | None, control_fd: int) -> tuple[subprocess.Popen[bytes], int]:
    """A process that is blocked, and the pipe that unblocks it; then it runs `python3 -I -m MODULE FD`, FD being
    `control_fd`. Raises OSError.
    """
    go_read, go_write = os.pipe()
    with open(go_read) as gate:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GATE, module, sys.executable, "-I", "-m", module, str(control_fd)],
                stdin=gate, stdout=output, stderr=output, pass_fds=(control_fd,), start_new_session=True, cwd="/",
                env={"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
            )
        except BaseException:
            os.close(go_write)
            raise
    return process, go_write


def open_slot(scope: str, pid: int) -> OpenedSlot:
    """The descriptors of the slot whose first process is `pid`. Raises OSError; ProcessLookupError when `pid` is not in
    `scope`.

    The init of a slot holds the activity page at the descriptor ACTIVITY_FD, which the slot's user cannot change.
    """
    if not _SCOPE.fullmatch(scope):
        raise ValueError(f"{scope[:40]!r} is not the scope of a slot")
    with contextlib.ExitStack() as stack:
        def owned(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        pidfd = owned(os.pidfd_open(pid))
        if cgroup.unit_of_process(pid) != scope:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is not in {scope}")
        opened = OpenedSlot(
            pidfd,
            # Writable, because the supervisor writes the limits of a claim to it.
            owned(os.open(f"/proc/{pid}/fd/{ACTIVITY_FD}", os.O_RDWR | os.O_CLOEXEC)),
            owned(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)),
        )
        # The kernel may have given the pid to another process meanwhile, but only after this one ended.
        if select.select([pidfd], [], [], 0)[0]:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
        stack.pop_all()
        return opened
