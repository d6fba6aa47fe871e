"""The launcher: one process that turns itself into a slot whose program is exec'd.

    python3 -I -m nbagent.runtime.exec_slot CONTROL_FD LISTEN_FD ACTIVITY_FD CONFIG_FD

Its first instruction runs in the slot's scope already, so all it ever touches is charged to the
slot. Over CONTROL_FD it receives the SandboxSpec, and answers as `making` says.

It becomes three generations. This process enters the user namespace and the others, forks, and
ends. Its child is the first process of the pid namespace: it builds the root, forks the slot's
program, and stays as `init`; the kernel kills all others when it ends. The grandchild loses its
privileges and execs. A program that cannot be handed a socket has a sibling, as unprivileged, that
forwards to its port.

Not for: anything the supervisor decides; slots that are forked (`zygote_service`).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from typing import List, NoReturn

from nbagent.linux import journal
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime import init, port_forward
from nbagent.runtime.slot_process import (
    FREE_FD,
    PACKET_MAX_BYTES,
    become_init,
    move_fd,
    output_pipe,
    place_fds,
    report_failure,
    run,
)
from nbagent.sandbox.plan import OPEN_FILES, Plan, plan
from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD, SandboxSpec


def main() -> NoReturn:
    """Runs in the slot's scope, as root of the host; never returns."""
    passed = [int(number) for number in sys.argv[1:5]]
    control = socket.socket(fileno=fcntl.fcntl(passed[0], fcntl.F_DUPFD_CLOEXEC, FREE_FD))
    spec = SandboxSpec.restore(json.loads(control.recv(PACKET_MAX_BYTES)))
    report_failure(control, lambda: _outside(control, spec, passed))


def _outside(control: socket.socket, spec: SandboxSpec, passed: List[int]) -> NoReturn:
    # The supervisor is the last to go when memory ends; a slot is as good as any other process.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    stream = move_fd(journal.stream(spec.slot, f"nbagent-{spec.slot}.scope").detach())
    entries = move_fd(journal.entries().detach())
    printed, print_fd = output_pipe(spec)
    place_fds(print_fd, passed[1:])
    os.closerange(CONFIG_FD + 1, FREE_FD)
    # A supervisor of many slots has higher numbers. They were passed as they are: exec would not close them.
    if passed[0] >= FREE_FD:
        os.close(passed[0])
    output = init.Output(spec.slot, printed, socket.socket(fileno=stream), socket.socket(fileno=entries))
    steps = plan(spec)
    run(steps.outside)
    # Before the fork: the child soon moves the root of both.
    netns = [] if spec.uplink is None else [os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)]
    pid = os.fork()
    if pid == 0:
        for fd in netns:
            os.close(fd)
        report_failure(control, lambda: become_init(control, spec, steps, output, lambda: _start(control, spec, steps)))
    socket.send_fds(control, [json.dumps({"given": ["init"]}).encode()], [os.pidfd_open(pid)])
    if netns:
        socket.send_fds(control, [json.dumps({"given": ["netns"]}).encode()], netns)
    os._exit(0)


def _start(control: socket.socket, spec: SandboxSpec, steps: Plan) -> init.Program:
    pid = os.fork()
    if pid == 0:
        report_failure(control, lambda: _program(spec, steps))
    forwarder = 0
    if spec.port and (forwarder := os.fork()) == 0:
        report_failure(control, lambda: _forward(spec, steps))
    return init.Program(pid, forwarder)


def _forward(spec: SandboxSpec, steps: Plan) -> NoReturn:
    run(steps.last)
    prctl(PR_SET_DUMPABLE, 0)
    # systemd asks every process of a scope to end; this one stays as long as the program does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # The control socket and init's way to the journal among them.
    os.closerange(CONFIG_FD, OPEN_FILES)
    try:
        port_forward.serve(LISTEN_FD, spec.port, ACTIVITY_FD, spec.listen_timeout_s)
    except BaseException as error:  # the process ends here; nothing may be lost
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
