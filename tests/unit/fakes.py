# SPDX-License-Identifier: BSD-3-Clause
"""A host without systemd and processes: fakes of what the supervisor stands on, and the real supervisor over them.

Each fake has the interface of the real object, keeps its state in plain attributes, and can be made to fail or to wait.
A slot's process is an eventfd: it becomes readable when the process "ends", as a pidfd does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import ImageNotFound, StartFailed
from nbagent.core.events import Event
from nbagent.core.model import Limits, Slot
from nbagent.image.store import Image
from nbagent.launch.requests import OpenedSlot
from nbagent.linux.cgroup import Cgroup
from nbagent.policy.admission import Pressure
from nbagent.sandbox.spec import Uplink
from nbagent.supervisor import network
from nbagent.supervisor.calls import Calls
from nbagent.supervisor.composition import Supervisor, Surroundings, compose
from nbagent.supervisor.host_load import Memory
from nbagent.supervisor.launcher import Launched
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.wire import activity

LABEL = "c07"
UNTIL_S = 10.0
# The usage of each slot: 90 MiB of memory, at most 123 MiB, 2.5 s of a processor, 11 tasks.
CGROUP = {
    "memory.current": f"{90 << 20}\n", "memory.swap.current": f"{5 << 20}\n", "memory.swap.max": "0\n",
    "memory.peak": f"{123 << 20}\n",
    "memory.events": "oom 0\noom_kill 0\n", "cpu.stat": "usage_usec 2500000\n", "pids.current": "11\n",
    "pids.events": "max 0\n",
}


class FakeSystemd:
    """Scopes by name, each with the process in it; `calls` has what was requested, in order."""

    def __init__(self) -> None:
        self.units: dict[str, int | None] = {}
        self.limits: dict[str, Limits] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.scope_error: Exception | None = None
        self.limits_error: OSError | None = None
        self.stop_error: OSError | None = None
        self.check_error: OSError | None = None
        self.host_stops = False
        self._descriptors: list[int] = []

    async def start_scope(
        self, name: str, pids: Sequence[int], description: str, limits: Limits, **settings: float
    ) -> None:
        self.calls.append(("start_scope", name, settings["runtime_max_s"]))
        if self.scope_error is not None:
            raise self.scope_error
        self.units[name], self.limits[name] = None, limits

    def run(self, name: str) -> int:
        """Starts a process in a scope; returns the descriptor that becomes readable when it ends."""
        process = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._descriptors.append(process)
        self.units[name] = process
        return os.dup(process)

    def end(self, name: str) -> None:
        """Ends the processes of a scope, and with them the scope."""
        process = self.units.pop(name, None)
        if process is not None:
            os.eventfd_write(process, 1)

    async def start(self, name: str) -> None:
        self.calls.append(("start", name))

    async def attach(self, name: str, pids: Sequence[int]) -> None:
        self.calls.append(("attach", name))

    async def set_limits(self, name: str, limits: Limits) -> None:
        if self.limits_error is not None:
            raise self.limits_error
        self.limits[name] = limits

    async def scope_limits(self, name: str) -> Limits:
        return self.limits.get(name, Limits(1 << 30, 100, None, 256))

    async def check(self) -> None:
        if self.check_error is not None:
            raise self.check_error

    async def set_swap(self, name: str, size_bytes: int) -> None:
        self.calls.append(("set_swap", name, size_bytes))

    async def stop(self, name: str, *, at_once: bool = False) -> None:
        self.calls.append(("stop", name, at_once))
        await asyncio.sleep(0)
        if self.stop_error is not None:
            raise self.stop_error
        self.end(name)

    async def is_stopping(self) -> bool:
        return self.host_stops

    async def scopes(self) -> list[str]:
        return list(self.units)

    def stopped(self) -> list[str]:
        """The units that were stopped."""
        return [call[1] for call in self.calls if call[0] == "stop"]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class FakeLauncher:
    """Starts slots at once, or after `gate` opens; raises `error` if set."""

    def __init__(self, systemd: FakeSystemd) -> None:
        self.systemd = systemd
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.serves = True
        self.reason = ""
        self.launched: list[str] = []
        self.prepared = 0

    def hold(self) -> asyncio.Event:
        """Lets starts wait until the returned event is set."""
        self.gate = asyncio.Event()
        return self.gate

    def prepare(self) -> None:
        self.prepared += 1

    async def launch(self, slot: Slot, spec: Any, listener: Any, scope: Any, attach: Any) -> Launched:
        self.launched.append(slot.id)
        await scope.start([os.getpid()])
        if spec.uplink is not None:
            await attach(-1)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        process = self.systemd.run(slot.scope)
        return Launched(os.getpid(), process, activity.create(), self.serves, launch_reason=self.reason)


class FakeZygotes:
    """Images start by exec, save those in `forks`; the first zygote of those in `warming` is not ready yet."""

    def __init__(self) -> None:
        self.forks: set[str] = set()
        self.warming: set[str] = set()
        self.images: dict[str, Image] = {}
        self.reviews = 0
        self.counts = {"zygotes_ready": 1, "zygotes_failed": 0, "zygotes_adopted": 0}

    def want(self, images: Mapping[str, Image]) -> None:
        self.images = dict(images)

    def digests(self) -> set[str]:
        return {image.digest for name, image in self.images.items() if name in self.forks}

    def launch(self, image: str) -> str:
        return "fork" if image in self.forks else "exec"

    def reason(self, image: str) -> str:
        return "" if image in self.forks else 'launch = "exec" in the manifest'

    def is_warming(self, image: str) -> bool:
        return image in self.warming

    def stats(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"state": "ready", "replacing": False, "failures": 0, "forks": 3, "age_s": 60} for name in self.forks
        }

    def review(self) -> None:
        self.reviews += 1

    async def close(self) -> None:
        self.images = {}


class FakeNetwork:
    """Interfaces by slot id; `errors` has what an operation raises."""

    def __init__(self, config: CurrentConfig) -> None:
        self._config = config
        self.interfaces: dict[str, str] = {}
        self.errors: dict[str, StartFailed] = {}
        self.calls: list[str] = []
        self._numbers = itertools.count(2)

    @property
    def allowed(self) -> bool:
        return "internet" in self._config.value.network.allow

    async def choose(self, taken: Collection[str]) -> tuple[str, ...]:
        return (f"198.18.0.{next(self._numbers)}",) if self.allowed else ()

    def variables(self, slot: Slot) -> dict[str, str]:
        return network.variables(self._config.value.network, slot)

    def uplink(self, slot: Slot) -> Any:
        return Uplink(list(slot.addresses), ["198.18.0.1"], 10**8) if slot.addresses else None

    async def set_up(self) -> None:
        self._request("set_up")

    async def check(self) -> None:
        if self.allowed:
            self._request("check")

    async def attach(self, slot: Slot, netns_fd: int) -> None:
        self._request("attach")
        self.interfaces[slot.id] = "closed"

    async def open(self, slot: Slot) -> None:
        await asyncio.sleep(0)
        self._request("open")
        self.interfaces[slot.id] = "open"

    async def remove(self, slot: Slot) -> None:
        if slot.addresses:
            self._request("remove")
            self.interfaces.pop(slot.id, None)

    async def sweep(self, keep: Iterable[Slot]) -> None:
        self._request("sweep")
        kept = {slot.id for slot in keep}
        self.interfaces = {name: state for name, state in self.interfaces.items() if name in kept}

    def _request(self, operation: str) -> None:
        self.calls.append(operation)
        if operation in self.errors:
            raise self.errors[operation]


class FakeStore:
    """Images by name."""

    def __init__(self, *images: Image) -> None:
        self.images = {image.name: image for image in images}
        self.used: set[str] = set()
        self.removed: list[str] = []
        self.unreadable: dict[str, Exception] = {}
        self.retire_error: OSError | None = None

    def list(self, skipped: Callable[[str, Exception], None]) -> list[Image]:
        for name, error in self.unreadable.items():
            skipped(name, error)
        return [image for name, image in self.images.items() if name not in self.unreadable]

    def get(self, name: str) -> Image:
        if name not in self.images:
            raise ImageNotFound(f"no image has the name {name!r}", image=name)
        return self.images[name]

    def retire(self, used: Collection[str]) -> Sequence[str]:
        if self.retire_error is not None:
            raise self.retire_error
        self.used = set(used)
        return self.removed

    def has_retired(self) -> bool:
        return bool(self.removed)


def make_image(path: Path, name: str = "minimal", digest: str = "sha256-0", launch: str = "exec") -> Image:
    """An image whose files are those of `path`."""
    return Image(
        name=name, digest=digest, root=path, static=path, id_base=1 << 20, python="/usr/bin/python3", command=(),
        port=None, ready="api", url="lab?token={token}", home="/home/jovyan", directory="/home/jovyan", user="jovyan",
        launch=launch, preload=(), environment={},
    )


class Host:
    """The real supervisor over fakes, as an asynchronous context manager; `events` has the journal's entries.

    `stop` leaves slots running, as a restart of the supervisor does; a second Host over the same `systemd` and `path`
    finds them.
    """

    def __init__(self, path: Path, systemd: FakeSystemd | None = None, **tables: Any) -> None:
        self.path = path
        self.tables = {
            "host": {"label": LABEL, "memory_reserve": "1M"},
            "pool": {"warm": 1, "starts": 4},
            "slots": {"capacity": 4},
            **tables,
        }
        self.config = CurrentConfig(host_config.parse(self.tables))
        self.systemd = systemd or FakeSystemd()
        self.launcher = FakeLauncher(self.systemd)
        self.zygotes = FakeZygotes()
        self.network = FakeNetwork(self.config)
        self.store = FakeStore(make_image(path))
        for name in ("slots", "cgroup"):
            (path / name).mkdir(exist_ok=True)
        for name, text in CGROUP.items():
            (path / "cgroup" / name).write_text(text)
        self.records = Records(path / "slots")
        self.memory, self.pressure = Memory(64 << 30, 32 << 30), Pressure()
        self.open_error: Exception | None = None
        self.changed: asyncio.Event
        self.supervisor: Supervisor
        self._loop: asyncio.Task[None]

    async def __aenter__(self) -> Host:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        self.systemd.close()

    async def start(self) -> None:
        """Adopts what is there and starts the loop."""
        self.changed = asyncio.Event()
        self.supervisor = compose(Surroundings(
            self.config, self.systemd, self.store, self.launcher, self.zygotes, self.records, self.network,
            self.path / "drain", self.changed, lambda: self.memory, lambda _: self.pressure, self._cgroup_of,
            self.path / "router-check.sock", open_slot=self._open_slot,
        ))
        await self.supervisor.adoption.run()
        self.supervisor.images.refresh()
        self._loop = asyncio.ensure_future(self.supervisor.agent.run())

    async def _open_slot(self, scope: str, pid: int) -> OpenedSlot:
        """The launch service's response about a slot."""
        if self.open_error is not None:
            raise self.open_error
        return OpenedSlot(*(os.open("/dev/null", os.O_RDONLY) for _ in OpenedSlot._fields))

    def _cgroup_of(self, pid: int) -> Cgroup:
        """A cgroup of version 2 in plain files, the same for every slot."""
        group = str(self.path / "cgroup")
        return Cgroup(group, group, group)

    async def stop(self) -> None:
        """Ends the supervisor and none of its claimed or warm slots."""
        await self.supervisor.agent.stop()
        await self._loop
        for live in self.slots.values():
            live.close()

    @property
    def slots(self) -> Mapping[str, RunningSlot]:
        return self.supervisor.slots

    @property
    def calls(self) -> Calls:
        return self.supervisor.calls

    def reload(self, **tables: Any) -> None:
        """Reloads the configuration with other settings."""
        self.supervisor.agent.reload(host_config.parse(self.tables | tables))

    def refresh_images(self) -> None:
        self.supervisor.images.refresh()

    def wake(self) -> None:
        self.changed.set()

    async def claim(self, key: str = "", trace: str = "", **options: Any) -> dict[str, Any]:
        """A claim, with a key of its own unless one is given."""
        return await self.calls.claim(options, key or os.urandom(8).hex(), "192.0.2.1", trace)

    def states(self) -> dict[str, str]:
        return {name: live.slot.state.value for name, live in self.slots.items()}

    async def until_states(self, *states: str) -> list[str]:
        """Waits until the slots are in exactly these states; returns their ids."""
        await until(lambda: sorted(self.states().values()) == sorted(states), self.states)
        return list(self.slots)

    async def gone(self, slot_id: str) -> None:
        """Waits until no slot has this id."""
        await until(lambda: slot_id not in self.slots, self.states)


async def until(condition: Callable[[], Any], shown: Callable[[], Any] = lambda: "") -> None:
    """Lets other tasks run until a condition holds."""
    try:
        async with asyncio.timeout(UNTIL_S):
            while not condition():
                await asyncio.sleep(0)
    except TimeoutError:
        raise AssertionError(f"the condition does not hold after {UNTIL_S:g} s: {shown()}") from None


async def turns(count: int = 20) -> None:
    """Lets every task run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def kinds(entries: list[dict[str, str]]) -> list[Event]:
    """The events of journal entries."""
    by_id = {event.value.message_id: event for event in Event}
    return [by_id[entry["MESSAGE_ID"]] for entry in entries]
