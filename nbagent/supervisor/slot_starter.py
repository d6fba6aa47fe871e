# SPDX-License-Identifier: BSD-3-Clause
"""The start of a slot: from the policy's decision until it is warm, or has failed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import NbagentError, StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Slot, SlotState, new_id, new_token, now
from nbagent.image.store import Image
from nbagent.linux import cgroup
from nbagent.linux.cgroup import Cgroup
from nbagent.supervisor import readiness
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.launcher import Launcher, ended
from nbagent.supervisor.monitor import Monitor
from nbagent.supervisor.network import Network
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.sandbox_specs import default_limits, sandbox_spec
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import JobFailed, Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.wire.aio import readable

# The errors that a start has by design; any other is a fault of the supervisor, and is reported with its traceback.
EXPECTED = (NbagentError, OSError, JobFailed, TimeoutError)
# From a slot's last closed socket to the end of its first process.
END_SEEN_S = 2.0


class SlotStarter:
    """Starts slots, each in a task."""

    def __init__(
        self, config: CurrentConfig, slots: Slots, pools: Pools, records: Records, systemd: Systemd, launcher: Launcher,
        network: Network, monitor: Monitor, counters: Counters, stopper: SlotStopper, tasks: Tasks,
        cgroup_of: Callable[[int], Cgroup] = cgroup.of_process,
    ) -> None:
        self._config = config
        self._slots = slots
        self._pools = pools
        self._records = records
        self._systemd = systemd
        self._launcher = launcher
        self._network = network
        self._monitor = monitor
        self._counters = counters
        self._stopper = stopper
        self._tasks = tasks
        self._cgroup_of = cgroup_of

    def start(self, image: Image) -> None:
        """Begins the start of a slot for its image's pool."""
        live = self._new(image)
        live.task = self._tasks.spawn(self._bring_up(live, image))

    async def try_start(self, image: Image, use: Callable[[RunningSlot], Awaitable[None]]) -> tuple[RunningSlot, float]:
        """Starts a slot that no claim gets, awaits `use` of it, and ends it; the slot, and the seconds of its start.

        Raises StartFailed, also from `use`.
        """
        live, started = self._new(image), asyncio.get_running_loop().create_future()
        live.task = self._tasks.spawn(self._bring_up(live, image, started))
        try:
            took_s = await started
            await use(live)
            return live, took_s
        finally:
            started.cancel()
            self._stopper.end(live, Event.SLOT_RETIRED, "it was started as a trial")

    def _new(self, image: Image) -> RunningSlot:
        config, created_s = self._config.value, now()
        path, _, query = image.url.partition("?")
        slot = Slot(
            id=new_id(config.label),
            image=image.name,
            digest=image.digest,
            id_base=image.id_base,
            uid=self._slots.free_uid(image.id_base),
            state=SlotState.STARTING,
            limits=default_limits(config.slots),
            token=new_token(),
            created_s=created_s,
            ends_s=created_s + config.pool.max_age + config.slots.ttl_max,
            path=path,
            query=query,
        )
        live = RunningSlot(slot)
        self._slots.add(live)
        return live

    async def _bring_up(self, live: RunningSlot, image: Image, trial: asyncio.Future[float] | None = None) -> None:
        """Starts the slot. Whatever a start raises ends the slot, because one that stayed would keep its place.

        A slot that is started as a trial is not offered, and its failure lets no pool pause; `trial` gets the seconds
        of its start, or the error.
        """
        began_s = now()
        self._counters.add("starts")
        try:
            self._slots.set_addresses(live, await self._network.choose(self._slots.addresses))
            async with asyncio.timeout(self._config.value.slots.start_timeout):
                await self._launch(live, image)
            if trial is not None:
                # Because the cause of failed starts is mended.
                self._pools[image.name].resume()
                if not trial.done():
                    trial.set_result(now() - began_s)
            elif live.slot.state is SlotState.STARTING:
                self._offer(live, image, now() - began_s)
        except asyncio.CancelledError:
            self._stopper.end(live, Event.SLOT_RETIRED, "the supervisor stopped before the slot had started")
            if trial is not None:
                trial.cancel()
            raise
        except Exception as error:
            # The start of a slot that was ended meanwhile has not failed.
            if live.slot.state in (SlotState.STARTING, SlotState.WARM):
                self._fail(live, error, is_trial=trial is not None)
            if trial is not None and not trial.done():
                trial.set_exception(error if isinstance(error, StartFailed) else StartFailed(str(error) or repr(error)))
            if not isinstance(error, EXPECTED):
                raise  # the task's group reports it with its traceback

    def _offer(self, live: RunningSlot, image: Image, took_s: float) -> None:
        self._pools[image.name].resume()
        self._counters.start_seconds.observe(took_s)
        reach(Point.SERVES)
        self._slots.move(live, SlotState.WARM)
        self._monitor.add(live, now())
        emit(Event.SLOT_WARM, slot=live.slot.id, took_ms=round(took_s * 1000))
        self._pools.offer(live)

    async def _launch(self, live: RunningSlot, image: Image) -> None:
        slot, settings, router = live.slot, self._config.value.slots, self._config.value.router
        with self._records.create(slot, image.static) as listener:
            async def attach(netns_fd: int) -> None:
                await self._network.attach(slot, netns_fd)

            live.limit_files = self._records.limit_files(slot)
            reach(Point.RECORD_CREATED)
            scope = _SlotScope(self._systemd, slot, settings.stop_timeout)
            uplink, variables = self._network.uplink(slot), self._network.variables(slot)
            spec = sandbox_spec(
                slot, image, settings.storage_bytes, settings.start_timeout, uplink, router.assets_url or "", variables
            )._replace(limit_files=str(self._records.path / slot.id))
            launched = await self._launcher.launch(slot, spec, listener, scope, attach)
            live.attach(launched)
            self._counters.add("starts_fork" if launched.launch == "fork" else "starts_exec")
            try:
                live.cgroup = self._cgroup_of(launched.pid)
            except (FileNotFoundError, ProcessLookupError):
                raise ended(slot) from None
            live.slot = slot = dataclasses.replace(
                live.slot, pid=launched.pid, launch=launched.launch, launch_reason=launched.launch_reason
            )
        # From here on only the slot's own processes hold the listener, so a request fails when they end.
        if not launched.serves:
            await self._wait_until_ready(live, f"{slot.base_path}{image.ready}")
        self._monitor.watch(live)

    async def _wait_until_ready(self, live: RunningSlot, url: str) -> None:
        """Waits until the slot's program responds. Raises StartFailed if it ends before, or responds with an error."""
        response = asyncio.ensure_future(readiness.ready(self._records.http_path(live.slot), url))
        end = asyncio.ensure_future(readable(live.pidfd))
        try:
            await asyncio.wait({response, end}, return_when=asyncio.FIRST_COMPLETED)
            if response.done() and response.exception() is not None:
                # The socket of a program that ends is closed first, but the end is the reason to report.
                await asyncio.wait({end}, timeout=END_SEEN_S)
            if end.done():
                raise ended(live.slot)
            await response
        finally:
            for waiter in (response, end):
                waiter.cancel()
            await asyncio.gather(response, end, return_exceptions=True)

    def _fail(self, live: RunningSlot, error: Exception, *, is_trial: bool) -> None:
        image = live.slot.image
        text = str(error) or f"not ready after {self._config.value.slots.start_timeout:g} s"
        if not isinstance(error, EXPECTED):
            text = f"unexpected error: {error!r}"
        self._counters.add("start_failures")
        self._stopper.end(live, Event.SLOT_FAILED, text, SlotState.FAILED)
        if not is_trial:
            details = error.details if isinstance(error, NbagentError) else {}
            wait_s = self._pools.start_failed(image, StartFailed(text, **details))
            emit(Event.POOL_BACKOFF, image=image, failures=self._pools[image].failures, wait_s=wait_s)


class _SlotScope:
    """The scope of a slot, as a launcher uses it."""

    def __init__(self, systemd: Systemd, slot: Slot, stop_timeout_s: float) -> None:
        self._systemd, self._slot, self._stop_timeout_s = systemd, slot, stop_timeout_s

    async def start(self, pids: Sequence[int]) -> None:
        slot = self._slot
        await self._systemd.start_scope(
            slot.scope, pids, f"Notebook slot {slot.id}", slot.limits,
            runtime_max_s=slot.ends_s - slot.created_s, stop_timeout_s=self._stop_timeout_s,
        )
        reach(Point.SCOPE_STARTED)
        emit(Event.SLOT_STARTING, slot=slot.id, image=slot.image)

    async def add(self, pids: Sequence[int]) -> None:
        await self._systemd.attach(self._slot.scope, pids)

    async def stop(self) -> None:
        await self._systemd.stop(self._slot.scope, at_once=True)
