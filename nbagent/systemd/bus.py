"""systemd's manager over the system bus, by pystemd; the only place that knows its shapes.

Calls block for the few milliseconds that PID 1 takes (3 ms for a scope, 1.2 ms for a change of
limits; shared/facts.md), jobs are awaited: the bus's descriptor is watched by the event loop and
JobRemoved wakes whoever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pystemd import dbusexc
from pystemd.dbuslib import DBus
from pystemd.systemd1 import Manager
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES

from nbagent.core.model import Limits

SLICE = "nbagent-slots.slice"
INFINITY = 2**64 - 1
# The signals that the supervisor handles; no other interrupts a call.
HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

# PID 1 takes milliseconds to put processes into a scope, or seconds when it is busy with a thousand others.
PLACED_MAX_S = 5.0

# What Debian 12's pystemd 0.11 does not know yet.
KNOWN_UNIT_SIGNATURES.update(
    {
        b"CPUAccounting": b"b",
        b"CPUWeight": b"t",
        b"DelegateControllers": b"as",
        b"MemoryAccounting": b"b",
        b"OOMPolicy": b"s",
        b"PIDs": b"au",
        b"TasksAccounting": b"b",
    }
)

_MANAGER = (b"org.freedesktop.systemd1", b"/org/freedesktop/systemd1", b"org.freedesktop.systemd1.Manager")


class JobFailed(Exception):
    """A job ended otherwise than done: timeout, failed, canceled, dependency, skipped."""


class Systemd:
    """The manager of this host, for one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bus: Any = DBus()
        self._bus.open()
        self._manager: Any = Manager(bus=self._bus, _autoload=True)
        self._jobs: dict[bytes, asyncio.Future[str]] = {}

        # pystemd hangs an attribute on the callback, which a bound method refuses, and keeps no
        # reference to it: one that is collected crashes the process at the next signal.
        def job_removed(message: Any, error: Any = None, userdata: Any = None) -> None:
            self._job_removed(message)

        self._callback = job_removed
        self._bus.match_signal(*_MANAGER, b"JobRemoved", job_removed, None)
        self._manager.Manager.Subscribe()
        self._loop.add_reader(self._bus.get_fd(), self._process)

    def close(self) -> None:
        """Lets go of the bus; what waits for a job is cancelled."""
        self._loop.remove_reader(self._bus.get_fd())
        self._bus.close()
        for job in self._jobs.values():
            job.cancel()

    async def start_scope(
        self, name: str, pids: Sequence[int], description: str, limits: Limits, **settings: float
    ) -> None:
        """Puts processes into a new scope below the slots' slice, and waits until they are there, when cancelled too.

        `settings`: `runtime_max_s`, `stop_timeout_s`. Raises JobFailed or OSError.
        """
        properties: dict[bytes, Any] = {
            b"CollectMode": b"inactive-or-failed",
            b"CPUAccounting": True,
            # No controller is delegated and nobody inside sees the cgroup; but only such a unit takes another
            # process later (AttachProcessesToUnit).
            b"DelegateControllers": [],
            b"Description": description.encode(),
            b"MemoryAccounting": True,
            b"OOMPolicy": b"continue",
            b"PIDs": list(pids),
            b"RuntimeMaxUSec": _usec(settings["runtime_max_s"]),
            b"Slice": SLICE.encode(),
            b"TasksAccounting": True,
            b"TimeoutStopUSec": _usec(settings["stop_timeout_s"]),
            **_limits(limits),
        }
        try:
            job = self._call("StartTransientUnit", name.encode(), b"fail", properties)
        except OSError as error:
            # Some builds of 249 and 252 refuse this one; without it an OOM kill ends the scope.
            if "OOMPolicy" not in str(error):
                raise
            del properties[b"OOMPolicy"]
            job = self._call("StartTransientUnit", name.encode(), b"fail", properties)
        await self._done(job, also_when_cancelled=True)

    def attach(self, name: str, pids: Sequence[int]) -> None:
        """Puts more processes into a running scope. Raises OSError."""
        self._call("AttachProcessesToUnit", name.encode(), b"", list(pids))

    def set_limits(self, name: str, limits: Limits) -> None:
        """Changes the limits of a running scope. Raises OSError."""
        self._call("SetUnitProperties", name.encode(), True, _limits(limits))

    def set_swap(self, name: str, size_bytes: int) -> None:
        """Changes how much memory of a running scope may be swapped out; 0 as it starts. Raises OSError."""
        self._call("SetUnitProperties", name.encode(), True, {b"MemorySwapMax": size_bytes})

    def set_cpu_weight(self, name: str, weight: int) -> None:
        """Changes the weight of a service, or sets that of one that is started next. Raises OSError.

        systemd keeps it in a file until the host ends, or it is told to forget that (RevertUnitFiles).
        """
        self._call("SetUnitProperties", name.encode(), True, {b"CPUWeight": weight})

    async def start(self, name: str, *, anew: bool = False) -> None:
        """Starts a unit, or starts it `anew`, and waits until it runs. Raises JobFailed or OSError."""
        await self._done(self._call("RestartUnit" if anew else "StartUnit", name.encode(), b"replace"))

    async def stop(self, name: str, *, at_once: bool = False) -> None:
        """Ends a unit and waits for its end; one that is not there has ended. Raises OSError.

        `at_once` spares its processes the SIGTERM, for those that have nothing to save. The first
        process of a pid namespace does not even hear one before it has a handler.
        """
        try:
            if at_once:
                self._call("KillUnit", name.encode(), b"all", int(signal.SIGKILL))
            job = self._call("StopUnit", name.encode(), b"replace")
        except FileNotFoundError:
            return
        with contextlib.suppress(JobFailed):
            await self._done(job)

    def scopes(self) -> Iterator[str]:
        """The names of all slots' scopes that are not inactive."""
        for unit in self._call("ListUnitsByPatterns", [], [b"nbagent-*.scope"]):
            if unit[3] not in (b"inactive", b"failed"):
                yield unit[0].decode()

    def zygotes(self) -> Iterator[str]:
        """The names of all zygotes' units that are not inactive."""
        for unit in self._call("ListUnitsByPatterns", [], [b"nbagent-zygote@*.service"]):
            if unit[3] not in (b"inactive", b"failed"):
                yield unit[0].decode()

    def _call(self, method: str, *arguments: Any) -> Any:
        # A signal would break off the wait for an answer that comes all the same, and sd-bus calls that EINTR: a
        # reload of the agent would fail the start of a slot. It is handled when the call is over.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            result = getattr(self._manager.Manager, method)(*arguments)
        except dbusexc.DBusNoSuchUnitError as error:
            raise FileNotFoundError(str(error)) from error
        except dbusexc.DBusBaseError as error:
            raise OSError(str(error)) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # sd-bus may have read signals while it waited for the answer; the descriptor is then
        # not readable any more, and nobody else would look.
        self._loop.call_soon(self._process)
        return result

    async def _done(self, job: bytes, *, also_when_cancelled: bool = False) -> None:
        # In the turn of the loop that made the call: in the next one the signal may be here.
        future = self._jobs.setdefault(job, self._loop.create_future())
        try:
            result = await asyncio.shield(future)
        except asyncio.CancelledError:
            if also_when_cancelled:
                # Who gives up lets the processes end; to PID 1 that is a scope that failed, unless they are in it.
                await asyncio.wait({future}, timeout=PLACED_MAX_S)
            raise
        finally:
            self._jobs.pop(job, None)
        if result != "done":
            raise JobFailed(f"job {job.decode()} ended as {result}")

    def _process(self) -> None:
        while not self._bus.process().is_empty():
            pass

    def _job_removed(self, message: Any) -> None:
        message.process_reply(False)
        _, job, _, result = message.body
        if (future := self._jobs.get(job)) and not future.done():
            future.set_result(result.decode())


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _limits(limits: Limits) -> Mapping[bytes, Any]:
    quota = INFINITY if limits.cpu_quota is None else int(limits.cpu_quota * 1_000_000)
    return {
        b"CPUQuotaPerSecUSec": quota,
        b"CPUWeight": limits.cpu_weight,
        b"MemoryMax": limits.memory_bytes,
        b"MemorySwapMax": 0,
        b"TasksMax": limits.tasks,
    }
