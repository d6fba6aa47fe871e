# SPDX-License-Identifier: BSD-3-Clause
"""The launcher of a slot by exec: one process that turns itself into the slot's init and program.

    python3 -I -m nbagent.runtime.exec_slot CONTROL_FD

Its first instruction runs in the slot's scope already, so that all memory it touches is charged to the slot. Over the
control channel it receives {"spec": SandboxSpec, "fds": ["listen", "activity", "config"]}, and reports as
`slot_process` describes.

It becomes three generations. This process enters the user namespace and the others, forks, and exits. Its child is the
first process of the pid namespace: it builds the root, forks the slot's program, and stays as `init`; the kernel kills
all others when it ends. The grandchild drops its privileges and execs. A program that cannot take a listening socket
has a sibling, as unprivileged, that forwards to its port.

Not for: the supervisor's decisions; slots that are forked (`zygote_service`).
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from typing import NoReturn

from nbagent.core.events import Event
from nbagent.linux import journal
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime import init, port_forward
from nbagent.runtime.slot_process import FREE_FD, become_init, move_fd, output_pipe, place_fds, run
from nbagent.sandbox.plan import OPEN_FILES, Plan, plan
from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD, SandboxSpec
from nbagent.wire import fields
from nbagent.wire.channel import Channel, report_failure


def main() -> NoReturn:
    """Runs in the slot's scope, as root of the host; never returns."""
    passed_fd = int(sys.argv[1])
    control = Channel.from_fd(fcntl.fcntl(passed_fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD))
    report_failure(control, "exec", lambda: _outside(control, passed_fd))


def _outside(control: Channel, passed_fd: int) -> NoReturn:
    if (request := control.receive()) is None:  # the supervisor has ended
        os._exit(0)
    spec = SandboxSpec.restore(fields.mapping(request.body, "spec"))
    # The launch service has a lower score, because the OOM killer has to choose a process of a slot. With
    # CAP_SYS_RESOURCE this value becomes the lowest that the slot can set (oom_score_adj_min).
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    stream = move_fd(journal.stream(spec.slot, f"nbagent-{spec.slot}.scope").detach())
    entries = move_fd(journal.entries().detach())
    printed, print_fd = output_pipe(spec)
    place_fds(print_fd, [request.take(name) for name in ("listen", "activity", "config")])
    os.closerange(CONFIG_FD + 1, FREE_FD)
    # In a supervisor of many slots its number is higher. It is inheritable, so exec would not close it.
    if passed_fd >= FREE_FD:
        os.close(passed_fd)
    output = init.Output(
        Event.SLOT_OUTPUT_DROPPED, {"slot": spec.slot}, printed, socket.socket(fileno=stream),
        socket.socket(fileno=entries), spec.slot,
    )
    steps = plan(spec)
    run(steps.outside)
    # Before the fork, because the child soon changes the root of both.
    netns = {} if spec.uplink is None else {"netns": os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)}
    pid = os.fork()
    if pid == 0:
        for fd in netns.values():
            os.close(fd)
        report_failure(
            control, "exec", lambda: become_init(control, spec, steps, output, lambda: _start(control, spec, steps))
        )
    control.send({}, {"init": os.pidfd_open(pid)})
    if netns:
        control.send({}, netns)
    os._exit(0)


def _start(control: Channel, spec: SandboxSpec, steps: Plan) -> init.Program:
    pid = os.fork()
    if pid == 0:
        report_failure(control, "exec", lambda: _program(spec, steps))
    forwarder = 0
    if spec.port and (forwarder := os.fork()) == 0:
        report_failure(control, "exec", lambda: _forward(spec, steps))
    return init.Program(pid, forwarder)


def _forward(spec: SandboxSpec, steps: Plan) -> NoReturn:
    run(steps.last)
    prctl(PR_SET_DUMPABLE, 0)
    # systemd sends SIGTERM to every process of a scope; this one has to stay as long as the program does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Among them are the control channel and init's journal sockets.
    os.closerange(CONFIG_FD, OPEN_FILES)
    try:
        port_forward.serve(LISTEN_FD, spec.port, ACTIVITY_FD, spec.listen_timeout_s)
    except BaseException as error:  # the process ends here, so nothing else could report it
        print(f"the slot's forwarder failed: {error!r}", flush=True)
    os._exit(1)


def _program(spec: SandboxSpec, steps: Plan) -> NoReturn:
    os.setsid()
    run(steps.last)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o022)
    os.chdir(spec.directory)
    for fd in (LISTEN_FD, ACTIVITY_FD, CONFIG_FD):
        os.set_inheritable(fd, not spec.port)
    os.execvpe(spec.command[0], spec.command, spec.environment)


if __name__ == "__main__":
    main()
