# SPDX-License-Identifier: BSD-3-Clause
"""Starting a slot's processes: by exec of the image's program here, by a fork of its zygote in `fork_launcher`.

A launcher gets a slot, its sandbox and its listening socket, the scope to start, and a callback that makes an interface
in a network namespace; it returns when the slot's program runs. The descriptors that it returns are the caller's.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import nbagent
from nbagent.config.host_config import SlotSettings
from nbagent.core import paths
from nbagent.core.errors import StartFailed
from nbagent.core.model import Limits, Slot
from nbagent.core.proxies import without_given
from nbagent.core.quantities import parse_quota
from nbagent.image.store import Image
from nbagent.launch.requests import SLOT
from nbagent.linux import apparmor, seccomp
from nbagent.network import addresses
from nbagent.sandbox import syscalls
from nbagent.sandbox.plan import CODE_PATH, RUNTIME_PATH, Line
from nbagent.sandbox.spec import APPARMOR_PROFILE, SandboxSpec, Uplink
from nbagent.supervisor import launch_service
from nbagent.wire import activity, assets, limits_page
from nbagent.wire.aio import readable, receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure, StepFailed, printable
from nbagent.wire.fields import MalformedMessage
from nbagent.wire.limits_page import SlotLimits
from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION, QUICK_OPTION

# The router's address of an image's files, in front of the digest.
# Takes the place of a slot's id in the sandbox of a zygote.
ZYGOTE_NAME = "zygote"
# The allocators of polars and pyarrow start threads at their import without these, and a fork copies one thread.
PRELOAD_VARIABLES = {
    "_RJEM_MALLOC_CONF": "background_thread:false", "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


@dataclass(frozen=True)
class Launched:
    """A slot whose program runs. `pid` is its first process; `pidfd` and `activity_fd` are open.

    `serves`: the program has reported that it takes requests; any other has to be probed. `launch` is "fork" or "exec",
    and `launch_reason` why it was not "fork" of a complete zygote.
    """

    pid: int
    pidfd: int
    activity_fd: int
    serves: bool
    launch: str = "exec"
    launch_reason: str = ""


class Scope(Protocol):
    """The scope of a slot that starts."""

    async def start(self, pids: Sequence[int]) -> None:
        """Starts it with these processes in it. Raises JobFailed or OSError."""

    async def add(self, pids: Sequence[int]) -> None:
        """Moves more processes into it, also while it is being started. Raises OSError."""

    async def stop(self) -> None:
        """Ends it and every process in it, if it exists. Raises OSError."""


Attach = Callable[[int], Awaitable[None]]


class Launcher(Protocol):
    """How slots are started."""

    def prepare(self) -> None:
        """Does the slow work of a start ahead of it, because a claim waits for a slot that will be started."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        """Starts the slot's program. Raises StartFailed; the caller then stops the scope, which ends the processes."""


@functools.cache
def syscall_filter() -> str:
    """The slots' seccomp program, in base64; compiled once."""
    program = seccomp.compile_filter(
        syscalls.ALLOWED, syscalls.REFUSED, syscalls.OTHERWISE, syscalls.EQUAL, syscalls.WITHOUT,
        [*syscalls.LAST_FILTER, *syscalls.RULES],
    )
    return base64.b64encode(program).decode()


@functools.cache
def forking_filter() -> str:
    """The seccomp program of zygotes, in base64; compiled once."""
    refused = {name: errno for name, errno in syscalls.REFUSED.items() if name not in syscalls.FORKING}
    program = seccomp.compile_filter(
        [*syscalls.ALLOWED, *syscalls.FORKING], refused, syscalls.OTHERWISE, syscalls.EQUAL, syscalls.WITHOUT,
        syscalls.RULES,
    )
    return base64.b64encode(program).decode()


@functools.cache
def forked_filter() -> str:
    """The filter of a zygote's children beside the zygote's, in base64; compiled once. Both together are the slots'."""
    refused = {name: syscalls.REFUSED[name] for name in syscalls.FORKING}
    return base64.b64encode(seccomp.compile_filter([], refused, 0, {}, {}, syscalls.LAST_FILTER)).decode()


def apparmor_profile() -> str:
    """The AppArmor profile of slots, if the kernel has it; empty otherwise.

    It is read at each start, because the operator can load it at any time.
    """
    return APPARMOR_PROFILE if apparmor.mode_of(APPARMOR_PROFILE) is not None else ""


def sandbox_spec(
    slot: Slot, image: Image, storage_bytes: int, start_timeout_s: float, uplink: Uplink | None = None,
    assets_url: str = "", network: Mapping[str, str] = MappingProxyType({}),
) -> SandboxSpec:
    """The sandbox of a slot of `image`, and the program in it. `assets_url` is `router.assets_url`; `network` are the
    variables of the host's HTTP proxy, unless the image has its own.
    """
    values = {"base_path": slot.base_path.rstrip("/"), "port": str(image.port or ""), "token": slot.token}
    # JupyterLab's server sets them itself, before each kernel, because a claim may change the limits.
    limits = {} if image.python else _limit_variables(slot.limits)
    identity = {"USER": image.user, "LOGNAME": image.user, "NBAGENT_SLOT": slot.id}
    environment = limits | without_given(network, image.environment) | _environment(image, values) | identity
    notebook = [*_activated(image), image.python, f"{CODE_PATH}/zygote/exec_main.py"] if image.python else []
    if notebook and image.assets:
        environment[assets.VARIABLE] = " ".join([f"{assets_url}{image.assets_path}", *image.assets])
    return _image_spec(image, storage_bytes)._replace(
        slot=slot.id,
        uid=slot.uid,
        command=notebook or [_filled(word, values) for word in image.command],
        port=image.port or 0,
        # Less than the supervisor's own timeout, so that the failure is the forwarder's, which has the reason.
        listen_timeout_s=start_timeout_s * 0.9,
        environment=environment,
        uplink=uplink,
        apparmor=apparmor_profile(),
    )


def zygote_spec(image: Image, storage_bytes: int, limits: Limits, *, quick: bool = False) -> SandboxSpec:
    """The sandbox of a zygote of `image`: a slot's, but as root of the image's user namespace.

    The environment is for the imports only, because each fork replaces it by its slot's. The libraries that it loads
    size themselves by `limits`, those of most slots.
    """
    if image.python is None:
        raise ValueError(f"image {image.name} has no Python, so that it has no zygote")
    values = {"base_path": f"/user/{ZYGOTE_NAME}", "port": "", "token": ""}
    environment = PRELOAD_VARIABLES | _limit_variables(limits) | _environment(image, values)
    return _image_spec(image, storage_bytes)._replace(
        user="root",
        command=[*_activated(image), image.python, f"{CODE_PATH}/zygote/zygote.py",
                 *([] if image.share_memory else [PRIVATE_MEMORY_OPTION]), *([QUICK_OPTION] if quick else [])],
        environment=environment | {"USER": image.user, "LOGNAME": image.user, "NBAGENT_SLOT": ZYGOTE_NAME},
        syscall_filter=forking_filter(),
    )


def _activated(image: Image) -> list[str]:
    """The program that runs the image's script `activate`, and then the one that follows."""
    if not image.activate or image.python is None:
        return []
    return [image.python, "-I", "-S", f"{CODE_PATH}/zygote/activated.py", image.activate]


def _image_spec(image: Image, storage_bytes: int) -> SandboxSpec:
    """The part of a sandbox that is the same for an image's slots and its zygote."""
    return SandboxSpec(
        slot=ZYGOTE_NAME,
        root=str(image.root),
        id_base=image.id_base,
        uid=0,
        user=image.user,
        home=image.home,
        storage_bytes=storage_bytes,
        command=[],
        directory=image.directory,
        port=0,
        listen_timeout_s=0.0,
        environment={},
        code=str(Path(nbagent.__file__).parent),
        mountpoint=str(paths.SANDBOX),
        system=str(paths.SYSTEM_FILES),
        syscall_filter=syscall_filter(),
        public=image.public,
    )


def default_limits(slots: SlotSettings) -> Limits:
    """The limits of a slot whose claim sets none."""
    quota = None if slots.cpu_quota == "none" else parse_quota(slots.cpu_quota, os.cpu_count() or 1)
    return Limits(slots.memory, slots.cpu_weight, quota, slots.tasks)


def _limit_variables(limits: Limits) -> dict[str, str]:
    """The environment variables by which libraries read the limits of a slot."""
    return limits_page.variables(SlotLimits(limits.memory_bytes, limits.cpu_quota), len(os.sched_getaffinity(0)))


def _environment(image: Image, values: Mapping[str, str]) -> dict[str, str]:
    own = {name: _filled(value, values) for name, value in image.environment.items()}
    return {"JUPYTER_RUNTIME_DIR": RUNTIME_PATH} | own | {"HOME": image.home}


def host_steps(slot: Slot, directory: Path, forked: bool) -> list[Line]:
    """The supervisor's steps on the host for a slot's start, before the sandbox's own plan.

    Each is undone by its name alone, so that the next supervisor can do that too.
    """
    inside = "two blocked processes: the slot's init and its fork server" if forked else "a blocked shell"
    interface = Line(
        "host", f"interface {addresses.interface(slot.id)} to {', '.join(slot.addresses)}, by nbagent-network.service",
        "Made while the root is built, so that it costs no claim time; it forwards nothing until a claim opens it.",
        "removed, with its entries in the firewall's sets",
    )
    return [
        Line(
            "host", f"directory {directory} with the slot's file, its socket, its limits and its static files",
            "The router finds the socket by this path, and a restarted supervisor finds the slot.",
            "removed first, because from then on the router responds that there is no such slot",
        ),
        Line(
            "host", f"scope {slot.scope} around {inside}",
            "Limits hold before the first instruction of the slot, and all memory it touches is charged to it.",
            "stopped: SIGTERM, then SIGKILL to every process in it",
        ),
        *([interface] if slot.addresses else []),
    ]


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` of an image's manifest with the slot's values in the place of {base_path}, {port} and {token}."""
    # In one pass, so that braces in a value are not replaced in turn.
    return re.sub(r"\{(base_path|port|token)\}", lambda match: values[match[1]], text)


class SlotStart:
    """Resources of one start, whichever way it is done; a context that closes those that were not passed on.

    `control` is the supervisor's end of the slot's control channel (nbagent.runtime.slot_process), `peer` the slot's.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._awaited = {"init", "fork_server", "netns"}
        self._received: dict[str, int] = {}

    def __enter__(self) -> SlotStart:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_received)
            self.activity_fd = activity.create()
            self._activity = stack.enter_context(contextlib.ExitStack())
            self._activity.callback(os.close, self.activity_fd)
            self.config_fd = os.memfd_create("nbagent-config", os.MFD_CLOEXEC)
            stack.callback(os.close, self.config_fd)
            settings = {"base_url": self.slot.base_path, "token": self.slot.token}
            limits = self.slot.limits
            limits_page.write(self.activity_fd, SlotLimits(limits.memory_bytes, limits.cpu_quota))
            os.write(self.config_fd, json.dumps(settings).encode())
            os.lseek(self.config_fd, 0, os.SEEK_SET)
            self.control, self.peer = (stack.enter_context(end) for end in Channel.pair())
            self._all = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._all.close()

    def descriptors(self, listener: socket.socket) -> dict[str, int]:
        """The descriptors that the slot's program gets, borrowed."""
        return {"listen": listener.fileno(), "activity": self.activity_fd, "config": self.config_fd}

    async def receive_fds(self, *names: str) -> list[int]:
        """The descriptors of these names, which are the caller's from then on. Raises StartFailed.

        They arrive in any order: init can send its network namespace before the zygote has forked the fork server.
        """
        while missing := set(names) - self._received.keys():
            message = await self._receive()
            if message is None:
                wanted = ", ".join(sorted(missing))
                raise StartFailed(f"the slot's processes ended before they sent: {wanted}", step="launch")
            with message:
                if not message.fds or not message.fds.keys() <= self._awaited:
                    raise _unexpected(message)
                for name in list(message.fds):
                    self._received[name] = message.take(name)
                    self._awaited.remove(name)
        return [self._received.pop(name) for name in names]

    def _close_received(self) -> None:
        while self._received:
            os.close(self._received.popitem()[1])

    async def wait_running(self, pidfd: int, spec: SandboxSpec, attach: Attach) -> Launched:
        """Returns when the slot's program runs. `pidfd`, of its first process, stays the caller's if this raises."""
        if spec.uplink is not None:
            netns_fd, = await self.receive_fds("netns")
            try:
                await attach(netns_fd)
            finally:
                os.close(netns_fd)
            self.control.send({"attached": True})
        pid = pid_of(pidfd, self.slot)
        serves = False
        while (message := await self._receive()) is not None:
            with message:
                # Once, because a peer that repeats it would keep the supervisor busy.
                if serves or "serves" not in message.body:
                    raise _unexpected(message)
            serves = True
        self._activity.pop_all()
        return Launched(pid, pidfd, self.activity_fd, serves)

    async def _receive(self) -> Message | None:
        """The next message, None at the end. Raises StartFailed for a failure, and for a malformed message."""
        try:
            message = await receive(self.control)
        except MalformedMessage as error:
            raise StartFailed(str(error), step="launch") from error
        if message is not None:
            try:
                message.raise_failure()
            except StepFailed as error:
                message.close()
                raise StartFailed.at(*error.failure) from error
            except MalformedMessage as error:
                message.close()
                raise StartFailed(str(error), step="launch") from error
        return message


class ExecLauncher:
    """Starts a slot by exec of its image's program: a second, and works with every image."""

    def prepare(self) -> None:
        """Nothing, because only milliseconds could be saved."""

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        with SlotStart(slot) as start:
            try:
                with start.peer:
                    process = await launch_service.spawn(SLOT, start.peer.fileno())
            except (StepFailed, MalformedMessage) as error:
                raise StartFailed.at(*Failure.of(error, "launch")) from error
            with process:
                await scope.start([pid_of(process.pidfd, slot)])
                process.release()
                start.control.send({"spec": spec.save()}, start.descriptors(listener))
                pidfd, = await start.receive_fds("init")
                try:
                    launched = await start.wait_running(pidfd, spec, attach)
                    await readable(process.pidfd)
                except BaseException:
                    os.close(pidfd)
                    raise
                return launched


def _unexpected(message: Message) -> StartFailed:
    content = printable(", ".join([*map(repr, message.body), *(f"descriptor {name!r}" for name in message.fds)]), 200)
    return StartFailed(f"unexpected message from the slot's processes: {content or 'empty'}", step="launch")


def ended(slot: Slot) -> StartFailed:
    """The error of a start whose program ended, wherever that is noticed first."""
    return StartFailed(f"the slot's program ended; for the reason see journalctl -u {slot.scope}", step="ready")


def pid_of(pidfd: int, slot: Slot) -> int:
    """The process of a pidfd. Raises StartFailed when it has ended."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid > 0:
                return pid
    raise ended(slot)
