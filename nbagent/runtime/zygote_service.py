"""The keeper: makes an image's user namespace, starts its zygote there, and makes of each request a slot.

    python3 -I -m nbagent.runtime.zygote_service IMAGE:GENERATION       (nbagent-zygote@.service)

It is our code under the host's Python; of an image it runs nothing. It connects to the supervisor
(ZYGOTE_PATH, SOCK_SEQPACKET), says {"unit": IMAGE:GENERATION}, and is sent {"spec": SandboxSpec of the
zygote, "preload": [modules]}. When the zygote is ready it answers {"ready": true}. Then each packet is
the SandboxSpec of a slot, with six descriptors beside it: the slot's control socket, its listening
socket, the activity page, the configuration, a stream to the journal and a pipe. What comes of it is said over the
slot's own control socket, as `making` has it.

Two processes are forked for a slot, and touch nothing before they are in its scope. The keeper's
child is the first process of a new pid namespace: it makes the other namespaces, builds the root and stays
as `init`. The zygote's child is born into that pid namespace, joins the rest, forks the program and stays as its
fork server.
They need not come into the scope together: the first hears at the control socket when it is, the other at the pipe.

The connection is its life: when the supervisor ends or is done with it, it ends, and the zygote with it.
Slots do not: nothing of theirs is in its unit or under its processes. A zygote that does not
fork within FORK_TIMEOUT_S is given up; then too the keeper ends.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

from nbagent.linux import journal
from nbagent.linux import namespaces as ns
from nbagent.linux.process import PR_SET_DUMPABLE, drop_bounding_set, last_capability, prctl
from nbagent.runtime import init
from nbagent.runtime.slot_process import (
    FREE_FD,
    PACKET_MAX_BYTES,
    StepFailed,
    become_init,
    forget_modules,
    move_fd,
    output_pipe,
    place_fds,
    report_failure,
    run,
)
from nbagent.sandbox.plan import Plan, plan, zygote_plan
from nbagent.sandbox.spec import ACTIVITY_FD, SandboxSpec

ZYGOTE_PATH = "/run/nbagent/zygote.sock"
# A fork takes the kernel 2 ms; beside it a busy host may be slow to run the zygote at all.
FORK_TIMEOUT_S = 5.0
# Of the kernel's counts for each user, those that no resource limit bounds: what one slot may have. The host's own
# maximum is for all slots of an image together, so the package raises it (packaging/nbagent.sysctl).
USER_MAXIMA = {"max_inotify_instances": 128, "max_inotify_watches": 65536}
# What a slot's program joins, in this order: the mount namespace last, as /proc goes with it.
JOINED = ("ipc", "uts", "net", "cgroup", "mnt")
REQUEST_FDS = 6


class ZygoteGone(Exception):
    """The zygote ended, or does not answer."""


class ZygoteService:
    """One zygote, `pid`, and the requests for it. It owns its three sockets for as long as it lives."""

    def __init__(self, supervisor: socket.socket, entries: socket.socket, zygote: socket.socket, pid: int) -> None:
        self.supervisor, self.entries, self.zygote, self.pid = supervisor, entries, zygote, pid

    def begin(self, preload: List[str]) -> None:
        """Returns when the zygote is ready. Raises ZygoteGone."""
        ended, nowhere = fork_first(lambda: os._exit(0))
        try:
            socket.send_fds(self.zygote, [json.dumps({"preload": preload}).encode()], [nowhere])
        finally:
            os.close(ended)
            os.close(nowhere)
        answer, _ = self.answer()
        if "ready" not in answer:
            failed = answer.get("failed", "an answer that is none")
            raise ZygoteGone(f"{failed.get('step')}: {failed.get('text')}" if isinstance(failed, dict) else str(failed))

    def serve(self) -> None:
        """Until the supervisor or the zygote is gone."""
        waiting = select.poll()
        for end in (self.supervisor, self.zygote):
            waiting.register(end.fileno(), select.POLLIN)
        ended_fd = _told_of_children()
        waiting.register(ended_fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in waiting.poll()]
            if ended_fd in ready:
                os.read(ended_fd, 512)
                self._reap()
                if ready == [ended_fd]:
                    continue
            # Between requests a zygote has nothing to say but that it ends.
            if self.zygote.fileno() in ready:
                raise self._ended()
            payload, fds, _, _ = socket.recv_fds(self.supervisor, PACKET_MAX_BYTES, REQUEST_FDS)
            if not payload:
                return
            with contextlib.ExitStack() as stack:
                for fd in fds:
                    stack.callback(os.close, fd)
                self._make(SandboxSpec.restore(json.loads(payload)), fds)

    def _make(self, spec: SandboxSpec, fds: List[int]) -> None:
        control = socket.socket(fileno=os.dup(fds[0]))
        with control:
            try:
                self._fork(spec, control, fds)
            except (OSError, ZygoteGone) as error:
                report = {"step": "fork", "errno": getattr(error, "errno", 0) or 0, "text": str(error)}
                with contextlib.suppress(OSError):
                    control.send(json.dumps({"failed": report}).encode())
                if isinstance(error, ZygoteGone):
                    raise

    def _fork(self, spec: SandboxSpec, control: socket.socket, fds: List[int]) -> None:
        _, listen_fd, activity_fd, config_fd, stream_fd, go_fd = fds
        with contextlib.ExitStack() as stack:
            def owned(fd: int) -> int:
                stack.callback(os.close, fd)
                return fd

            def pair() -> Tuple[socket.socket, socket.socket]:
                ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                return stack.enter_context(ends[0]), stack.enter_context(ends[1])

            printed, print_fd = (owned(fd) for fd in output_pipe(spec))
            ours, theirs = pair()
            steps = plan(spec)

            def first() -> NoReturn:
                # Whoever waits at the other end of one of these is to see its end.
                for end in (self.supervisor, self.zygote, theirs):
                    end.close()
                for fd in (print_fd, go_fd):
                    os.close(fd)
                output = init.Output(spec.slot, printed, socket.socket(fileno=stream_fd), self.entries)
                _first(control, spec, steps, ours, activity_fd, output)

            first_fd, pidns = (owned(fd) for fd in fork_first(lambda: report_failure(control, first)))
            socket.send_fds(control, [json.dumps({"given": ["init"]}).encode()], [first_fd])
            passed = [pidns, theirs.fileno(), control.fileno(), go_fd, listen_fd, activity_fd, config_fd, print_fd]
            socket.send_fds(self.zygote, [json.dumps(program(spec)).encode()], passed)
            socket.send_fds(control, [json.dumps({"given": ["fork_server"]}).encode()], [owned(self._forked())])

    def _forked(self) -> int:
        """A pidfd of the process that the zygote has forked. Raises ZygoteGone, or OSError when it has ended."""
        answer, fds = self.answer(FORK_TIMEOUT_S)
        if "ended" in answer:
            raise ProcessLookupError(errno.ESRCH, "the slot's program ended before it was in its scope")
        if "failed" in answer or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise ZygoteGone(f"the zygote: {answer.get('failed', 'no process')}")
        return fds[0]

    def answer(self, timeout_s: Optional[float] = None) -> Tuple[Dict[str, Any], List[int]]:
        """The zygote's next packet. Raises ZygoteGone."""
        self.zygote.settimeout(timeout_s)
        try:
            payload, fds, _, _ = socket.recv_fds(self.zygote, PACKET_MAX_BYTES, 1)
        except TimeoutError:
            raise ZygoteGone(f"the zygote does not answer within {timeout_s:g} s") from None
        except ConnectionResetError:
            payload, fds = b"", []
        if not payload:
            raise self._ended()
        try:
            answer = json.loads(payload)
        except ValueError:
            answer = None
        return (answer if isinstance(answer, dict) else {"failed": "an answer that is none"}), list(fds)

    def _reap(self) -> None:
        """Takes in the first processes of slots that have ended. How the zygote does is for `_ended`."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid == self.pid:
                    return  # which is seen at its socket
                os.waitpid(ended.si_pid, 0)

    def _ended(self) -> ZygoteGone:
        """How a zygote has ended that holds its socket no more, and so soon will have."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return ZygoteGone(f"the zygote {how}")


def program(spec: SandboxSpec) -> Dict[str, Any]:
    """What the zygote has to know of a slot; its secrets are in the configuration, which the slot alone reads."""
    return {
        "uid": spec.uid, "directory": spec.directory, "environment": spec.environment,
        "syscall_filter": spec.forked_filter,
    }


def fork_first(first: Callable[[], NoReturn]) -> Tuple[int, int]:
    """Forks the first process of a new pid namespace, which runs `first`; its pidfd, and the namespace. Raises OSError.

    Whose children are born into another pid namespace cannot undo that, for want of a right over the host's. But
    namespaces are each thread's own, so a thread does it, and ends.
    """
    made: List[int] = []
    failures: List[OSError] = []
    over = _thread.allocate_lock()
    over.acquire()

    def fork() -> None:
        try:
            ns.unshare(ns.CLONE_NEWPID)
            pid = os.fork()
            if pid == 0:
                first()
            made.append(os.pidfd_open(pid))
            made.append(os.open("/proc/thread-self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            failures.append(error)
        finally:
            over.release()

    _thread.start_new_thread(fork, ())
    over.acquire()
    if failures:
        for fd in made:
            os.close(fd)
        raise failures[0]
    return made[0], made[1]


def _told_of_children() -> int:
    """A descriptor that can be read when a child has ended."""
    read_fd, write_fd = os.pipe()
    for fd in (read_fd, write_fd):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    # Without a handler of its own the signal would wake nobody.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return read_fd


def _first(
    control: socket.socket, spec: SandboxSpec, steps: Plan, sibling: socket.socket, activity_fd: int,
    output: init.Output,
) -> NoReturn:
    """The slot's first process; `sibling` leads to the one that will be its fork server, and to the program."""
    # The supervisor says when the slot's scope is around it.
    if not control.recv(PACKET_MAX_BYTES):
        os._exit(0)
    os.setsid()
    signal.set_wakeup_fd(-1)  # the keeper's
    control, sibling = _moved(control), _moved(sibling)
    output.stream, output.entries = _moved(output.stream), _moved(output.entries)
    with open("/dev/null") as null:
        for number in (0, 1, 2):
            os.dup2(null.fileno(), number)
    page = move_fd(activity_fd)
    os.closerange(3, FREE_FD)
    os.dup2(page, ACTIVITY_FD)
    os.close(page)
    run(steps.outside)
    joined = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in JOINED]
    if spec.uplink is not None:
        socket.send_fds(control, [json.dumps({"given": ["netns"]}).encode()], [joined[JOINED.index("net")]])

    def start() -> init.Program:
        # For the program and for its fork server, which share the other end.
        for _ in range(2):
            socket.send_fds(sibling, [b"root"], joined)
        for fd in joined:
            os.close(fd)
        return init.Program(fork_server=sibling)

    become_init(control, spec, steps, output, start)


def _moved(end: socket.socket) -> socket.socket:
    family, kind = end.family, end.type  # told, it does not ask the kernel
    return socket.socket(family, kind, 0, move_fd(end.detach()))


def _start_zygote(spec: SandboxSpec, steps: Plan) -> Tuple[socket.socket, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = os.fork()
        if pid == 0:
            ours.close()
            report_failure(theirs, lambda: _exec_zygote(theirs, spec, steps))
    return ours, pid


def _exec_zygote(control: socket.socket, spec: SandboxSpec, steps: Plan) -> NoReturn:
    os.setsid()
    output = os.dup(1)
    place_fds(output, [os.dup(control.fileno())])
    run(steps.outside[1:])
    forget_modules()
    run(steps.inside)
    # Its children have to know which process they fork from, and it itself which descriptors it has.
    run(steps.last)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.chdir(spec.directory)
    os.execvpe(spec.command[0], spec.command, spec.environment)


def main() -> int:
    """Runs as the service's main process. Returns the exit status."""
    supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    payload = b""
    # A supervisor that has ended meanwhile wants nothing any more.
    with contextlib.suppress(ConnectionError, FileNotFoundError):
        supervisor.connect(ZYGOTE_PATH)
        supervisor.send(json.dumps({"unit": sys.argv[1]}).encode())
        payload = supervisor.recv(PACKET_MAX_BYTES)
    if not payload:
        return 0
    asked = json.loads(payload)
    spec = SandboxSpec.restore(asked["spec"])
    # As root: journald believes nobody else which unit an entry is of.
    entries = journal.entries()
    steps = zygote_plan(spec)
    try:
        run(steps.outside[:1])
        for name, most in USER_MAXIMA.items():
            with open(f"/proc/sys/user/{name}", "w") as file:
                file.write(str(most))
        prctl(PR_SET_DUMPABLE, 0)
        keeper = ZygoteService(supervisor, entries, *_start_zygote(spec, steps))
        keeper.begin(asked["preload"])
        # Nothing of it is to be had by what is forked from here on: 41 calls fewer for each.
        drop_bounding_set(range(last_capability() + 1))
        # Nor will it import anything, which each init would see to in a copy of its own: 50 pages.
        forget_modules()
        gc.collect()
        gc.freeze()
        supervisor.send(json.dumps({"ready": True}).encode())
        keeper.serve()
    except (OSError, StepFailed, ZygoteGone) as error:
        text = f"{error}: {error.__cause__}" if isinstance(error, StepFailed) else str(error)
        print(f"zygote {sys.argv[1]}: {text}", flush=True)
        try:
            supervisor.send(json.dumps({"failed": {"step": "zygote", "errno": 0, "text": text}}).encode())
        except OSError:
            return 0  # nobody wants it any more
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
