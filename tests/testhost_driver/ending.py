# SPDX-License-Identifier: BSD-3-Clause
"""An end by SIGINT, SIGTERM or SIGHUP removes what this process has made: hosts and the networks between them.

The signal raises KeyboardInterrupt in the main thread, once, so that `finally` and fixtures clean up as after an
interrupt from the terminal. At the end of the interpreter the rest is removed, such as a host that another thread made.
A host that is to outlive the process (`keep`) stays, and is named.

A shell without job control ignores SIGINT for a process in the background; it is taken there too. An ignored SIGHUP
stays ignored, because a process under nohup(1) is to survive it. SIGKILL leaves everything; `testhost list` shows it.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType


@dataclass
class _Process:
    """The hosts and networks that this process has made, by their names in messages.

    `made` has the function that removes each, `kept` the command that removes one that outlives the process. A child by
    fork has a copy, with the `pid` of its parent.
    """

    pid: int = field(default_factory=os.getpid)
    made: dict[str, Callable[[], object]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    received: int = 0


_own = _Process()


def made(what: str, remove: Callable[[], object]) -> None:
    """Notes that this process makes `what`, and takes the signals from now on. `remove` may find it incomplete."""
    _own.made[what] = remove
    take_signals()


def gone(what: str) -> None:
    """`what` has been removed."""
    _own.made.pop(what, None)
    _own.kept.pop(what, None)


def keep(what: str, command: str) -> None:
    """`what` outlives this process; `command` removes it."""
    if _own.made.pop(what, None) is not None:
        _own.kept[what] = command


def is_ending() -> bool:
    """Whether a signal has been received, so that only removal makes sense."""
    return bool(_own.received)


def status() -> int:
    """The exit status of a program that a signal has ended, as a shell has it."""
    return 128 + (_own.received or signal.SIGINT)


def take_signals() -> None:
    """Takes the signals for which the program has no handler. Only the main thread can; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        is_ignored = handler is signal.SIG_IGN and number == signal.SIGINT
        if handler in (signal.SIG_DFL, signal.default_int_handler) or is_ignored:
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _own.pid:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    name = signal.Signals(number).name
    if _own.received:
        _say(f"{name}: the removal goes on")
        return
    _own.received = number
    _say(f"{name}: removing {', '.join(_own.made)}" if _own.made else f"{name}: ending")
    # Of this very class, because the interpreter then ends by SIGINT, which a calling shell understands.
    raise KeyboardInterrupt(name)


@atexit.register
def _remove_rest() -> None:
    """Runs after the other threads have ended."""
    if os.getpid() != _own.pid or not _own.received:
        return
    for what, remove in list(_own.made.items()):
        try:
            remove()
            _say(f"{what} is removed")
        except Exception as error:  # the others must be removed too
            _say(f"{what} is left, because its removal failed: {error}")
    for what, command in _own.kept.items():
        _say(f"{what} stays; `{command}` removes it")


def _say(text: str) -> None:
    # Not by sys.stderr, whose buffer a signal handler cannot enter a second time.
    os.write(2, f"testhost: {text}\n".encode())
