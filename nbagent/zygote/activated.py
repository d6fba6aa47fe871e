# SPDX-License-Identifier: BSD-3-Clause
"""Runs the script `activate` of an image's manifest, and then a program with the environment that the script has made.

    python3 -I -S activated.py SCRIPT PROGRAM ARGUMENT…

A shell of the image runs the script, as it does conda's activate.d and the scripts that a container's entry point
reads. Of its effects only the environment is kept: a file that it writes into the home of a zygote is in no slot.

Before the server of a slot by exec it runs as the slot's user. Before a zygote, which is root of the image's user
namespace, it runs once for all slots, with an id that no slot has and without a capability; the processes that it
leaves behind are killed, because nothing but forks of slots may run beside a zygote. The zygote gets the names of the
variables that have changed, by ACTIVATED_OPTION, and gives them to each slot.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from typing import Dict, Iterable, List, Mapping, NoReturn, Optional

if __name__ == "__main__":
    # With -I the directory of this file is not searched.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from nbagent.sandbox import plan
from nbagent.sandbox.spec import LISTEN_FD
from nbagent.sandbox.steps import Unprivileged
from nbagent.wire import assets
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure

# The option of a zygote, with the names of variables, separated by commas.
ACTIVATED_OPTION = "--activated="
STEP = "activate"
TIMEOUT_S = 60.0
ENVIRONMENT_MAX_BYTES = 64 * 1024
# Above UID_LAST of nbagent.supervisor.slots, and not 65534, which owns files of other users by convention.
ZYGOTE_SCRIPT_UID = 65533
# A zygote's control channel, at which its failure is received.
CONTROL_FD = LISTEN_FD
SHELLS = ("/bin/bash", "/bin/sh")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# Of a shell itself, and of the slot.
KEPT = frozenset((
    "_", "SHLVL", "PWD", "OLDPWD", "HOME", "USER", "LOGNAME", "NBAGENT_SLOT", "JUPYTER_RUNTIME_DIR", assets.VARIABLE,
))
# The end of the script: the shell becomes the image's Python, which sends its environment. Two NULs end it, because
# a process that the script has started may hold the pipe open.
_LAST_LINE = '\nexec "$0" "$@"'
_SEND = "import os, sys; os.write(int(sys.argv[1]), b''.join(b'%s=%s\\0' % v for v in os.environb.items()) + b'\\0')"
_FAILED_STATUS, _NOT_EXECUTED_STATUS = 1, 127


class ActivationFailed(Exception):
    """The script has not ended as it has to. The text is for the operator."""


def environment_after(script: str, python: str, uid: Optional[int] = None) -> Dict[str, str]:
    """The environment after the script; with a `uid` the script runs as that user, and what it leaves behind is killed.

    Raises ActivationFailed, OSError.
    """
    read_fd, write_fd = os.pipe()
    shell = next((path for path in SHELLS if os.access(path, os.X_OK)), SHELLS[-1])
    # Python's own dump must not be affected by variables such as PYTHONHOME.
    command = [shell, "-c", script + _LAST_LINE, python, "-I", "-S", "-c", _SEND, str(write_fd)]
    pid = os.fork()
    if pid == 0:
        _run(command, write_fd, uid)
    os.close(write_fd)
    try:
        with open(read_fd, "rb", buffering=0):
            sent = _receive(read_fd, time.monotonic() + TIMEOUT_S)
    except ActivationFailed as error:
        _kill(pid, uid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        raise ActivationFailed(f"{error}; its shell ended with status {status}") from None
    _kill(pid, uid)
    os.waitpid(pid, 0)
    return _parsed(sent)


def _run(command: List[str], write_fd: int, uid: Optional[int]) -> NoReturn:
    """The child: a shell with no descriptor but the standard streams and the pipe."""
    try:
        os.setsid()
        os.closerange(3, write_fd)
        os.closerange(write_fd + 1, plan.OPEN_FILES)
        os.set_inheritable(write_fd, True)
        if uid is not None:
            Unprivileged(uid, plan.FORKING).do()
        _exec(command, os.environ)
    except OSError as error:
        print(f"activate: {command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(_NOT_EXECUTED_STATUS)


def _exec(command: List[str], environment: Mapping[str, str]) -> NoReturn:
    # Ignored by Python only, and kept ignored by execve(2).
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(command[0], command, environment)


def _receive(read_fd: int, until_s: float) -> bytes:
    """The bytes before the two NULs at the end. Raises ActivationFailed."""
    sent = b""
    while not sent.endswith(b"\0\0"):
        if not select.select([read_fd], [], [], max(0.0, until_s - time.monotonic()))[0]:
            raise ActivationFailed(f"the script activate of the manifest has not ended in {TIMEOUT_S:.0f} s")
        more = os.read(read_fd, ENVIRONMENT_MAX_BYTES)
        if not more:
            raise ActivationFailed("the script activate of the manifest ended before its last line")
        sent += more
        if len(sent) > ENVIRONMENT_MAX_BYTES:
            raise ActivationFailed(
                "the environment after the script activate of the manifest is larger than"
                f" {ENVIRONMENT_MAX_BYTES} bytes"
            )
    return sent[:-2]


def _parsed(sent: bytes) -> Dict[str, str]:
    pairs = (os.fsdecode(entry).partition("=") for entry in sent.split(b"\0"))
    return {name: value for name, _, value in pairs if _NAME.fullmatch(name) and name not in KEPT}


def _kill(pid: int, uid: Optional[int]) -> None:
    """Ends the script: as its user, because a zygote may send a signal to no other; or its own process group."""
    if uid is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return
    killer = os.fork()
    if killer == 0:
        with contextlib.suppress(BaseException):
            Unprivileged(uid, plan.FORKING).do()
            # All processes that this user may send it to, which are the script's, except for the caller.
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(killer, 0)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> List[str]:
    """The names of variables that the script has set, changed or removed."""
    names = {name for name in (*before, *after) if before.get(name) != after.get(name)}
    return sorted(name for name in names if _NAME.fullmatch(name) and name not in KEPT)


def values(arguments: Iterable[str], environment: Mapping[str, str]) -> Dict[str, Optional[str]]:
    """The variables of a zygote's ACTIVATED_OPTION: their values in its environment, None for one that is removed."""
    found = [argument[len(ACTIVATED_OPTION):] for argument in arguments if argument.startswith(ACTIVATED_OPTION)]
    return {name: environment.get(name) for names in found for name in names.split(",") if name}


def apply(variables: Mapping[str, Optional[str]], environment: Dict[str, str]) -> None:
    """Gives a slot's environment these variables."""
    for name, value in variables.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value


def main() -> NoReturn:
    """Runs the script, and becomes the program."""
    script, command = sys.argv[1], sys.argv[2:]
    in_zygote = os.getuid() == 0
    before = dict(os.environ)
    try:
        if in_zygote:
            # The script's user has to be able to write to its home. No other process is in this root.
            os.chmod(before["HOME"], 0o777)
        made = environment_after(script, command[0], ZYGOTE_SCRIPT_UID if in_zygote else None)
    except (ActivationFailed, OSError, KeyError) as error:
        _fail(Failure.of(error, STEP) if isinstance(error, OSError) else Failure(STEP, 0, str(error)), in_zygote)
    if in_zygote:
        os.chmod(before["HOME"], 0o700)
        if names := changed(before, made):
            command.append(ACTIVATED_OPTION + ",".join(names))
    # Python has made no descriptor that it inherited close on exec.
    _exec(command, {**made, **{name: value for name, value in before.items() if name in KEPT}})


def _fail(failure: Failure, in_zygote: bool) -> NoReturn:
    print(failure, flush=True)
    if in_zygote:
        with contextlib.suppress(OSError):
            Channel.from_fd(CONTROL_FD).send(failure.save())
    os._exit(_FAILED_STATUS)


if __name__ == "__main__":
    main()
