# SPDX-License-Identifier: BSD-3-Clause
"""systemd as the supervisor uses it: by the units service (nbagent.units), which alone has access to it.

Every call is awaited, so that claims of warm slots, releases and figures go on while PID 1 or the service does not
respond.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Mapping, Sequence

from nbagent.core import paths
from nbagent.core.model import Limits, now
from nbagent.systemd.job import JobFailed
from nbagent.units.requests import JOB
from nbagent.wire import fields
from nbagent.wire.channel import Message
from nbagent.wire.failure import StepFailed
from nbagent.wire.multiplex import Requests

__all__ = ["JobFailed", "Systemd"]

# For calls that change a limit, or list units. PID 1 needs milliseconds, but seconds while it starts a thousand units.
TIMEOUT_S = 25.0
# PID 1 needs milliseconds to move processes into a scope, but seconds while it starts a thousand others.
PLACED_MAX_S = 5.0
PID_MAX = 1 << 22  # the kernel's PID_MAX_LIMIT
# systemctl(1) can give a scope limits that nbagent never sets: this one, and a CPUWeight= of 0, which is "idle".
INFINITY = (1 << 64) - 1
# A thousand names of scopes.
RESPONSE_MAX_BYTES = 1 << 20
# The service may be restarted at any moment, and every request may be repeated but the start of a scope.
TRIES = 3
# While PID 1 executes itself anew (an upgrade of systemd or of the C library), the service connects to it again.
RECONNECT_MAX_S, RECONNECT_PAUSE_S = 5.0, 0.1
# For the reason of a slot's end only. The stop of the supervisor waits for it.
STOPPING_TIMEOUT_S = 1.0


class Systemd:
    """The units of slots and zygotes."""

    def __init__(self) -> None:
        self._requests = Requests(str(paths.UNITS_SOCKET), RESPONSE_MAX_BYTES)

    def close(self) -> None:
        """Closes the connection."""
        self._requests.close()

    async def start_scope(
        self, name: str, pids: Sequence[int], description: str, limits: Limits, **settings: float
    ) -> None:
        """Moves processes into a new scope in the slots' slice and waits until they are there, also when cancelled.

        `settings`: `runtime_max_s`, `stop_timeout_s`. Raises JobFailed or OSError.
        """
        started = asyncio.ensure_future(self._request(
            "start_scope", unit=name, pids=list(pids), description=description, limits=limits.document(), **settings
        ))
        try:
            await asyncio.shield(started)
        except asyncio.CancelledError:
            # A cancelled caller ends the processes. If they exit before PID 1 has moved them, the scope fails.
            await asyncio.wait({started}, timeout=PLACED_MAX_S)
            if started.done() and not started.cancelled():
                started.exception()
            raise

    async def attach(self, name: str, pids: Sequence[int]) -> None:
        """Moves more processes into a scope that runs or is being started. Raises JobFailed or OSError."""
        # One turn of the loop, after which the request of a start_scope that began before this call has been sent.
        await asyncio.sleep(0)
        await self._request("attach", unit=name, pids=list(pids))

    async def set_limits(self, name: str, limits: Limits) -> None:
        """Changes the limits of a running scope, or of a zygote's service, which may be inactive. Raises OSError."""
        await self._ask("set_limits", unit=name, limits=limits.document())

    async def scope_limits(self, name: str) -> Limits:
        """The limits of a running scope. Raises OSError."""
        found = fields.mapping(await self._ask("scope_limits", unit=name), "ok")
        memory_bytes, cpu_weight, tasks = (
            fields.integer(found, limit, 0, INFINITY) for limit in ("memory_bytes", "cpu_weight", "tasks")
        )
        quota = found.get("cpu_quota")
        return Limits(memory_bytes, cpu_weight, float(quota) if isinstance(quota, int | float) else None, tasks)

    async def main_pid(self, name: str) -> int:
        """The main process of a zygote's service. Raises FileNotFoundError when it has none, and OSError."""
        return fields.integer(await self._ask("main_pid", unit=name), "ok", 1, PID_MAX)

    async def set_swap(self, name: str, size_bytes: int) -> None:
        """Changes MemorySwapMax of a running scope, which starts with 0. Raises OSError."""
        await self._ask("set_swap", unit=name, size_bytes=size_bytes)

    async def set_cpu_weight(self, name: str, weight: int) -> None:
        """Changes CPUWeight of a zygote's service, which may be inactive. Raises OSError."""
        await self._ask("set_cpu_weight", unit=name, weight=weight)

    async def reclaim(self, name: str, pid: int, size_bytes: int) -> bool:
        """Reclaims memory of the scope in which `pid` is, as Cgroup.reclaim. Raises OSError."""
        return (await self._request("reclaim", unit=name, pid=pid, size_bytes=size_bytes)).get("ok") is True

    async def prime(self) -> None:
        """Speeds up the next move of processes into a scope. Raises OSError."""
        await self._request("prime")

    async def start(self, name: str, *, anew: bool = False) -> None:
        """Starts a unit, or with `anew` restarts it, and waits until it is active. Raises JobFailed or OSError."""
        await self._request("start", unit=name, anew=anew)

    async def stop(self, name: str, *, at_once: bool = False) -> None:
        """Stops a unit and waits until it is inactive; does nothing when it is not loaded. Raises OSError.

        `at_once` sends SIGKILL instead of SIGTERM first, for processes that have nothing to save.
        """
        with contextlib.suppress(JobFailed):
            await self._request("stop", unit=name, at_once=at_once)

    async def check(self) -> None:
        """Returns when PID 1 has responded. Raises OSError."""
        await self._request("zygotes")

    async def scopes(self) -> list[str]:
        """The names of all slots' scopes that are neither inactive nor failed. Raises OSError."""
        return fields.texts(await self._ask("scopes"), "ok")

    async def zygotes(self) -> list[str]:
        """The names of all zygotes' services that are neither inactive nor failed, or of which limits are in /run.

        Raises OSError.
        """
        return fields.texts(await self._ask("zygotes"), "ok")

    async def is_stopping(self) -> bool:
        """Whether the host shuts down or reboots; False without a response within STOPPING_TIMEOUT_S."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(STOPPING_TIMEOUT_S):
                return (await self._request("is_stopping")).get("ok") is True
        return False

    async def _ask(self, op: str, **arguments: object) -> Mapping[str, object]:
        """The response to a request that takes PID 1 milliseconds. Raises OSError, TimeoutError among them."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._request(op, **arguments)
        except TimeoutError:
            raise TimeoutError(f"nbagent-units: {op}: no response within {TIMEOUT_S:g} s") from None

    async def _request(self, op: str, **arguments: object) -> Mapping[str, object]:
        """The response; other tasks run meanwhile. Raises JobFailed or OSError."""
        until_s = now() + RECONNECT_MAX_S
        while True:
            try:
                return await self._request_once(op, **arguments)
            except OSError as error:
                # After a connection that ended during the start of a scope, the scope may exist.
                is_reset = error.errno == errno.ECONNRESET and op != "start_scope"
                may_repeat = error.errno == errno.ENOTCONN or is_reset
                if not may_repeat or now() >= until_s:
                    raise
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _request_once(self, op: str, **arguments: object) -> Mapping[str, object]:
        for _ in range(1 if op == "start_scope" else TRIES):
            try:
                response = await self._requests.request({"op": op, **arguments})
            except ConnectionError:
                continue
            return _result(response)
        raise _unavailable(op)


def _unavailable(op: str) -> OSError:
    return OSError(f"nbagent-units: {op}: the service ended without a response; see journalctl -u nbagent-units")


def _result(response: Message) -> Mapping[str, object]:
    with response:
        try:
            response.raise_failure()
        except StepFailed as error:
            step, number, text = error.failure
            if step == JOB:
                raise JobFailed(text) from None
            raise (OSError(number, text.removeprefix(f"[Errno {number}] ")) if number else OSError(text)) from None
        return response.body
