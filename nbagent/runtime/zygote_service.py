# SPDX-License-Identifier: BSD-3-Clause
"""The zygote service: makes an image's user namespace, starts its zygote there, and makes a slot for each request.

    python3 -I -m nbagent.runtime.zygote_service IMAGE:GENERATION       (nbagent-zygote@.service)

It is host code under the host's Python; it runs no code of an image. Its messages (nbagent.wire.channel):

    service → supervisor  {"unit": IMAGE:GENERATION}                          on ZYGOTE_PATH
    supervisor → service  {"spec": SandboxSpec of the zygote, "preload": [modules],
                          "extensions_after_fork": [names], "identity": object}
    service → supervisor  {"ready": true, "notes": [texts]} or a failure
    supervisor → service  {"describe": text}, from a supervisor that follows the one that started the zygote
    service → supervisor  {"described": text, "identity": object, "age_s": int, "forks": int, "outdated": bool};
                          "outdated" is true when libraries of the service were replaced since; it may be missing
    supervisor → service  {"spec": SandboxSpec, "fds": ["control", "listen", "activity", "config", "stream", "go"]}
                          for each slot: its control channel, its listening socket, the activity page, the
                          configuration, a stream to the journal, and a pipe. The result goes over the control channel
                          (`slot_process`).

    service → zygote      {"preload": [modules], "extensions_after_fork": [names], "left_out": {module: reason},
                          "fds": ["nowhere"]}                                 a pid namespace that allows no more births
    zygote → service      {"imports": module} before the import of each module to preload, "" after the last
    zygote → service      {"ready": true, "notes": [texts]} or a failure; the notes are what it left out, and why
    service → zygote      {"slot": `program`, "fds": ["pidns", "init", "control", "go", "listen", "activity", "config",
                          "output"]}                                          for each slot
    zygote → service      {"fds": ["fork_server"]}, a pidfd; {"ended": true} when that process has ended already; or a
                          failure

    init → fork server, program    {"fds": JOINED}, once each, when the slot's root is complete
    fork server → init             {"program": pid}; {"exited": status}

Two processes are forked for a slot, and touch no memory before they are in its scope. The service's child is the first
process of a new pid namespace: it makes the other namespaces, builds the root and stays as `init`. The zygote's child
is born into that pid namespace, joins the rest, forks the program and stays as its fork server. They need not enter the
scope together: the first waits for a packet at the control channel, the other for bytes in the pipe. Neither is a
message, because to parse one touches memory.

When the connection is closed, the service ends, and the zygote with it. systemd keeps it open while the supervisor
restarts (`nbagent.supervisor.fd_store`). Slots go on, because none of their processes is in the service's unit or ends
with its parent. A zygote that does not fork within FORK_TIMEOUT_S
has failed; then the service ends too. So it does when the kernel's facts about the zygote are not those of an honest
one (`zygote_inspection`), because a zygote runs an image's code. Its output is copied to the journal within a budget,
as a slot's is.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import time
from typing import Callable, Dict, List, Mapping, NoReturn, Optional, Tuple

from nbagent.core.events import Event
from nbagent.linux import journal
from nbagent.linux import namespaces as ns
from nbagent.linux.process import PR_SET_DUMPABLE, drop_bounding_set, last_capability, prctl, runs_replaced_files
from nbagent.runtime import init
from nbagent.runtime.slot_process import (
    FREE_FD,
    JOINED,
    become_init,
    forget_modules,
    move_fd,
    output_pipe,
    place_fds,
    run,
)
from nbagent.runtime.zygote_inspection import INTERVAL_S, SETTLE_S, Inspection, Sleep, check_fork
from nbagent.sandbox.plan import Plan, plan, zygote_plan
from nbagent.sandbox.spec import ACTIVITY_FD, SandboxSpec
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message, report_failure
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

ZYGOTE_PATH = "/run/nbagent/zygote.sock"
# The messages between supervisor and service. A supervisor adopts only zygotes that were started with the same value.
# It changes with each change of a message or of a field's meaning.
PROTOCOL = "1 " + " ".join(SandboxSpec._fields)
# SYSLOG_IDENTIFIER of what a zygote prints.
ZYGOTE_IDENTIFIER = "nbagent-zygote"
# As that of nbagent-launch.service.
OOM_SCORE_ADJ = -800
# A fork takes the kernel 2 ms, but a busy host may schedule the zygote late.
FORK_TIMEOUT_S = 5.0
# An import that waits so long, for a network or a lock, does not end. One that computes uses up the start's budget.
IMPORT_ASLEEP_S = 30.0
LOOK_S = 1.0
NONE_LEFT_OUT: Mapping[str, str] = {}
# Per-user counts of the kernel that no resource limit bounds, for one slot. The host's own maximum is for all slots of
# an image together, so the package raises it (packaging/nbagent.sysctl).
USER_MAXIMA = {"max_inotify_instances": 128, "max_inotify_watches": 65536}


class ZygoteFailed(StepFailed):
    """The zygote ended, failed to start, or does not respond."""

    def __init__(self, text: str, step: str = "zygote") -> None:
        super().__init__(Failure(step, 0, text))


class ModuleFailed(ZygoteFailed):
    """The import of a module to preload has ended the zygote, or does not end."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"the module {module}: {reason}")
        self.module, self.reason = module, reason


class ZygoteService:
    """One zygote, `pid`, and the requests for it. Owns its channels and `output` as long as it lives."""

    def __init__(
        self, supervisor: Channel, output: init.Output, identity: Dict[str, object], zygote: Channel, pid: int
    ) -> None:
        self.supervisor, self.output, self.identity, self.zygote, self.pid = supervisor, output, identity, zygote, pid
        self._ready_s = time.monotonic()
        self._inspect_s = 0.0
        self._forks = 0
        self._module = ""  # the one to preload that the zygote imports now

    def begin(
        self, preload: List[str], extensions_after_fork: List[str], left_out: Mapping[str, str] = NONE_LEFT_OUT
    ) -> List[str]:
        """Returns the zygote's notes when it is ready. `left_out` has modules of `preload`, with the reasons.

        Raises ModuleFailed, StepFailed or MalformedMessage.
        """
        ended, nowhere = fork_first(lambda: os._exit(0))
        try:
            order = {
                "preload": preload, "extensions_after_fork": extensions_after_fork, "left_out": dict(left_out),
            }
            self.zygote.send(order, {"nowhere": nowhere})
            # Here, because `serve` is notified of later ends only.
            os.waitid(os.P_PIDFD, ended, os.WEXITED)
        finally:
            os.close(ended)
            os.close(nowhere)
        while True:
            with self._receive_beginning() as response:
                response.raise_failure()
                if "imports" in response.body:
                    self._module = fields.text(response.body, "imports")
                    if self._module and self._module not in preload:
                        raise MalformedMessage("expected a module to preload")
                elif "ready" in response.body:
                    self._module = ""
                    return fields.texts(response.body, "notes")
                else:
                    raise MalformedMessage("expected ready or a failure")

    def _receive_beginning(self) -> Message:
        """The next message of a zygote that is not ready. Raises ModuleFailed for a module whose import sleeps on."""
        sleep = Sleep(self.pid)
        while not self.output.wait((self.zygote.fileno(),), time.monotonic() + LOOK_S):
            if self._module and sleep.lasts_s() > IMPORT_ASLEEP_S:
                raise ModuleFailed(self._module, f"its import has waited for {IMPORT_ASLEEP_S:g} s")
        return self.receive()

    def abandon(self) -> None:
        """Ends the zygote with the processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # `_ended` has reaped it
            os.waitpid(self.pid, 0)
        self.zygote.close()

    def serve(self) -> None:
        """Serves requests until the supervisor closes the connection. Raises ZygoteFailed when the zygote ends, or the
        kernel's facts show that it does more than to fork slots.
        """
        inspection, children_fd = Inspection(self.pid), _wake_at_child_ends()
        self._inspect_s = time.monotonic() + INTERVAL_S
        while True:
            ready = self.output.wait((self.supervisor.fileno(), self.zygote.fileno(), children_fd), self._inspect_s)
            if children_fd in ready:
                os.read(children_fd, 512)
                self._reap()
            # Between requests a zygote sends nothing, so that its socket is only readable at its end.
            if self.zygote.fileno() in ready:
                raise self._ended()
            if self.supervisor.fileno() in ready:
                request = self.supervisor.receive()
                if request is None:
                    return
                with request:
                    if "describe" in request.body:
                        self._describe(fields.text(request.body, "describe"))
                    else:
                        self._make(SandboxSpec.restore(fields.mapping(request.body, "spec")), request)
            if time.monotonic() >= self._inspect_s:
                if (fault := inspection.find(self._forks)) is not None:
                    raise ZygoteFailed(f"the zygote does more than to fork slots: {fault}")
                self._inspect_s = time.monotonic() + inspection.again_s

    def _describe(self, token: str) -> None:
        age_s = int(time.monotonic() - self._ready_s)
        # `serve` sees the end of the connection.
        with contextlib.suppress(OSError):
            self.supervisor.send({
                "described": token, "identity": self.identity, "age_s": age_s, "forks": self._forks,
                "outdated": runs_replaced_files(),
            })

    def _make(self, spec: SandboxSpec, request: Message) -> None:
        with Channel.from_fd(request.take("control")) as control:
            try:
                self._fork(spec, control, request.fds)
            except (OSError, StepFailed, MalformedMessage) as error:
                with contextlib.suppress(OSError):
                    control.send(Failure.of(error, "fork").save())
                if not isinstance(error, OSError):
                    raise

    def _fork(self, spec: SandboxSpec, control: Channel, given: Dict[str, int]) -> None:
        with contextlib.ExitStack() as stack:
            def owned(fd: int) -> int:
                stack.callback(os.close, fd)
                return fd

            printed, print_fd = (owned(fd) for fd in output_pipe(spec))
            own, peer = (stack.enter_context(end) for end in Channel.pair(init.FORK_SERVER_MAX_BYTES))
            steps = plan(spec)

            def first() -> NoReturn:
                # A copy of one of these would keep its peer from seeing its end.
                for channel in (self.supervisor, self.zygote, peer, self.output.stream):
                    channel.close()
                for fd in (print_fd, given["go"], self.output.source_fd):
                    os.close(fd)
                output = init.Output(
                    Event.SLOT_OUTPUT_DROPPED, {"slot": spec.slot}, printed, socket.socket(fileno=given["stream"]),
                    self.output.entries, spec.slot,
                )
                _first(control, spec, steps, own, given["activity"], output)

            first_fd, pidns = (owned(fd) for fd in fork_first(lambda: report_failure(control, "exec", first)))
            control.send({}, {"init": first_fd})
            passed = {name: given[name] for name in ("go", "listen", "activity", "config")}
            passed |= {"pidns": pidns, "init": peer.fileno(), "control": control.fileno(), "output": print_fd}
            self.zygote.send({"slot": program(spec)}, passed)
            self._forks += 1
            self._inspect_s = min(self._inspect_s, time.monotonic() + SETTLE_S)
            control.send({}, {"fork_server": owned(self._forked(pidns))})

    def _forked(self, pidns: int) -> int:
        """A pidfd of the process that the zygote has forked into the pid namespace `pidns`.

        Raises OSError when it has ended, StepFailed, and MalformedMessage also for another process.
        """
        with self.receive(FORK_TIMEOUT_S) as response:
            if "ended" in response.body:
                raise ProcessLookupError(errno.ESRCH, "the slot's program exited before it was in its scope")
            response.raise_failure()
            if "fork_server" in response.fds:
                check_fork(response.fds["fork_server"], self.pid, pidns)
            return response.take("fork_server")

    def receive(self, timeout_s: Optional[float] = None) -> Message:
        """The zygote's next message; its output is copied meanwhile. Raises ZygoteFailed, or MalformedMessage."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self.output.wait((self.zygote.fileno(),), until_s):
            raise ZygoteFailed(f"the zygote did not respond within {timeout_s:g} s")
        message = self.zygote.receive()
        if message is None:
            raise self._ended()
        return message

    def _reap(self) -> None:
        """Reaps the first processes of slots that have ended, but not the zygote, which `_ended` reaps."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid == self.pid:
                    return  # `serve` sees its end at its channel
                os.waitpid(ended.si_pid, 0)

    def _ended(self) -> ZygoteFailed:
        """The error of a zygote that has closed its channel, and so ends."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        if not self._module:
            return ZygoteFailed(f"the zygote {how}")
        if code == -signal.SIGKILL:
            # Often by the OOM killer, where the module is not the only cause.
            return ZygoteFailed(f"the zygote {how} while it imported the module {self._module}")
        return ModuleFailed(self._module, f"its import ended the zygote, which {how}")


def program(spec: SandboxSpec) -> Dict[str, object]:
    """The part of a slot's sandbox that the zygote needs. The slot's secrets are in the configuration, which only the
    slot reads."""
    return {
        "uid": spec.uid, "directory": spec.directory, "environment": spec.environment,
        "syscall_filter": spec.forked_filter, "apparmor": spec.apparmor,
    }


def fork_first(first: Callable[[], NoReturn]) -> Tuple[int, int]:
    """Forks the first process of a new pid namespace, which runs `first`; its pidfd, and the namespace. Raises OSError.

    unshare(CLONE_NEWPID) cannot be reverted without CAP_SYS_ADMIN over the host's pid namespace. It applies to the
    calling thread only, so a thread does it, and ends.
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


def _wake_at_child_ends() -> int:
    """A descriptor that becomes readable when a child has ended."""
    read_fd, write_fd = os.pipe()
    for fd in (read_fd, write_fd):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    # Only a signal with a handler is written to the wake-up descriptor.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return read_fd


def _first(
    control: Channel, spec: SandboxSpec, steps: Plan, fork_server: Channel, activity_fd: int, output: init.Output,
) -> NoReturn:
    """The slot's first process; `fork_server` leads to the process that will be that, and to the program."""
    # A packet and no message: memory that is touched before the slot's scope is around this process is not the slot's.
    if not control.socket.recv(16):
        os._exit(0)
    os.setsid()
    signal.set_wakeup_fd(-1)  # the service's
    control, fork_server = _moved(control), _moved(fork_server)
    output.stream, output.entries = _moved_socket(output.stream), _moved_socket(output.entries)
    with open("/dev/null") as null:
        for number in (0, 1, 2):
            os.dup2(null.fileno(), number)
    page = move_fd(activity_fd)
    os.closerange(3, FREE_FD)
    os.dup2(page, ACTIVITY_FD)
    os.close(page)
    run(steps.outside)
    joined = {name: os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in JOINED}
    if spec.uplink is not None:
        control.send({}, {"netns": joined["net"]})

    def start() -> init.Program:
        # One for the fork server and one for the program, which share the other end.
        for _ in range(2):
            fork_server.send({}, joined)
        for fd in joined.values():
            os.close(fd)
        return init.Program(fork_server=fork_server)

    become_init(control, spec, steps, output, start)


def _moved(channel: Channel) -> Channel:
    return Channel(_moved_socket(channel.socket), channel.limit_bytes)


def _moved_socket(end: socket.socket) -> socket.socket:
    # With family and type given, the constructor makes no system call to find them.
    family, kind = end.family, end.type
    return socket.socket(family, kind, 0, move_fd(end.detach()))


def _fork_protector() -> Callable[[], None]:
    """Forks a child that lowers this process's oom_score_adj at the call of the result, and ends.

    The child keeps CAP_SYS_RESOURCE, which this process loses in the image's user namespace. The score is lowered after
    the start of the zygote, because slots would inherit it from there.
    """
    # Opened now, because the child may not look up this process in /proc when it has the user ids of the image.
    score_fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_fd)
        # Without the capability, in a container for example, the score stays.
        with contextlib.suppress(OSError):
            if os.read(read_fd, 1):
                os.write(score_fd, str(OOM_SCORE_ADJ).encode())
        os._exit(0)
    for fd in (read_fd, score_fd):
        os.close(fd)

    def protect() -> None:
        os.write(write_fd, b"1")
        os.close(write_fd)
        os.waitpid(pid, 0)

    return protect


def _start_zygote(spec: SandboxSpec, steps: Plan, print_fd: int) -> Tuple[Channel, int]:
    """Starts the zygote, with `print_fd` as its output; its channel and pid."""
    own, peer = Channel.pair()
    with peer:
        pid = os.fork()
        if pid == 0:
            own.close()
            report_failure(peer, "exec", lambda: _exec_zygote(peer, spec, steps, print_fd))
    return own, pid


def _exec_zygote(control: Channel, spec: SandboxSpec, steps: Plan, print_fd: int) -> NoReturn:
    os.setsid()
    place_fds(print_fd, [os.dup(control.fileno())])
    run(steps.outside[1:])
    forget_modules()
    run(steps.inside)
    run(steps.last)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.chdir(spec.directory)
    os.execvpe(spec.command[0], spec.command, spec.environment)


def main() -> int:
    """Runs as the service's main process. Returns the exit status."""
    supervisor = Channel.unconnected()
    request = None
    # A supervisor that has ended meanwhile needs no zygote.
    with contextlib.suppress(ConnectionError, FileNotFoundError):
        supervisor.socket.connect(ZYGOTE_PATH)
        supervisor.send({"unit": sys.argv[1]})
        request = supervisor.receive()
    if request is None:
        return 0
    spec = SandboxSpec.restore(fields.mapping(request.body, "spec"))
    # Connected as root of the host, because journald accepts the unit of an entry from root only.
    entries = journal.entries()
    stream = journal.stream(ZYGOTE_IDENTIFIER, f"nbagent-zygote@{sys.argv[1]}.service")
    steps = zygote_plan(spec)
    output: Optional[init.Output] = None
    protect = _fork_protector()
    try:
        run(steps.outside[:1])
        # After the change of user, so that the pipe belongs to the zygote's user, who may open /dev/stderr anew.
        printed, print_fd = (move_fd(fd) for fd in os.pipe())
        subject = {"zygote": sys.argv[1]}
        output = init.Output(Event.ZYGOTE_OUTPUT_DROPPED, subject, printed, stream, entries, ZYGOTE_IDENTIFIER)
        for name, most in USER_MAXIMA.items():
            with open(f"/proc/sys/user/{name}", "w") as file:
                file.write(str(most))
        prctl(PR_SET_DUMPABLE, 0)
        identity = fields.mapping(request.body, "identity")
        preload, after_fork = (fields.texts(request.body, key) for key in ("preload", "extensions_after_fork"))
        left_out: Dict[str, str] = {}
        while True:
            service = ZygoteService(supervisor, output, identity, *_start_zygote(spec, steps, print_fd))
            try:
                notes = service.begin(preload, after_fork, left_out)
                break
            except ModuleFailed as error:
                service.abandon()
                if error.module in left_out:
                    raise
                left_out[error.module] = error.reason
                print(f"zygote {sys.argv[1]}: {error}; started again without it", flush=True)
        os.close(print_fd)
        protect()
        # Forked processes get an empty bounding set here, which saves each of them 41 calls.
        drop_bounding_set(range(last_capability() + 1))
        # Nothing is imported from here on. In each init the same would cost 50 pages of its own.
        forget_modules()
        gc.collect()
        gc.freeze()
        supervisor.send({"ready": True, "notes": notes})
        service.serve()
    except (OSError, StepFailed, MalformedMessage) as error:
        failure = Failure.of(error, "zygote")
        if output is not None:
            output.finish()
        print(f"zygote {sys.argv[1]}: {failure}", flush=True)
        try:
            supervisor.send(failure.save())
        except OSError:
            return 0  # the supervisor has ended
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
