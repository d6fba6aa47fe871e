"""Starting a slot's processes: the one part that is another when slots are forked, not exec'd.

A launcher is given a slot, its image and its listening socket, and callbacks that put a pid into
the slot's scope and make an interface in a network namespace; it answers when the slot's program
runs. It owns nothing afterwards: the descriptors it returns are the caller's.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nbagent
from nbagent import activity
from nbagent.errors import StartFailed
from nbagent.image.store import Image
from nbagent.linux import seccomp
from nbagent.model import Slot
from nbagent.network import addresses
from nbagent.sandbox import syscalls
from nbagent.sandbox.plan import CODE_PATH, Line
from nbagent.sandbox.spec import SandboxSpec, Uplink
from nbagent.supervisor import gate
from nbagent.supervisor.waiting import readable

MOUNTPOINT = "/run/nbagent/sandbox"
_ANSWER_MAX_BYTES = 65536


@dataclass(frozen=True)
class Launched:
    """A slot whose program runs. `pid` is its first process, `pidfd` and `activity_fd` are open."""

    pid: int
    pidfd: int
    activity_fd: int


class Launcher(Protocol):
    """How slots are started."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket,
        enter_scope: Callable[[int], Awaitable[None]], attach: Callable[[int], Awaitable[None]],
    ) -> Launched:
        """Starts the slot's program. Raises StartFailed; what it made is then ended with the scope."""


@functools.cache
def syscall_filter() -> str:
    """The slots' seccomp program, in base64; compiled once."""
    program = seccomp.compile_filter(
        syscalls.ALLOWED, syscalls.REFUSED, syscalls.OTHERWISE, syscalls.EQUAL, syscalls.WITHOUT
    )
    return base64.b64encode(program).decode()


def sandbox_spec(
    slot: Slot, image: Image, storage_bytes: int, start_timeout_s: float, uplink: Uplink | None = None
) -> SandboxSpec:
    """The sandbox of a slot of `image`, and what runs in it."""
    notebook = [image.python, "-I", f"{CODE_PATH}/zygote/notebook.py"] if image.python else []
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
        mountpoint=MOUNTPOINT,
        syscall_filter=syscall_filter(),
        uplink=uplink,
    )


def host_steps(slot: Slot, directory: Path) -> list[Line]:
    """What the supervisor does on the host for a slot's start, before the sandbox's own plan.

    Each is undone by its name alone, so a successor of this supervisor can do that too.
    """
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
            "host", f"scope {slot.scope} around a shell that waits",
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


class ExecLauncher:
    """Starts a slot by exec of its image's program: two seconds, and works with every image."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket,
        enter_scope: Callable[[int], Awaitable[None]], attach: Callable[[int], Awaitable[None]],
    ) -> Launched:
        activity_fd = activity.create()
        config_fd = os.memfd_create("nbagent-config", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.write(config_fd, json.dumps({"base_url": slot.base_path, "token": slot.token}).encode())
            os.lseek(config_fd, 0, os.SEEK_SET)
            with ours:
                with theirs:
                    passed = (theirs.fileno(), listener.fileno(), activity_fd, config_fd)
                    process = gate.spawn("nbagent.sandbox.launch", passed)
                launcher_fd = os.pidfd_open(process.pid)
                try:
                    await enter_scope(process.pid)
                    gate.open_for(process)
                    ours.send(json.dumps(spec.save()).encode())
                    pidfd, *netns = await _init_of(ours, 1 if spec.uplink is None else 2)
                    try:
                        for netns_fd in netns:
                            try:
                                await attach(netns_fd)
                            finally:
                                os.close(netns_fd)
                            ours.send(json.dumps({"attached": True}).encode())
                        pid = _pid_of(pidfd, slot)
                        await _exec_of(ours)
                    except BaseException:
                        os.close(pidfd)
                        raise
                    await readable(launcher_fd)
                    process.wait()
                except BaseException:
                    gate.end(process)
                    raise
                finally:
                    os.close(launcher_fd)
        except BaseException:
            os.close(activity_fd)
            raise
        finally:
            os.close(config_fd)
        return Launched(pid, pidfd, activity_fd)


async def _answer(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    await readable(control.fileno())
    payload, fds, _, _ = socket.recv_fds(control, _ANSWER_MAX_BYTES, 2)
    if not payload:
        return None, fds
    answer = json.loads(payload)
    if failed := answer.get("failed"):
        for fd in fds:
            os.close(fd)
        raise StartFailed(f"{failed['step']}: {failed['text']}", step=failed["step"], errno=failed["errno"])
    return answer, fds


async def _init_of(control: socket.socket, count: int) -> list[int]:
    """A pidfd of the slot's first process, and for a slot with an interface its network namespace."""
    answer, fds = await _answer(control)
    if answer is None or len(fds) != count:
        raise StartFailed("the launcher ended before the slot's first process ran", step="launch")
    return fds


async def _exec_of(control: socket.socket) -> None:
    """Returns when the last process that holds the other end has exec'd."""
    answer, _ = await _answer(control)
    if answer is not None:
        raise StartFailed(f"unexpected answer {answer}", step="launch")


def ended(slot: Slot) -> StartFailed:
    """What a start has come to whose program ended, wherever that is noticed first."""
    return StartFailed(f"it ended; journalctl -u {slot.scope} says why", step="ready")


def _pid_of(pidfd: int, slot: Slot) -> int:
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:
                return pid
    raise ended(slot)
