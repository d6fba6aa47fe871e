# SPDX-License-Identifier: BSD-3-Clause
"""Starting a helper of a slot so that its first instruction runs in the slot's scope.

A shell blocks until a line arrives on its standard input, and then execs Python, which touches all its memory in the
scope. A Python that blocked itself would leave 5 MiB charged to the supervisor. The line needs no channel: a shell
reads it, before there is any code of ours.
"""

from __future__ import annotations

import subprocess
import sys

_GATE = 'read -r go && exec "$@" </dev/null'


def spawn_blocked(module: str, control_fd: int, output: int | None = None) -> subprocess.Popen[bytes]:
    """A process that is blocked until `release` and then runs `python3 -I -m MODULE FD`, FD being `control_fd`.

    `output` is its standard output and error, as a parameter of subprocess; None: the supervisor's.
    """
    python = [sys.executable, "-I", "-m", module, str(control_fd)]
    return subprocess.Popen(
        ["/bin/sh", "-c", _GATE, module, *python],
        stdin=subprocess.PIPE, stdout=output, stderr=output, bufsize=0, pass_fds=(control_fd,), start_new_session=True,
        cwd="/", env={"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )


def release(process: subprocess.Popen[bytes]) -> None:
    """Unblocks a process that is in its scope."""
    if process.stdin is not None:
        with process.stdin as gate:
            gate.write(b"go\n")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, if it has not ended, and reaps it."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
