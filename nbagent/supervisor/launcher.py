"""Starting a slot's processes: by exec of the image's program, or by a fork of its zygote.

A launcher is given a slot, its image and its listening socket, the slot's scope to be, and a callback that
makes an interface in a network namespace; it answers when the slot's program runs. It owns nothing afterwards:
the descriptors it returns are the caller's.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nbagent
from nbagent.core import paths
from nbagent.core.errors import StartFailed
from nbagent.core.model import Slot
from nbagent.image.store import Image
from nbagent.linux import seccomp
from nbagent.network import addresses
from nbagent.sandbox import syscalls
from nbagent.sandbox.plan import CODE_PATH, Line
from nbagent.sandbox.spec import SandboxSpec, Uplink
from nbagent.supervisor import scoped_process
from nbagent.supervisor.aio import readable
from nbagent.wire import activity

_ANSWER_MAX_BYTES = 65536


@dataclass(frozen=True)
class Launched:
    """A slot whose program runs. `pid` is its first process, `pidfd` and `activity_fd` are open.

    `serves`: the program has said that it takes requests; one that says nothing has to be asked.
    """

    pid: int
    pidfd: int
    activity_fd: int
    serves: bool


class Scope(Protocol):
    """The scope of a slot that starts."""

    async def start(self, pids: Sequence[int]) -> None:
        """Makes it around these processes. Raises JobFailed or OSError."""

    def add(self, pids: Sequence[int]) -> None:
        """Puts more processes into it. Raises OSError."""

    async def stop(self) -> None:
        """Ends it with all that is in it, if it is there. Raises OSError."""


Attach = Callable[[int], Awaitable[None]]


class Launcher(Protocol):
    """How slots are started."""

    def prepare(self) -> None:
        """A claim waits for a slot that will be started: does what takes time and need not wait for it."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        """Starts the slot's program. Raises StartFailed; what it made is then ended with the scope."""


@functools.cache
def syscall_filter() -> str:
    """The slots' seccomp program, in base64; compiled once."""
    program = seccomp.compile_filter(
        syscalls.ALLOWED, syscalls.REFUSED, syscalls.OTHERWISE, syscalls.EQUAL, syscalls.WITHOUT
    )
    return base64.b64encode(program).decode()


@functools.cache
def forking_filter() -> str:
    """The zygotes' seccomp program, in base64; compiled once."""
    refused = {name: errno for name, errno in syscalls.REFUSED.items() if name not in syscalls.FORKING}
    program = seccomp.compile_filter(
        [*syscalls.ALLOWED, *syscalls.FORKING], refused, syscalls.OTHERWISE, syscalls.EQUAL, syscalls.WITHOUT
    )
    return base64.b64encode(program).decode()


@functools.cache
def forked_filter() -> str:
    """What a zygote's children have beside its filter, in base64; compiled once. Together they are the slots'."""
    refused = {name: syscalls.REFUSED[name] for name in syscalls.FORKING}
    return base64.b64encode(seccomp.compile_filter([], refused, 0, {}, {})).decode()


def sandbox_spec(
    slot: Slot, image: Image, storage_bytes: int, start_timeout_s: float, uplink: Uplink | None = None
) -> SandboxSpec:
    """The sandbox of a slot of `image`, and what runs in it."""
    notebook = [image.python, "-I", f"{CODE_PATH}/zygote/exec_main.py"] if image.python else []
    environment = {name: _filled(value, slot, image) for name, value in image.environment.items()}
    environment |= {"HOME": image.home, "USER": image.user, "LOGNAME": image.user, "NBAGENT_SLOT": slot.id}
    return SandboxSpec(
        slot=slot.id,
        root=str(image.root),
        id_base=image.id_base,
        uid=slot.uid,
        user=image.user,
        home=image.home,
        storage_bytes=storage_bytes,
        command=notebook or [_filled(word, slot, image) for word in image.command],
        directory=image.directory,
        port=image.port or 0,
        # A little before the supervisor gives up, so that the journal has the better reason.
        listen_timeout_s=start_timeout_s * 0.9,
        environment=environment,
        code=str(Path(nbagent.__file__).parent),
        mountpoint=str(paths.SANDBOX),
        syscall_filter=syscall_filter(),
        uplink=uplink,
    )


def host_steps(slot: Slot, directory: Path, forked: bool) -> list[Line]:
    """What the supervisor does on the host for a slot's start, before the sandbox's own plan.

    Each is undone by its name alone, so a successor of this supervisor can do that too.
    """
    inside = "two processes just forked, the first of a pid namespace, that wait" if forked else "a shell that waits"
    interface = Line(
        "host", f"interface {addresses.interface(slot.id)} to {', '.join(slot.addresses)}, by nbagent-network.service",
        "Made while the root is built, where it costs no claim time; it leads nowhere until a claim opens it.",
        "removed, with all that the firewall remembers of it",
    )
    return [
        Line(
            "host", f"directory {directory} with the slot's file, its socket and its static files",
            "The router finds the slot by this path, and a supervisor that comes after this one the slot.",
            "removed, first of all: from then on the router says that the slot is gone",
        ),
        Line(
            "host", f"scope {slot.scope} around {inside}",
            "Limits hold before the first instruction of the slot, and all memory it touches is its own.",
            "stopped: SIGTERM, then SIGKILL to all that is in it",
        ),
        *([interface] if slot.addresses else []),
    ]


def _filled(text: str, slot: Slot, image: Image) -> str:
    """`text` of an image's manifest with what is the slot's own in it."""
    values = {"base_path": slot.base_path.rstrip("/"), "port": str(image.port or ""), "token": slot.token}
    # In one pass, and by these names only: what is filled in is not looked at again.
    return re.sub(r"\{(base_path|port|token)\}", lambda match: values[match[1]], text)


class Parts:
    """What is made for a slot on either way of starting; a context that closes what nobody has taken over.

    `control` is the supervisor's end of the slot's control socket, which speaks as nbagent.runtime.slot_process has it.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __enter__(self) -> Parts:
        with contextlib.ExitStack() as stack:
            self.activity_fd = activity.create()
            self._activity = stack.enter_context(contextlib.ExitStack())
            self._activity.callback(os.close, self.activity_fd)
            self.config_fd = os.memfd_create("nbagent-config", os.MFD_CLOEXEC)
            stack.callback(os.close, self.config_fd)
            settings = {"base_url": self.slot.base_path, "token": self.slot.token}
            os.write(self.config_fd, json.dumps(settings).encode())
            os.lseek(self.config_fd, 0, os.SEEK_SET)
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.control, self.theirs = (stack.enter_context(end) for end in ends)
            self._all = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._all.close()

    async def given(self, *names: str) -> list[int]:
        """The descriptors of these names, in whatever order and packets they come. Raises StartFailed."""
        found: dict[str, int] = {}
        try:
            while missing := set(names) - found.keys():
                answer, fds = await _answer(self.control)
                said = _given(answer)
                if not said or len(said) != len(fds) or len(said) != len(missing & set(said)):
                    for fd in fds:
                        os.close(fd)
                    raise StartFailed("it ended before the slot's first process ran", step="launch")
                found |= zip(said, fds, strict=True)
        except BaseException:
            for fd in found.values():
                os.close(fd)
            raise
        return [found[name] for name in names]

    async def running(self, pidfd: int, spec: SandboxSpec, attach: Attach) -> Launched:
        """Returns when the slot's program runs. `pidfd`, of its first process, is the caller's if this raises."""
        if spec.uplink is not None:
            netns_fd, = await self.given("netns")
            try:
                await attach(netns_fd)
            finally:
                os.close(netns_fd)
            self.control.send(json.dumps({"attached": True}).encode())
        pid = pid_of(pidfd, self.slot)
        serves = False
        while True:
            answer, fds = await _answer(self.control)
            for fd in fds:
                os.close(fd)
            if answer is None:
                break
            if "serves" not in answer:
                raise StartFailed(f"unexpected answer {answer}", step="launch")
            serves = True
        self._activity.pop_all()
        return Launched(pid, pidfd, self.activity_fd, serves)


class ExecLauncher:
    """Starts a slot by exec of its image's program: a second, and works with every image."""

    def prepare(self) -> None:
        """Nothing: what there is to win is milliseconds."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        with Parts(slot) as parts:
            with parts.theirs:
                passed = (parts.theirs.fileno(), listener.fileno(), parts.activity_fd, parts.config_fd)
                process = scoped_process.spawn_blocked("nbagent.runtime.exec_slot", passed)
            launcher_fd = os.pidfd_open(process.pid)
            try:
                await scope.start([process.pid])
                scoped_process.release(process)
                parts.control.send(json.dumps(spec.save()).encode())
                pidfd, = await parts.given("init")
                try:
                    launched = await parts.running(pidfd, spec, attach)
                except BaseException:
                    os.close(pidfd)
                    raise
                await readable(launcher_fd)
                process.wait()
                return launched
            except BaseException:
                scoped_process.kill(process)
                raise
            finally:
                os.close(launcher_fd)


def _given(answer: dict[str, Any] | None) -> list[str]:
    """The names of what is beside an answer; none if it says no names."""
    said = answer.get("given") if answer is not None else None
    return said if isinstance(said, list) and all(isinstance(name, str) for name in said) else []


async def _answer(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next packet of a slot that starts, and its descriptors; None at the end.

    It may be an image's that says it, so it is looked at closely. Raises StartFailed when it is a failure, or nonsense.
    """
    await readable(control.fileno())
    payload, fds, _, _ = socket.recv_fds(control, _ANSWER_MAX_BYTES, 2)
    if not payload:
        return None, fds
    try:
        answer = json.loads(payload)
        if not isinstance(answer, dict):
            raise TypeError(f"{type(answer).__name__} where an object belongs")
        if (failed := answer.get("failed")) is None:
            return answer, fds
        step, text, errno = str(failed["step"]), str(failed["text"]), int(failed["errno"])
        failure = StartFailed(f"{step}: {text}", step=step, errno=errno)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        failure = StartFailed(f"an answer that is none: {error}", step="launch")
    for fd in fds:
        os.close(fd)
    raise failure


def ended(slot: Slot) -> StartFailed:
    """What a start has come to whose program ended, wherever that is noticed first."""
    return StartFailed(f"it ended; journalctl -u {slot.scope} says why", step="ready")


def pid_of(pidfd: int, slot: Slot) -> int:
    """The process of a pidfd. Raises StartFailed when it has ended."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:
                return pid
    raise ended(slot)
