# SPDX-License-Identifier: BSD-3-Clause
"""The requests of the units service, many at a time over a connection of nbagent.wire.multiplex.

    {"op": "start_scope", "unit": SCOPE, "pids": [int], "description": str, "limits": {...}, "runtime_max_s": float,
     "stop_timeout_s": float}           moves processes into a new scope of a slot; responds when they are there
    {"op": "attach", "unit": SCOPE, "pids": [int]}      responds when they are in the scope, which may be starting
    {"op": "set_limits", "unit": SCOPE or ZYGOTE, "limits": {...}}
    {"op": "scope_limits", "unit": SCOPE}                       responds with {...}, as systemd has them
    {"op": "main_pid", "unit": ZYGOTE}                          responds with a process
    {"op": "set_swap", "unit": SCOPE, "size_bytes": int}
    {"op": "set_cpu_weight", "unit": ZYGOTE, "weight": int}
    {"op": "reclaim", "unit": SCOPE, "pid": int, "size_bytes": int}
                                        reclaims memory of the scope, in which `pid` is; responds whether all of it was
    {"op": "prime"}                     MigrationPrimer.prime of nbagent.linux.cgroup
    {"op": "start", "unit": STARTED, "anew": bool}              responds when it is active
    {"op": "stop", "unit": SCOPE or ZYGOTE, "at_once": bool}    responds when it is inactive
    {"op": "scopes"}, {"op": "zygotes"}                         respond with the names of active units
    {"op": "is_stopping"}               responds whether the host shuts down

The response is {"ok": a value} or a failure, whose step is JOB for a job of systemd that did not succeed.

A caller of systemd can run any program as root, so names and values are checked here, and a process gets into a scope
only from the unit that has forked it for a slot.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from nbagent.core.model import Limits
from nbagent.linux import cgroup
from nbagent.systemd.job import JobFailed
from nbagent.wire import fields
from nbagent.wire.failure import Failure
from nbagent.wire.fields import MalformedMessage

REQUEST_MAX_BYTES = 16384
JOB = "job"
_BYTES_MAX = 1 << 62
_SECONDS_MAX = 1e9
_SCOPE = re.compile(r"nbagent-[0-9a-z-]{1,200}\.scope")
_ZYGOTE = re.compile(r"nbagent-zygote@[a-z0-9][a-z0-9._-]{0,62}:[0-9a-f]{1,16}\.service")
_STARTED = re.compile(rf"nbagent-(dns|sweep)\.service|{_ZYGOTE.pattern}")
# Units that may be stopped, and whose limits may be set.
_STOPPED = re.compile(rf"{_SCOPE.pattern}|{_ZYGOTE.pattern}")
# The units whose processes become processes of a slot.
_ORIGIN = re.compile(rf"nbagent-launch\.service|{_ZYGOTE.pattern}")


class Manager(Protocol):
    """The operations of nbagent.systemd.bus.Systemd."""

    async def start_scope(
        self, name: str, pids: Sequence[int], description: str, limits: Limits, **settings: float
    ) -> None: ...

    async def attach(self, name: str, pids: Sequence[int]) -> None: ...

    def set_limits(self, name: str, limits: Limits) -> None: ...

    def scope_limits(self, name: str) -> Limits: ...

    def main_pid(self, name: str) -> int: ...

    def set_swap(self, name: str, size_bytes: int) -> None: ...

    def set_cpu_weight(self, name: str, weight: int) -> None: ...

    async def start(self, name: str, *, anew: bool = False) -> None: ...

    async def stop(self, name: str, *, at_once: bool = False) -> None: ...

    def scopes(self) -> Iterable[str]: ...

    def zygotes(self) -> Iterable[str]: ...

    def is_stopping(self) -> bool: ...


async def respond(
    manager: Manager, body: Mapping[str, object], prime: Callable[[], None] = lambda: None
) -> dict[str, object]:
    """The response to one request of root. `prime` does the request "prime"."""
    try:
        if body.get("op") == "prime":
            prime()
            return {"ok": None}
        return {"ok": await _do(manager, body)}
    except JobFailed as error:
        return Failure(JOB, 0, str(error)).save()
    except FileNotFoundError as error:
        return Failure("units", errno.ENOENT, error.strerror or str(error)).save()
    except Exception as error:  # the service has to serve the other slots' requests
        return Failure.of(error, "units").save()


async def _do(manager: Manager, body: Mapping[str, object]) -> object:
    match body.get("op"):
        case "start_scope":
            await manager.start_scope(
                _unit(body, _SCOPE), _pids(body), fields.text(body, "description"), _limits(body),
                runtime_max_s=_seconds(body, "runtime_max_s"), stop_timeout_s=_seconds(body, "stop_timeout_s"),
            )
        case "attach":
            await manager.attach(_unit(body, _SCOPE), _pids(body))
        case "set_limits":
            manager.set_limits(_unit(body, _STOPPED), _limits(body))
        case "scope_limits":
            return manager.scope_limits(_unit(body, _SCOPE)).document()
        case "main_pid":
            return manager.main_pid(_unit(body, _ZYGOTE))
        case "set_swap":
            manager.set_swap(_unit(body, _SCOPE), fields.integer(body, "size_bytes", 0, _BYTES_MAX))
        case "set_cpu_weight":
            manager.set_cpu_weight(_unit(body, _ZYGOTE), fields.integer(body, "weight", 1, 10000))
        case "reclaim":
            scope, pid = _unit(body, _SCOPE), fields.integer(body, "pid", 2, _BYTES_MAX)
            if cgroup.unit_of_process(pid) != scope:
                raise ProcessLookupError(errno.ESRCH, f"process {pid} is not in {scope}")
            size_bytes = fields.integer(body, "size_bytes", 1, _BYTES_MAX)
            # A write to memory.reclaim blocks until the kernel is done.
            return await asyncio.to_thread(cgroup.of_process(pid).reclaim, size_bytes)
        case "start":
            await manager.start(_unit(body, _STARTED), anew=body.get("anew") is True)
        case "stop":
            await manager.stop(_unit(body, _STOPPED), at_once=body.get("at_once") is True)
        case "scopes":
            return list(manager.scopes())
        case "zygotes":
            return list(manager.zygotes())
        case "is_stopping":
            return manager.is_stopping()
        case unknown:
            raise ValueError(f"unknown operation {str(unknown)[:40]!r}")
    return None


def _unit(body: Mapping[str, object], allowed: re.Pattern[str]) -> str:
    name = fields.text(body, "unit")
    if not allowed.fullmatch(name):
        raise PermissionError(errno.EPERM, f"unit {name[:60]!r} does not belong to a slot")
    return name


def _pids(body: Mapping[str, object]) -> list[int]:
    pids = body.get("pids")
    if not isinstance(pids, list) or not all(type(pid) is int and pid > 1 for pid in pids):
        raise MalformedMessage("'pids' is not a list of process ids")
    for pid in pids:
        if not _ORIGIN.fullmatch(unit := cgroup.unit_of_process(pid)):
            raise PermissionError(errno.EPERM, f"process {pid} of {unit or 'no unit'} was not forked for a slot")
    return pids


def _limits(body: Mapping[str, object]) -> Limits:
    """The limits in a message, as Limits.document makes them. Raises MalformedMessage."""
    limits = fields.mapping(body, "limits")
    quota = limits.get("cpu_quota")
    return Limits(
        memory_bytes=fields.integer(limits, "memory_bytes", 1, _BYTES_MAX),
        cpu_weight=fields.integer(limits, "cpu_weight", 1, 10000),
        cpu_quota=None if quota is None else _number("cpu_quota", quota, 1e6),
        tasks=fields.integer(limits, "tasks", 1, _BYTES_MAX),
    )


def _seconds(body: Mapping[str, object], name: str) -> float:
    return _number(name, body.get(name), _SECONDS_MAX)


def _number(name: str, value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise MalformedMessage(f"{name!r} is not a number above 0 and up to {most:g}")
    return float(value)
