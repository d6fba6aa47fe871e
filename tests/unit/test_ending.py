# SPDX-License-Identifier: BSD-3-Clause
"""A signal that ends a program with test hosts first removes what the program has made."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
BEGIN = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from testhost_driver import ending
def made(name):
    ending.made(name, lambda: (print("removed", name, flush=True), ending.gone(name)))
"""
READY = "print('ready', flush=True)\n"
# Not by pause(), which a signal just before it does not end.
WAIT = READY + "while True: time.sleep(0.01)\n"


def ended(program: str, *numbers: int, ignored: str = "") -> tuple[int, str]:
    """The status of a program that got these signals when it was ready, one for each time, and its output after that.

    `ignored` are signals that it ignores from the beginning."""
    # The alarm ends a program that no signal has ended.
    program = f"import signal; signal.alarm(60){BEGIN}{program}"
    argv = ["/bin/sh", "-c", f"trap '' {ignored or 'USR1'}; exec \"$@\"", "sh", "/usr/bin/python3", "-c", program]
    with subprocess.Popen([*argv, TESTS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for number in numbers:
            while (line := process.stdout.readline()) != "ready\n":
                assert line
            process.send_signal(number)
        text = process.stdout.read()
    return process.returncode, text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_runs_the_clean_up_of_the_program_and_removes_the_rest(number) -> None:
    program = "made('a'); made('b')\ntry:\n    " + WAIT.replace("\n", "\n    ") + "\nfinally:\n    ending.gone('a')"
    status, text = ended(program, number)
    assert status == -signal.SIGINT
    assert f"{number.name}: removing a, b" in text and "b is removed" in text and "removed a" not in text


def test_an_interrupt_is_taken_in_the_background_and_a_hangup_under_nohup_is_not() -> None:
    status, text = ended("made('a')\n" + READY + "signal.sigtimedwait([signal.SIGUSR2], 0.2)\n" + WAIT, signal.SIGHUP,
                         signal.SIGINT, ignored="HUP INT")
    assert status == -signal.SIGINT and "SIGHUP" not in text and "SIGINT: removing a" in text


def test_a_second_signal_does_not_interrupt_the_removal() -> None:
    program = "made('a')\ntry:\n    signal.raise_signal(2)\nfinally:\n    signal.raise_signal(15); print('done')"
    status, text = ended(program)
    assert status == -signal.SIGINT and "SIGTERM: the removal goes on\ndone" in text and "a is removed" in text


def test_what_is_kept_is_named_with_the_command_that_removes_it() -> None:
    _, text = ended("made('a'); ending.keep('a', 'down a')\n" + WAIT, signal.SIGTERM)
    assert "a stays; `down a` removes it" in text and "removed a" not in text


def test_a_child_by_fork_ends_and_removes_nothing() -> None:
    # Python drops a signal that arrives before the child has begun, so the child writes first.
    program = """made('a')
ready, write = os.pipe()
if not (pid := os.fork()):
    os.write(write, b"x")
    while True: time.sleep(0.01)
os.read(ready, 1)
os.kill(pid, 15)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    status, text = ended(program)
    assert (status, text) == (0, "-15\n")


def test_without_a_signal_nothing_is_removed() -> None:
    assert ended("made('a')") == (0, "")
