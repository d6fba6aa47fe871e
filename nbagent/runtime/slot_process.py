"""What all who make a sandbox share: running steps, placing descriptors, telling what failed, and the life of a
slot's first process from its namespaces to the loop of `init`.

Over its control socket (SOCK_SEQPACKET) the supervisor hears

    {"given": [name, ...]}     with a descriptor for each name beside it: pidfds of the processes that belong into the
                               slot's scope, "init" and, of a slot by fork, "fork_server"; "netns" of a slot with an
                               interface, answered by {"attached": true} when that is there
    {"serves": true}           from a program that was forked: its loop turns, and what it answers with was rehearsed
    {"failed": {"step": str, "errno": int, "text": str}}
    end of file                the slot's program runs: every process that held the socket is done with it

Standard library only, and little of it: this is memory of every slot. Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from typing import Any, Callable, Dict, Iterable, List, NoReturn, Tuple

from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime import init
from nbagent.sandbox.plan import Plan
from nbagent.sandbox.spec import CONFIG_FD, LISTEN_FD, SandboxSpec
from nbagent.sandbox.steps import Step

PACKET_MAX_BYTES = 65536
# Above every number that a slot's process knows; what must get out of the way goes here.
FREE_FD = 64


class StepFailed(Exception):
    """A step that the kernel refused; the cause is the OSError."""


def run(steps: Iterable[Step]) -> None:
    """Does the steps in order. Raises StepFailed."""
    for step in steps:
        try:
            step.do()
        except OSError as error:
            raise StepFailed(step.describe()) from error


def report_failure(control: socket.socket, action: Callable[[], Any]) -> NoReturn:
    """Runs `action`, which does not return; whatever it raises goes back over `control`."""
    report: Dict[str, Any] = {"step": "exec", "errno": 0, "text": "returned"}
    try:
        action()
    except StepFailed as failed:
        cause = failed.__cause__
        report = {"step": str(failed), "errno": getattr(cause, "errno", 0) or 0, "text": str(cause)}
    except OSError as error:
        report = {"step": "exec", "errno": error.errno or 0, "text": str(error)}
    except BaseException as error:  # the process ends here; nothing may be lost
        report = {"step": "launch", "errno": 0, "text": repr(error)}
    with contextlib.suppress(OSError):
        control.send(json.dumps({"failed": report}).encode())
    os._exit(1)


def forget_modules() -> None:
    """What is not imported by now never will be: after a pivot it would be the image's."""
    sys.path.clear()
    sys.path_importer_cache.clear()


def move_fd(fd: int) -> int:
    """Moves a descriptor out of the way of placed ones."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD)
    os.close(fd)
    return moved


def place_fds(output_fd: int, fds: List[int]) -> None:
    """Puts every descriptor at its number: standard streams, then those of `spec`. Closes them elsewhere."""
    with open("/dev/null") as null:
        wanted = (null.fileno(), output_fd, output_fd, *fds)
        # First out of the way of each other, then in place; dup2 clears close-on-exec.
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD) for fd in wanted]
    for fd in {output_fd, *fds}:
        os.close(fd)
    for number, fd in enumerate(moved):
        os.dup2(fd, number)
        os.close(fd)


def output_pipe(spec: SandboxSpec) -> Tuple[int, int]:
    """What the slot prints goes into a pipe; init alone holds the journal, at its other end."""
    printed, print_fd = os.pipe()
    # Who opens /dev/stdout opens this pipe anew, and needs to be allowed to.
    os.fchown(print_fd, spec.uid if spec.forked else spec.id_base + spec.uid, -1)
    return move_fd(printed), move_fd(print_fd)


def become_init(
    control: socket.socket, spec: SandboxSpec, steps: Plan, output: init.Output,
    start: Callable[[], init.Program],
) -> NoReturn:
    """From the first process of a pid namespace, in the other namespaces, to a slot's init.

    `start` makes the program run once the root is there.
    """
    forget_modules()
    run(steps.inside)
    # The supervisor had the interface made while the root was built.
    if steps.connected:
        control.recv(PACKET_MAX_BYTES)
    run(steps.connected)
    program = start()
    for fd in (LISTEN_FD, CONFIG_FD):
        with contextlib.suppress(OSError):
            os.close(fd)
    for fd in (1, 2):
        os.dup2(output.stream.fileno(), fd)
    run(steps.last)
    control.close()  # not before: its own failure must be heard, as the program ends with it
    # The program has the same user id; it may not look into this process, nor trace it.
    prctl(PR_SET_DUMPABLE, 0)
    init.run(program, output)
