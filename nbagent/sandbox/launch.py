"""The launcher: one process that turns itself into a slot.

    python3 -I -m nbagent.sandbox.launch CONTROL_FD LISTEN_FD ACTIVITY_FD CONFIG_FD

Its first instruction runs in the slot's scope already, so all it ever touches is charged to the
slot. Over CONTROL_FD (SOCK_SEQPACKET) it receives the SandboxSpec, and answers

    {"init": true}             with a pidfd of the slot's first process beside it, and, for a slot with
                               an interface, a descriptor of its network namespace; then either
    {"failed": {"step": str, "errno": int, "text": str}}
    or end of file             the slot's program has been exec'd

For a slot with an interface it receives one packet more, {"attached": true}: the interface is there.

It becomes three generations. This process enters the user namespace and the others, forks, and
ends. Its child is the first process of the pid namespace: it builds the root, forks the slot's
program, and stays as `init`; the kernel kills all others when it ends. The grandchild loses its
privileges and execs. A program that cannot be handed a socket has a sibling, as unprivileged, that
forwards to its port.

Not for: anything the supervisor decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from typing import Any, Dict, Iterable, NoReturn

from nbagent.linux import journal
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.sandbox import forward, init
from nbagent.sandbox.plan import OPEN_FILES, Plan, plan
from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD, SandboxSpec
from nbagent.sandbox.steps import Step

SPEC_MAX_BYTES = 65536
# Above every number that a slot's process knows; what must get out of the way goes here.
FREE_FD = 64


class StepFailed(Exception):
    """A step that the kernel refused; the cause is the OSError."""


def main() -> NoReturn:
    """Runs in the slot's scope, as root of the host; never returns."""
    passed = [int(number) for number in sys.argv[1:5]]
    control = socket.socket(fileno=fcntl.fcntl(passed[0], fcntl.F_DUPFD_CLOEXEC, FREE_FD))
    spec = SandboxSpec.restore(json.loads(control.recv(SPEC_MAX_BYTES)))
    _guarded(control, lambda: _outside(control, spec, passed))


def _outside(control: socket.socket, spec: SandboxSpec, passed: list[int]) -> NoReturn:
    # The supervisor is the last to go when memory ends; a slot is as good as any other process.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    stream = _aside(journal.stream(spec.slot, f"nbagent-{spec.slot}.scope").detach())
    entries = _aside(journal.entries().detach())
    # What the slot prints goes into a pipe; init alone holds the journal, at its other end.
    printed, print_fd = (_aside(fd) for fd in os.pipe())
    # Who opens /dev/stdout opens this pipe anew, and needs to be allowed to.
    os.fchown(print_fd, spec.id_base + spec.uid, -1)
    _place(print_fd, passed[1:])
    os.closerange(CONFIG_FD + 1, FREE_FD)
    # A supervisor of many slots has higher numbers. They were passed as they are: exec would not close them.
    for fd in passed:
        if fd >= FREE_FD:
            os.close(fd)
    output = init.Output(spec.slot, printed, socket.socket(fileno=stream), socket.socket(fileno=entries))
    steps = plan(spec)
    _run(steps.outside)
    # Before the fork: the child soon moves the root of both.
    netns = [] if spec.uplink is None else [os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)]
    pid = os.fork()
    if pid == 0:
        for fd in netns:
            os.close(fd)
        _guarded(control, lambda: _inside(control, spec, steps, output))
    socket.send_fds(control, [json.dumps({"init": True}).encode()], [os.pidfd_open(pid), *netns])
    os._exit(0)


def _inside(control: socket.socket, spec: SandboxSpec, steps: Plan, output: init.Output) -> NoReturn:
    # What is not imported by now must never be: after the pivot it would be the image's.
    sys.path.clear()
    sys.path_importer_cache.clear()
    _run(steps.inside)
    # The supervisor had the interface made while the root was built.
    if steps.connected:
        control.recv(SPEC_MAX_BYTES)
    _run(steps.connected)
    pid = os.fork()
    if pid == 0:
        _guarded(control, lambda: _program(spec, steps))
    forwarder = 0
    if spec.port and (forwarder := os.fork()) == 0:
        _guarded(control, lambda: _forward(spec, steps))
    os.close(LISTEN_FD)
    os.close(CONFIG_FD)
    for fd in (1, 2):
        os.dup2(output.stream.fileno(), fd)
    _run(steps.last)
    control.close()  # not before: its own failure must be heard, as the program ends with it
    # The program has the same user id; it may not look into this process, nor trace it.
    prctl(PR_SET_DUMPABLE, 0)
    init.run(pid, output, forwarder)


def _forward(spec: SandboxSpec, steps: Plan) -> NoReturn:
    _run(steps.last)
    prctl(PR_SET_DUMPABLE, 0)
    # systemd asks every process of a scope to end; this one stays as long as the program does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # The control socket and init's way to the journal among them.
    os.closerange(CONFIG_FD, OPEN_FILES)
    try:
        forward.serve(LISTEN_FD, spec.port, ACTIVITY_FD, spec.listen_timeout_s)
    except BaseException as error:  # the process ends here; nothing may be lost
        print(f"the slot's forwarder failed: {error!r}", flush=True)
    os._exit(1)


def _program(spec: SandboxSpec, steps: Plan) -> NoReturn:
    os.setsid()
    _run(steps.last)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    os.chdir(spec.directory)
    for fd in (LISTEN_FD, ACTIVITY_FD, CONFIG_FD):
        os.set_inheritable(fd, not spec.port)
    os.execvpe(spec.command[0], spec.command, spec.environment)


def _run(steps: Iterable[Step]) -> None:
    for step in steps:
        try:
            step.do()
        except OSError as error:
            raise StepFailed(step.describe()) from error


def _place(output_fd: int, fds: list[int]) -> None:
    """Puts every descriptor at its number: standard streams, then those of `spec`."""
    with open("/dev/null") as null:
        wanted = (null.fileno(), output_fd, output_fd, *fds)
        # First out of the way of each other, then in place; dup2 clears close-on-exec.
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD) for fd in wanted]
    for number, fd in enumerate(moved):
        os.dup2(fd, number)
        os.close(fd)
    os.close(output_fd)


def _aside(fd: int) -> int:
    """Moves a descriptor out of the way of placed ones."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD)
    os.close(fd)
    return moved


def _guarded(control: socket.socket, action: Any) -> NoReturn:
    """Runs `action`, which does not return; whatever it raises goes back to the supervisor."""
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


if __name__ == "__main__":
    main()
