"""The agent: owns the slots of this host and moves each through its life. What callers ask is `calls`.

Everything happens in one event loop. Events (a claim, a process that ended, a start that failed,
a signal) change the state and wake `run`, which asks the policy what to do next and does it.
Slow things are tasks: one for a slot's start, one for its end. Nothing here polls a slot.

What the agent promises: a slot is handed out once; nobody but its owner learns its token; what
is not claimed or adopted is cleaned away; ending a slot may be asked for twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nbagent.config.host_config import HostConfig, SlotSettings
from nbagent.core.errors import NbagentError, StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Limits, Slot, SlotState, new_id, new_token, now
from nbagent.core.quantities import parse_quota
from nbagent.image.store import Image, ImageStore
from nbagent.policy import admission, pool
from nbagent.supervisor import readiness
from nbagent.supervisor.aio import readable
from nbagent.supervisor.compressor import Compressor
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.launcher import Launcher, ended, sandbox_spec
from nbagent.supervisor.monitor import Monitor
from nbagent.supervisor.network import Network
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot, reattach
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.zygotes import Zygotes
from nbagent.systemd.bus import JobFailed, Systemd

# From a slot's last closed socket to the end of its first process.
END_SEEN_S = 2.0
# From the SIGKILL of a slot's processes to the end of the last.
END_MAX_S = 60.0
# /proc/meminfo takes the kernel and us longer to write and read than all else that an event costs. In this time starts
# touch a few MiB that are then counted neither as set aside nor as used.
MEMORY_AGE_S = 0.1
NO_INTERFACE = "made before a network was allowed"


@dataclass
class PoolState:
    """What the agent remembers of one image's pool."""

    image: Image | None
    warm: deque[RunningSlot] = field(default_factory=deque)
    waiting: deque[asyncio.Future[RunningSlot]] = field(default_factory=deque)
    failures: int = 0
    not_before_s: float = 0.0
    last_failure: StartFailed | None = None

    def count_waiting(self) -> int:
        """The claims that wait for a slot of it."""
        return sum(not claim.done() for claim in self.waiting)


class Agent:
    """The slots of one host."""

    def __init__(
        self,
        config: HostConfig,
        systemd: Systemd,
        store: ImageStore,
        launcher: Launcher,
        zygotes: Zygotes,
        records: Records,
        network: Network,
        drain_file: Path,
    ) -> None:
        self.config = config
        self.systemd = systemd
        self.store = store
        self.launcher = launcher
        self.zygotes = zygotes
        self.records = records
        self.network = network
        self.drain_file = drain_file
        self.slots = Slots()
        self.pools: dict[str, PoolState] = {}
        self.gone: Callable[[Slot], None] = lambda slot: None
        self.counters = Counters()
        self.compressor = Compressor(systemd, self.counters, self.spawn)
        self.monitor = Monitor(self.counters, self.end, self.compressor.offer)
        self.started_s = now()
        self.stopping = False
        self._memory_read_s, self._memory_bytes = -math.inf, (0, 0)
        self.label = config.label
        # Each os.cpu_count() reads a file.
        self.cpus = os.cpu_count() or 1
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._cleaning: set[asyncio.Task[Any]] = set()

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconciles until `stop`; wakes when something changed, and to look at the rules."""
        while not self.stopping:
            self._changed.clear()
            self._apply(self._decide())
            self.zygotes.review()
            interval_s = self.config.cull.interval
            if now() >= self.monitor.next_s(interval_s):
                self.monitor.sample(self.config.cull, now())
            next_s = min(self._next_s(now() + interval_s), self.monitor.next_s(interval_s))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.05, next_s - now()))

    def wake(self) -> None:
        """Says that something changed, so that `run` looks what to do."""
        self._changed.set()

    async def stop(self) -> None:
        """Ends what is half made and leaves every other slot as it is."""
        self.stopping = True
        self.wake()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._cleaning, return_exceptions=True)
        await self.zygotes.close()

    def reload(self, config: HostConfig) -> None:
        """Takes new settings and looks again at the images; no slot is touched by this itself."""
        self.config = self.zygotes.config = config
        self.network.reload(config)
        self.spawn(self._set_up_network())
        for state in self.pools.values():
            for live in list(state.warm):
                if self.network.allowed and not live.slot.addresses:
                    self.end(live, Event.SLOT_RETIRED, text=NO_INTERFACE)
        self.refresh_images()

    def refresh_images(self) -> None:
        """Makes a pool of every image in the store, and removes image trees nothing uses."""
        images = {image.name: image for image in self.store.list()}
        for name in images.keys() | self.pools.keys():
            state = self.pools.setdefault(name, PoolState(None))
            if state.image != images.get(name):
                state.failures, state.not_before_s = 0, 0.0
            state.image = images.get(name)
        self.zygotes.want(images)
        # A slot starts on the image of its pool, whatever the name means by now, so that is in use too.
        current = {state.image.digest for state in self.pools.values() if state.image is not None}
        used = {live.slot.digest for live in self.slots.values()} | self.zygotes.digests()
        retired = self.store.retire(current | used)
        self.spawn(self._sweep(retired))
        self.wake()

    async def _sweep(self, retired: list[str]) -> None:
        """Deletes image trees: tens of thousands of files, so beside the loop."""
        await asyncio.to_thread(self.store.sweep)
        for digest in retired:
            emit(Event.IMAGE_REMOVED, digest=digest)

    async def adopt(self) -> int:
        """Takes over the slots that outlived the agent and removes what is half made.

        Returns how many were adopted.
        """
        scopes, unsettled = set(self.systemd.scopes()), False
        for name, slot in list(self.records.load()):
            settled = slot is not None and slot.state in (SlotState.WARM, SlotState.CLAIMED)
            live = reattach(slot) if slot is not None and settled and slot.scope in scopes else None
            scopes.discard(f"nbagent-{name}.scope")
            if live is None:
                unsettled = unsettled or (slot is not None and bool(slot.addresses))
                await self.systemd.stop(f"nbagent-{name}.scope", at_once=True)
                self.records.remove(name)
                emit(Event.SLOT_REMOVED, slot=name, text=_why_not(slot, settled))
                continue
            self.slots.add(live)
            self._watch(live)
            state = self.pools.setdefault(live.slot.image, PoolState(None))
            if live.slot.state is SlotState.WARM:
                state.warm.append(live)
            self.monitor.add(live, now())
            self.compressor.adopt(live)
            emit(Event.SLOT_ADOPTED, slot=name, state=live.slot.state.value)
        for scope in scopes:
            await self.systemd.stop(scope, at_once=True)
            emit(Event.SLOT_REMOVED, slot=scope.removeprefix("nbagent-").removesuffix(".scope"), text="no file")
        if self.network.allowed or unsettled or any(live.slot.addresses for live in self.slots.values()):
            self.spawn(self._set_up_network(sweep=True))
        return len(self.slots)

    async def _set_up_network(self, *, sweep: bool = False) -> None:
        """Rules and resolver as the settings have them; a start of a slot tries again where this fails."""
        try:
            await self.network.set_up()
            if sweep:
                await self.network.sweep(live.slot for live in self.slots.values())
        except StartFailed as error:
            emit(Event.NETWORK_FAILED, text=str(error))

    def _decide(self) -> pool.Decision:
        at_s = now()
        pools = [
            pool.Pool(
                image=name,
                digest=state.image.digest if state.image else None,
                launch=self.zygotes.launch(name),
                wanted=self.config.warm(name),
                warm=[live.slot for live in state.warm],
                starting=self.slots.count(SlotState.STARTING, name),
                waiting=state.count_waiting(),
                paused_s=state.not_before_s - at_s,
            )
            for name, state in self.pools.items()
        ]
        return pool.decide(pools, self.host(), at_s, self.config.pool.max_age, self.config.slots.ttl_max)

    def _apply(self, decision: pool.Decision) -> None:
        for move in decision.retire:
            live = self.slots[move.id]
            self.end(live, Event.SLOT_RETIRED, text=move.reason)
        for image in decision.start:
            self._start(image)

    def _next_s(self, latest_s: float) -> float:
        """The next instant at which a pool may want something without an event."""
        pauses = [state.not_before_s for state in self.pools.values() if state.not_before_s > now()]
        return min([latest_s, *pauses])

    # -- a slot's life -------------------------------------------------------------------------

    def _start(self, image_name: str) -> None:
        image = self.pools[image_name].image
        assert image is not None
        created_s = now()
        path, _, query = image.url.partition("?")
        slot = Slot(
            id=new_id(self.label),
            image=image.name,
            digest=image.digest,
            id_base=image.id_base,
            uid=self.slots.free_uid(image.id_base),
            state=SlotState.STARTING,
            limits=default_limits(self.config.slots),
            token=new_token(),
            created_s=created_s,
            ends_s=created_s + self.config.pool.max_age + self.config.slots.ttl_max,
            path=path,
            query=query,
        )
        live = RunningSlot(slot)
        self.slots.add(live)
        live.task = self.spawn(self._bring_up(live, image))

    async def _bring_up(self, live: RunningSlot, image: Image) -> None:
        state = self.pools[image.name]
        began_s = now()
        self.counters.add("starts")
        try:
            self.slots.give(live, self.network.choose(self.slots.addresses))
            async with asyncio.timeout(self.config.slots.start_timeout):
                await self._launch(live, image)
        except asyncio.CancelledError:
            self.end(live, Event.SLOT_RETIRED, text="the agent stops while it starts")
            raise
        except (NbagentError, OSError, JobFailed, TimeoutError) as error:
            # A slot that was ended while it started has not failed.
            if live.slot.state is SlotState.STARTING:
                self._start_failed(live, state, error)
            return
        if live.slot.state is not SlotState.STARTING:
            return
        took_s = now() - began_s
        state.failures, state.not_before_s = 0, 0.0
        self.counters.start_seconds.observe(took_s)
        self.slots.move(live, SlotState.WARM)
        self.monitor.add(live, now())
        emit(Event.SLOT_WARM, slot=live.slot.id, took_ms=round(took_s * 1000))
        self.offer(live)

    async def _launch(self, live: RunningSlot, image: Image) -> None:
        slot, settings = live.slot, self.config.slots
        with self.records.create(slot, image.static) as listener:
            async def attach(netns_fd: int) -> None:
                await self.network.attach(slot, netns_fd)

            scope = _SlotScope(self.systemd, slot, settings.stop_timeout)
            uplink = self.network.uplink(slot)
            spec = sandbox_spec(slot, image, settings.storage_bytes, settings.start_timeout, uplink)
            launched = await self.launcher.launch(slot, spec, listener, scope, attach)
            try:
                live.attach(launched)
            except (FileNotFoundError, ProcessLookupError):
                raise ended(slot) from None
            live.slot = slot = dataclasses.replace(live.slot, pid=launched.pid)
        # From here on only the slot's own processes hold the socket: when they end, so does the wait.
        if not launched.serves:
            await self._serving(live, f"{slot.base_path}{image.ready}")
        self._watch(live)

    async def _serving(self, live: RunningSlot, url: str) -> None:
        """Waits until the slot's program answers. Raises StartFailed when it ends before, or answers with an error."""
        serving = asyncio.ensure_future(readiness.ready(self.records.http_path(live.slot), url))
        over = asyncio.ensure_future(readable(live.pidfd))
        try:
            await asyncio.wait({serving, over}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done() and serving.exception() is not None:
                # A program that ends is seen at its socket first; what an operator wants to know is that it ended.
                await asyncio.wait({over}, timeout=END_SEEN_S)
            if over.done():
                raise ended(live.slot)
            await serving
        finally:
            for waiter in (serving, over):
                waiter.cancel()
            await asyncio.gather(serving, over, return_exceptions=True)

    def _start_failed(self, live: RunningSlot, state: PoolState, error: Exception) -> None:
        text = str(error) or f"not ready after {self.config.slots.start_timeout:g} s"
        state.failures += 1
        state.last_failure = StartFailed(text, **getattr(error, "details", {}))
        wait_s = pool.backoff(state.failures, self.config.pool.backoff, self.config.pool.backoff_max)
        state.not_before_s = now() + wait_s
        self.counters.add("start_failures")
        self.end(live, Event.SLOT_FAILED, SlotState.FAILED, text=text)
        emit(Event.POOL_BACKOFF, image=live.slot.image, failures=state.failures, wait_s=wait_s)

    def offer(self, live: RunningSlot) -> None:
        """Gives a warm slot to the claim that waits longest, or to the pool."""
        if live.slot.state is not SlotState.WARM:
            return
        state = self.pools[live.slot.image]
        while state.waiting:
            claim = state.waiting.popleft()
            if not claim.done():
                claim.set_result(live)
                return
        # Not before: until somebody may count on it, it is one that is half made.
        self.records.save(live.slot)
        state.warm.append(live)
        self.wake()

    def _watch(self, live: RunningSlot) -> None:
        """Notices the end of the slot's first process, and with it of all the slot's processes."""
        async def watch() -> None:
            await readable(live.pidfd)
            if live.slot.state in (SlotState.WARM, SlotState.PREPARING, SlotState.CLAIMED):
                self.monitor.last(live)
                self.counters.add("died")
                self.end(live, Event.SLOT_DIED, text="its processes ended")

        live.task = self.spawn(watch())

    def end(self, live: RunningSlot, event: Event, state: SlotState = SlotState.STOPPING, **fields: Any) -> None:
        """Ends a slot. The router stops serving it at once, its processes soon after."""
        if live.slot.state in (SlotState.STOPPING, SlotState.FAILED, SlotState.GONE):
            return
        self.slots.move(live, state, reason=event.name.lower())
        with contextlib.suppress(ValueError):
            self.pools[live.slot.image].warm.remove(live)
        # Should the agent end before the scope does, its successor stops a scope without a file.
        self.records.remove(live.slot.id)
        emit(event, slot=live.slot.id, **fields)
        cleaning = asyncio.ensure_future(self._clean(live))
        self._cleaning.add(cleaning)
        cleaning.add_done_callback(self._cleaning.discard)

    async def _clean(self, live: RunningSlot) -> None:
        slot, cpu_s, began_s = live.slot, live.cpu_s(), now()
        try:
            await self.systemd.stop(slot.scope, at_once=slot.claimed_s is None)
        except OSError as error:
            # The next start of the agent tries again; until then the slot counts as stopping.
            emit(Event.SLOT_REMOVED, slot=slot.id, text=f"not stopped: {error}")
            return
        timeout_s = self.config.slots.stop_timeout
        if slot.claimed_s is not None and now() - began_s >= timeout_s:
            emit(Event.SLOT_KILLED, slot=slot.id, wait_s=f"{timeout_s:g}")
        if live.task is not None and live.task is not asyncio.current_task():
            live.task.cancel()
            await asyncio.gather(live.task, return_exceptions=True)
        if live.pidfd >= 0:
            # Killed is not ended: memory and files by the hundred thousand take the kernel seconds to give back, and
            # systemd waits no longer than before. A first process ends after all others of its pid namespace.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_MAX_S):
                    await readable(live.pidfd)
        live.close()
        await self.disconnect(slot)
        self.slots.move(live, SlotState.GONE)
        self.slots.remove(live)
        self.gone(slot)
        emit(Event.SLOT_GONE, slot=slot.id, age_s=round(now() - slot.created_s), cpu_s=round(cpu_s))
        if self._image_unused(slot.digest):
            self.refresh_images()
        self.wake()

    async def disconnect(self, slot: Slot) -> None:
        """Removes a slot's interface, if it has one."""
        try:
            await self.network.remove(slot)
        except StartFailed as error:
            emit(Event.NETWORK_FAILED, text=str(error))

    @property
    def draining(self) -> bool:
        """Whether the host hands out nothing."""
        return self.drain_file.exists()


    # -- helpers -------------------------------------------------------------------------------

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def host(self) -> admission.Host:
        """What there is of the host, and what is taken."""
        slots, starting = self.config.slots, Counter[str]()
        for name in self.pools:
            starting[self.zygotes.launch(name)] += self.slots.count(SlotState.STARTING, name)
        total, available = self._memory()
        return admission.Host(
            capacity=admission.capacity(slots.capacity, total, slots.memory, slots.overcommit),
            live=len(self.slots),
            starts=admission.under_way(starting),
            starts_max=self.config.pool.starts or self.cpus,
            memory_available_bytes=available,
            memory_reserve_bytes=self.config.host.memory_reserve,
            draining=self.draining,
        )

    def _memory(self) -> tuple[int, int]:
        """The host's memory, and what of it is available, read not long ago."""
        at_s = now()
        if at_s >= self._memory_read_s + MEMORY_AGE_S:
            memory = psutil.virtual_memory()
            self._memory_bytes, self._memory_read_s = (memory.total, memory.available), at_s
        return self._memory_bytes

    def _image_unused(self, digest: str) -> bool:
        current = {state.image.digest for state in self.pools.values() if state.image is not None}
        return digest not in current and not self.slots.uses(digest)


class _SlotScope:
    """The scope of one slot, as its launcher has it."""

    def __init__(self, systemd: Systemd, slot: Slot, stop_timeout_s: float) -> None:
        self._systemd, self._slot, self._stop_timeout_s = systemd, slot, stop_timeout_s

    async def start(self, pids: Sequence[int]) -> None:
        slot = self._slot
        await self._systemd.start_scope(
            slot.scope, pids, f"Notebook slot {slot.id}", slot.limits,
            runtime_max_s=slot.ends_s - slot.created_s, stop_timeout_s=self._stop_timeout_s,
        )
        emit(Event.SLOT_STARTING, slot=slot.id, image=slot.image)

    def add(self, pids: Sequence[int]) -> None:
        self._systemd.attach(self._slot.scope, pids)

    async def stop(self) -> None:
        await self._systemd.stop(self._slot.scope, at_once=True)


def default_limits(slots: SlotSettings) -> Limits:
    """The limits of a slot whose claim asks for none."""
    quota = None if slots.cpu_quota == "none" else parse_quota(slots.cpu_quota, os.cpu_count() or 1)
    return Limits(slots.memory, slots.cpu_weight, quota, slots.tasks)


def _why_not(slot: Slot | None, settled: bool) -> str:
    """Why a slot that was found is not adopted."""
    if slot is None:
        return "its file is broken"
    return "it ended while no agent ran" if settled else "half made"
