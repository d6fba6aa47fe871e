# SPDX-License-Identifier: BSD-3-Clause
"""The sandboxes of slots and zygotes as values: from an image and the settings, with the system call filters.

Nothing here starts a process: `launcher` and `zygote_starter` send these values to the processes that build a sandbox
by them (nbagent.sandbox).
"""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import nbagent
from nbagent.config.host_config import SlotSettings
from nbagent.core import paths
from nbagent.core.model import Limits, Slot
from nbagent.core.proxies import without_given
from nbagent.core.quantities import parse_quota
from nbagent.image.store import Image
from nbagent.linux import apparmor, seccomp
from nbagent.network import addresses
from nbagent.sandbox import syscalls
from nbagent.sandbox.plan import CODE_PATH, RUNTIME_PATH, Line
from nbagent.sandbox.spec import APPARMOR_PROFILE, SandboxSpec, Uplink
from nbagent.wire import assets, limits_page
from nbagent.wire.limits_page import SlotLimits
from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION, QUICK_OPTION

# Takes the place of a slot's id in the sandbox of a zygote.
ZYGOTE_NAME = "zygote"
# The allocators of polars and pyarrow start threads at their import without these, and a fork copies one thread.
PRELOAD_VARIABLES = {
    "_RJEM_MALLOC_CONF": "background_thread:false", "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


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
    return limits_page.variables(SlotLimits.of(limits), len(os.sched_getaffinity(0)))


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
