"""Starting a helper of a slot so that its very first instruction runs in the slot's scope.

A shell waits for the word that it is in its scope, and is replaced by a Python that touches all its
memory there. A Python that waited itself would leave 5 MiB charged to the supervisor.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

_GATE = 'read -r go && exec "$@" </dev/null'


def spawn_blocked(module: str, passed: Sequence[int], output: int | None = None) -> subprocess.Popen[bytes]:
    """A process that waits at the gate to run `python3 -I -m MODULE FD…` with the descriptors `passed`.

    `output` is where it writes, as subprocess has it; None: where the supervisor does.
    """
    python = [sys.executable, "-I", "-m", module, *map(str, passed)]
    return subprocess.Popen(
        ["/bin/sh", "-c", _GATE, module, *python],
        stdin=subprocess.PIPE, stdout=output, stderr=output, bufsize=0, pass_fds=passed, start_new_session=True,
        cwd="/", env={"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )


def release(process: subprocess.Popen[bytes]) -> None:
    """Lets a process through that is in its scope."""
    if process.stdin is not None:
        with process.stdin as gate:
            gate.write(b"go\n")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, if it has not ended, and reaps it."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
