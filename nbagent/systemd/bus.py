# SPDX-License-Identifier: BSD-3-Clause
"""systemd's manager, by pystemd; the only module that knows pystemd and its lack of types.

The connection is PID 1's own socket, which systemctl uses too, and not the system bus: so no slot depends on
dbus-daemon. It ends when PID 1 executes itself anew (`systemctl daemon-reexec`, an upgrade of systemd). Then it is
opened again, and the jobs that were under way have failed, because the signals of their ends are lost.

A method call blocks the event loop until PID 1 replies: about 3 ms for a scope, 1.2 ms for a change of limits, and at
most $SYSTEMD_BUS_TIMEOUT. Jobs are awaited instead: the event loop watches the bus's descriptor, and the signal
JobRemoved completes a job's future.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pystemd import dbusexc
from pystemd.dbuslib import DBusAddress
from pystemd.systemd1 import Manager
from pystemd.systemd1.unit_signatures import KNOWN_UNIT_SIGNATURES

from nbagent.core.events import Event, emit
from nbagent.core.model import Limits
from nbagent.systemd.job import JobFailed

SLICE = "nbagent-slots.slice"
# Waits for users at a shutdown, if it is enabled; slots are stopped after it.
DRAIN = "nbagent-drain.service"
ZYGOTES = "nbagent-zygote@"
# Where PID 1 keeps properties that were set at run time, as drop-ins of each unit.
CONTROL = Path("/run/systemd/system.control")
# The same for transient units. PID 1 removes the drop-ins with the unit, but not the directory of one that it could not
# write because /run was full.
TRANSIENT = Path("/run/systemd/transient")
INFINITY = 2**64 - 1
# The signals for which the units service has handlers, and which therefore interrupt a call.
HANDLED = (signal.SIGINT, signal.SIGTERM)

PRIVATE_ADDRESS = b"unix:path=/run/systemd/private"
# Between two attempts to connect. PID 1 needs a fraction of a second to execute itself.
RECONNECT_S = 0.2

# PID 1 needs milliseconds to move processes into a scope, but seconds while it starts a thousand others.
PLACED_MAX_S = 5.0
# A job usually takes milliseconds, and the stop of a claimed slot up to slots.stop_timeout.
JOB_CHECK_S = 1.0

# Property types that pystemd 0.11 (Debian 12) lacks.
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


Value = bool | int | bytes | Sequence[int] | Sequence[bytes]


class _Message(Protocol):
    """The part of pystemd's DbusMessage that is used here; `body` as in JobRemoved: number, path, unit, result."""

    body: tuple[int, bytes, bytes, bytes]

    def is_empty(self) -> bool: ...

    def process_reply(self, with_headers: bool, /) -> None: ...


class Systemd:
    """The systemd manager of this host, for one event loop.

    While it is not connected, each call raises OSError. `before_call` runs before each call, which may block the loop.
    """

    def __init__(self, before_call: Callable[[], object] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._before_call = before_call
        self._jobs: dict[bytes, asyncio.Future[str]] = {}
        # The ends of the starts that are under way, by the name of the scope.
        self._starting: dict[str, asyncio.Future[None]] = {}
        self._reopening: asyncio.TimerHandle | None = None
        self._open()

    def _open(self) -> None:
        """Connects. Raises DBusBaseError or OSError."""
        self._bus: Any = DBusAddress(PRIVATE_ADDRESS, True)
        self._bus.open()
        self._manager: Any = Manager(bus=self._bus, _autoload=True)

        # A function, because pystemd sets an attribute on the callback, which bound methods do not support. It is kept
        # in self, because pystemd holds no reference to it: after its collection the next signal would crash Python.
        def job_removed(message: _Message, error: object = None, userdata: object = None) -> None:
            self._job_removed(message)

        self._callback = job_removed
        # Signals on a connection of two peers have no sender.
        self._bus.match_signal(None, *_MANAGER[1:], b"JobRemoved", job_removed, None)
        self._manager.Manager.Subscribe()
        # A descriptor of its own, because sd-bus closes its descriptor at the end of the connection.
        self._socket = socket.socket(fileno=os.dup(self._bus.get_fd()))
        self._loop.add_reader(self._socket.fileno(), self._process)

    def close(self) -> None:
        """Closes the connection and cancels the futures of all jobs."""
        if self._reopening is not None:
            self._reopening.cancel()
        else:
            self._disconnect()
        for job in self._jobs.values():
            job.cancel()

    def _disconnect(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._bus.close()

    def _lost(self) -> None:
        """Handles the end of the connection. Jobs fail, because their signals may have been missed."""
        self._disconnect()
        for job in self._jobs.values():
            if not job.done():
                job.set_exception(JobFailed("the connection to systemd ended during a job"))
        emit(Event.SYSTEMD_LOST)
        self._reopening = self._loop.call_later(RECONNECT_S, self._reopen)

    def _reopen(self) -> None:
        try:
            self._open()
        except (dbusexc.DBusBaseError, OSError):
            self._bus.close()
            self._reopening = self._loop.call_later(RECONNECT_S, self._reopen)
        else:
            self._reopening = None

    def _has_ended(self) -> bool:
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def start_scope(
        self, name: str, pids: Sequence[int], description: str, limits: Limits, **settings: float
    ) -> None:
        """Moves processes into a new scope in the slots' slice and waits until they are there, also when cancelled.

        `settings`: `runtime_max_s`, `stop_timeout_s`. Raises JobFailed or OSError.
        """
        started = self._starting[name] = self._loop.create_future()
        try:
            await self._start_scope(name, pids, description, limits, **settings)
        finally:
            self._starting.pop(name, None)
            started.set_result(None)

    async def _start_scope(
        self, name: str, pids: Sequence[int], description: str, limits: Limits, **settings: float
    ) -> None:
        properties: dict[bytes, Value] = {
            b"Before": [DRAIN.encode()],
            b"CollectMode": b"inactive-or-failed",
            b"CPUAccounting": True,
            # Delegation without controllers, because AttachProcessesToUnit accepts only delegated units. The slot's
            # processes do not see the cgroup file system.
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
            # Some builds of systemd 249 and 252 lack OOMPolicy for scopes, and stop the scope after an OOM kill.
            if "OOMPolicy" not in str(error):
                raise
            del properties[b"OOMPolicy"]
            job = self._call("StartTransientUnit", name.encode(), b"fail", properties)
        await self._wait_for(job, also_when_cancelled=True)

    async def attach(self, name: str, pids: Sequence[int]) -> None:
        """Moves more processes into a scope that runs or is being started. Raises OSError."""
        if (started := self._starting.get(name)) is not None:
            await asyncio.wait({started})
        self._call("AttachProcessesToUnit", name.encode(), b"", list(pids))

    def set_limits(self, name: str, limits: Limits) -> None:
        """Changes the limits of a running scope. Raises OSError."""
        self._call("SetUnitProperties", name.encode(), True, _limits(limits))

    def scope_limits(self, name: str) -> Limits:
        """The limits of a running scope. Raises OSError."""
        path = self._call("GetUnit", name.encode())

        def get(prop: bytes) -> int:
            scope = b"org.freedesktop.systemd1.Scope"
            return int(self._guarded(lambda: self._bus.get_property(_MANAGER[0], path, scope, prop, b"t")))

        quota = get(b"CPUQuotaPerSecUSec")
        return Limits(
            memory_bytes=get(b"MemoryMax"), cpu_weight=get(b"CPUWeight"), tasks=get(b"TasksMax"),
            cpu_quota=None if quota == INFINITY else quota / 1_000_000,
        )

    def set_swap(self, name: str, size_bytes: int) -> None:
        """Changes MemorySwapMax of a running scope, which starts with 0. Raises OSError."""
        self._call("SetUnitProperties", name.encode(), True, {b"MemorySwapMax": size_bytes})

    def set_cpu_weight(self, name: str, weight: int) -> None:
        """Changes CPUWeight of a service, which may be inactive. Raises OSError.

        systemd keeps the value as a drop-in in /run until the host reboots or RevertUnitFiles removes it.
        """
        self._call("SetUnitProperties", name.encode(), True, {b"CPUWeight": weight})

    async def start(self, name: str, *, anew: bool = False) -> None:
        """Starts a unit, or with `anew` restarts it, and waits until it is active. Raises JobFailed or OSError."""
        await self._wait_for(self._call("RestartUnit" if anew else "StartUnit", name.encode(), b"replace"))

    async def stop(self, name: str, *, at_once: bool = False) -> None:
        """Stops a unit and waits until it is inactive; does nothing when it is not loaded. Raises OSError.

        `at_once` sends SIGKILL instead of SIGTERM first, for processes that have nothing to save. PID 1 of a pid
        namespace receives no SIGTERM before it has a handler for it, and the stop would take its whole timeout.
        """
        try:
            if at_once:
                self._call("KillUnit", name.encode(), b"all", int(signal.SIGKILL))
            job = self._call("StopUnit", name.encode(), b"replace")
        except FileNotFoundError:
            self._revert(name)
            return
        with contextlib.suppress(JobFailed):
            await self._wait_for(job)
        self._revert(name)

    def _revert(self, name: str) -> None:
        """Removes drop-ins of limits that the unit's end may leave.

        ExecStopPost= of a zygote removes them too, but not while PID 1 has no id for a process.
        """
        if name.startswith(ZYGOTES) or (TRANSIENT / f"{name}.d").is_dir():
            with contextlib.suppress(OSError):
                self._call("RevertUnitFiles", [name.encode()])

    def main_pid(self, name: str) -> int:
        """The main process of a service. Raises FileNotFoundError when the unit is not loaded or has none."""
        path = self._call("GetUnit", name.encode())
        service = b"org.freedesktop.systemd1.Service"
        pid = self._guarded(lambda: self._bus.get_property(_MANAGER[0], path, service, b"MainPID", b"u"))
        if not pid:
            raise FileNotFoundError(f"{name} has no main process")
        return int(pid)

    def scopes(self) -> Iterator[str]:
        """The names of all slots' scopes that are neither inactive nor failed."""
        return self._active_units(b"nbagent-*.scope")

    def zygotes(self) -> Iterator[str]:
        """The names of all zygotes' services that are neither inactive nor failed, or of which limits are in /run.

        Limits are left when a supervisor or this service ends between them and the start.
        """
        yield from self._active_units(f"{ZYGOTES}*.service".encode())
        for drop_ins in CONTROL.glob(f"{ZYGOTES}*.service.d"):
            yield drop_ins.stem

    def is_stopping(self) -> bool:
        """Whether the host shuts down or reboots. Raises OSError."""
        state = self._guarded(lambda: self._bus.get_property(*_MANAGER, b"SystemState", b"s"))
        return bool(state == b"stopping")

    def _active_units(self, pattern: bytes) -> Iterator[str]:
        for name, _, _, active_state, *_ in self._call("ListUnitsByPatterns", [], [pattern]):
            if active_state not in (b"inactive", b"failed"):
                yield name.decode()

    def _call(self, method: str, *arguments: Value | Mapping[bytes, Value]) -> Any:
        return self._guarded(lambda: getattr(self._manager.Manager, method)(*arguments))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        if self._reopening is not None:
            raise OSError(errno.ENOTCONN, "not connected to systemd")
        self._before_call()
        # A signal during a call makes sd-bus return EINTR although the reply follows. Blocked signals are handled after
        # the call.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            result = call()
        except dbusexc.DBusNoSuchUnitError as error:
            raise FileNotFoundError(errno.ENOENT, _text(error)) from error
        except dbusexc.DBusBaseError as error:
            self._loop.call_soon(self._process)
            if self._has_ended():
                raise OSError(errno.ECONNRESET, "the connection to systemd ended during a call") from error
            raise OSError(_text(error)) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # sd-bus can have read D-Bus signals into its queue while it waited for the reply. They make the descriptor
        # not readable, so that the event loop's reader would not process them.
        self._loop.call_soon(self._process)
        return result

    async def _wait_for(self, job: bytes, *, also_when_cancelled: bool = False) -> None:
        # There is no await between the call and this line: JobRemoved can be processed in the next loop iteration.
        future = self._jobs.setdefault(job, self._loop.create_future())
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=JOB_CHECK_S)
                if not future.done():
                    self._check_job(job, future)
            result = future.result()
        except asyncio.CancelledError:
            if also_when_cancelled:
                # A cancelled caller ends the processes. If they exit before PID 1 has moved them, the scope fails.
                await asyncio.wait({future}, timeout=PLACED_MAX_S)
            raise
        finally:
            self._jobs.pop(job, None)
        if result != "done":
            raise JobFailed(f"job {job.decode()} ended as {result}")

    def _check_job(self, job: bytes, future: asyncio.Future[str]) -> None:
        """Ends the wait for a job that has ended without a signal that reached this process.

        sd_bus_process() also returns no message when it has done something else, and then leaves signals in its queue.
        """
        self._process()
        if future.done() or self._reopening is not None:
            return
        try:
            self._call("GetJob", int(job.rpartition(b"/")[2]))
        except OSError as error:
            if future.done() or "does not exist" not in str(error):
                return
            sys.stderr.write(f"{job.decode()} has ended without the signal JobRemoved\n")
            future.set_result("done")

    def _process(self) -> None:
        if self._reopening is not None:
            return
        try:
            while not self._bus.process().is_empty():
                pass
        except dbusexc.DBusBaseError:
            self._lost()
            return
        if self._has_ended():
            self._lost()

    def _job_removed(self, message: _Message) -> None:
        message.process_reply(False)
        _, job, _, result = message.body
        if (future := self._jobs.get(job)) and not future.done():
            future.set_result(result.decode())


def _text(error: Exception) -> str:
    """The message of systemd in pystemd's text, which has the form of bytes, and a name and a number before it."""
    line = str(error).partition("\n")[0]
    found = re.fullmatch(r"(.*?)\s*\[err -?\d+\]: (.*)", line)
    text = re.sub(r"b(['\"])(.*)\1", r"\2", found[2] or found[1] if found else line)
    return f"systemd: {text}"


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _limits(limits: Limits) -> Mapping[bytes, Value]:
    quota = INFINITY if limits.cpu_quota is None else round(limits.cpu_quota * 1_000_000)
    return {
        b"CPUQuotaPerSecUSec": quota,
        b"CPUWeight": limits.cpu_weight,
        b"MemoryMax": limits.memory_bytes,
        b"MemorySwapMax": 0,
        b"TasksMax": limits.tasks,
    }
