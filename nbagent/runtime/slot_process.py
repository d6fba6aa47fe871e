# SPDX-License-Identifier: BSD-3-Clause
"""The common parts of processes that make a sandbox: running steps, placing descriptors, and the life of a slot's first
process from its namespaces to the loop of `init`.

Over a slot's control channel (nbagent.wire.channel) the supervisor receives

    {"fds": ["init"]}          a pidfd of the slot's first process
    {"fds": ["fork_server"]}   of a slot by fork, a pidfd of its fork server; both belong into the slot's scope
    {"fds": ["netns"]}         of a slot with an interface, its network namespace; when the interface is made, the
                               supervisor sends {"attached": true}
    {"serves": true}           from a program that was forked: its loop runs, and needs no probe
    {"failure": {...}}         nbagent.wire.failure
    end of file                the slot's program runs, because every process that held the channel has closed it

Standard library only, and little of it, because it is memory of every slot; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from typing import Callable, Iterable, List, NoReturn, Tuple

from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime import init
from nbagent.sandbox.plan import Plan
from nbagent.sandbox.spec import CONFIG_FD, LISTEN_FD, SandboxSpec
from nbagent.sandbox.steps import Step
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure, StepFailed

# Above every number that a slot's process knows; descriptors that have to move go here.
FREE_FD = 64
# The namespaces that the fork server and the program of a slot by fork join, in this order: the mount namespace last,
# because it replaces /proc.
JOINED = ("ipc", "uts", "net", "cgroup", "mnt")


def run(steps: Iterable[Step]) -> None:
    """Does the steps in order. Raises StepFailed when the kernel refuses one."""
    for step in steps:
        try:
            step.do()
        except OSError as error:
            raise StepFailed(Failure.of(error, step.describe())) from error


def forget_modules() -> None:
    """Prevents any further import, because after a pivot it would load the image's modules."""
    sys.path.clear()
    sys.path_importer_cache.clear()


def move_fd(fd: int) -> int:
    """Moves a descriptor out of the way of placed ones."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD)
    os.close(fd)
    return moved


def place_fds(output_fd: int, fds: List[int]) -> None:
    """Moves every descriptor to its number: the standard streams, then LISTEN_FD and up."""
    with open("/dev/null") as null:
        wanted = (null.fileno(), output_fd, output_fd, *fds)
        # First to numbers that none of them has to get; dup2 clears close-on-exec.
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD) for fd in wanted]
    for fd in {output_fd, *fds}:
        os.close(fd)
    for number, fd in enumerate(moved):
        os.dup2(fd, number)
        os.close(fd)


def output_pipe(spec: SandboxSpec) -> Tuple[int, int]:
    """The pipe for the output of the slot's processes: init's end, and theirs. Only init holds the journal."""
    printed, print_fd = os.pipe()
    # A process that opens /dev/stdout opens this pipe anew, which takes a permission.
    os.fchown(print_fd, spec.uid if spec.forked else spec.id_base + spec.uid, -1)
    return move_fd(printed), move_fd(print_fd)


def become_init(
    control: Channel, spec: SandboxSpec, steps: Plan, output: init.Output,
    start: Callable[[], init.Program],
) -> NoReturn:
    """Turns the first process of a pid namespace, which is in the other namespaces, into a slot's init.

    `start` starts the program when the root is complete.
    """
    forget_modules()
    run(steps.inside)
    # The interface is made while the root is built. No message: the supervisor has ended.
    if steps.connected and (message := control.receive()) is not None:
        message.close()
    run(steps.connected)
    program = start()
    for fd in (LISTEN_FD, CONFIG_FD):
        with contextlib.suppress(OSError):
            os.close(fd)
    for fd in (1, 2):
        os.dup2(output.stream.fileno(), fd)
    run(steps.last)
    # Only after the last step, because init's failure ends the program and has to be reported.
    control.close()
    # The program has the same user id, and may neither trace this process nor read its /proc.
    prctl(PR_SET_DUMPABLE, 0)
    init.run(program, output)
