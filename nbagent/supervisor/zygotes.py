# SPDX-License-Identifier: BSD-3-Clause
"""The zygotes: one for each image whose slots are forked. `fork_launcher` starts slots by them.

Here is which zygote forks, which one is started and which ends; `zygote_starter` starts one, and `former_zygotes` has
those of a former supervisor.

A zygote and its zygote service are one systemd unit, `nbagent-zygote@IMAGE:GENERATION.service`. The service connects to
the supervisor. When the connection is closed, the service and the zygote end, and no slot ends with them. Over a
restart of the supervisor systemd keeps the connection (`fd_store`), so that the next supervisor adopts the zygote. A
zygote that has forked many slots, is old, or was started by another version or with other settings is replaced when
the next one is ready. After one that ended or did not respond, and while the processors are busy and none forks, a
quick one is started, which has no warm-up: it takes a third of the processor time, and its slots more time and memory.
Slots start by exec until it is ready, and are forked from it until the next one is, which is a complete one.

A zygote runs the code of an image. Its unit has the limits of a slot, and pool.zygote_memory; what it sends is checked,
and whatever goes wrong with it is a failure of the zygote and of nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Slot, now
from nbagent.image.store import Image
from nbagent.linux import cgroup
from nbagent.policy.admission import CPU_STRAIN
from nbagent.policy.pool import backoff
from nbagent.runtime.zygote_service import ZYGOTE_PATH
from nbagent.supervisor import fd_store
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.former_zygotes import Begun, Description, FormerZygotes
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.supervisor.zygote_identity import identity, unit_of
from nbagent.supervisor.zygote_starter import EXPECTED, ZygoteStarter
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel
from nbagent.wire.failure import INHERITED_STEP, StepFailed
from nbagent.wire.fields import MalformedMessage

# From the end of processes of a zygote to the end of its connection, which the zygote service closes.
END_SEEN_S = 1.0
# So many slots by exec take as much processor time as the start of a zygote. Another is started at once after a zygote
# that has forked them, however often it ends.
PAID_FORKS = 10
NOTHING_KEPT: Mapping[str, int] = {}
# Why slots have no zygote: with JupyterLab, and with a command.
_EXEC_REASONS = ('launch = "exec" in the manifest', "its program is a command")


def is_busy() -> bool:
    """Whether processes of the host wait for processors, so that the start of a complete zygote would take long."""
    return cgroup.pressure("cpu") >= CPU_STRAIN


@dataclass(eq=False)
class Zygote:
    """One zygote. `channel` leads to its zygote service. One that is `quick` is replaced by a complete one. `ended` is
    set when it has ended or failed.
    """

    instance: str
    image: Image
    channel: Channel
    born_s: float
    forks: int = 0
    quick: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def unit(self) -> str:
        """The unit of the zygote and its service."""
        return unit_of(self.instance)

    @property
    def reason(self) -> str:
        """Why its slots take more time and memory than those of a complete zygote; "" for a complete one."""
        return "its zygote has no warm-up" if self.quick else ""

    def dismiss(self) -> None:
        """Makes it end after the forks that it was already requested to do."""
        # Not close, because the descriptor's number might be reused while _watch still waits for it.
        with contextlib.suppress(OSError):
            self.channel.socket.shutdown(socket.SHUT_WR)
        fd_store.forget(self.instance)


@dataclass(eq=False)
class ZygotePool:
    """The zygotes of one image. `zygote` is the one that forks; `task` starts the next.

    `failure` is the reason why the last one failed, "" when one forks.
    `first_try_done`: the first has started or failed to start. `is_awaited`: none forks, and the start of one has not
    failed. `no_zygote` is set while there is none that forks.
    """

    image: Image
    zygote: Zygote | None = None
    task: asyncio.Task[None] | None = None
    failures: int = 0
    failure: str = ""
    first_try_done: bool = False
    is_awaited: bool = True
    no_zygote: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.no_zygote.set()


class Zygotes:
    """The zygotes of this host. `changed` is called when the way in which an image's slots start has changed."""

    def __init__(
        self, config: CurrentConfig, systemd: Systemd, changed: Callable[[], None] = lambda: None,
        is_busy: Callable[[], bool] = is_busy,
    ) -> None:
        self.config = config
        self._is_busy = is_busy
        self.changed = changed
        self.counts = dict.fromkeys(("zygotes_ready", "zygotes_failed", "zygotes_adopted"), 0)
        self._systemd = systemd
        self._pools: dict[str, ZygotePool] = {}
        self._by_exec: dict[str, str] = {}
        self._former = FormerZygotes()
        self._starter = ZygoteStarter(config, systemd)
        self._tasks = Tasks()

    async def open(
        self, kept: Mapping[str, int] = NOTHING_KEPT, begun: Mapping[str, int] = NOTHING_KEPT,
        path: Path = Path(ZYGOTE_PATH),
    ) -> None:
        """Looks up the zygotes of a former supervisor by their connections, which it takes over: `kept` are ready, and
        `begun` are starting. Stops those that it cannot adopt, and listens for zygote services. `want` adopts the
        others.
        """
        await self._former.find(kept, begun)
        for unit in set(await self._systemd.zygotes()) - self._former.units():
            # By a stop job, so that the end of a unit that was starting is not counted as a failure.
            with contextlib.suppress(OSError):
                await self._systemd.stop(unit)
        self._starter.listen(path)

    async def close(self) -> None:
        """Leaves the zygotes to the next supervisor; without one systemd closes their connections, which ends them."""
        self._starter.leave()
        await self._tasks.cancel()
        await self._starter.close()

    def want(self, images: Mapping[str, Image]) -> None:
        """Adopts or starts a zygote for each of these images whose slots are forked, and ends those of other images."""
        wanted = {name: image for name, image in images.items() if image.launch == "fork"}
        others = {name: image for name, image in images.items() if name not in wanted}
        self._by_exec = {name: _EXEC_REASONS[image.python is None] for name, image in others.items()}
        for name, pool in list(self._pools.items()):
            if wanted.get(name) != pool.image:
                self._end(name)
        for name, image in wanted.items():
            if name not in self._pools:
                pool = self._pools[name] = ZygotePool(image)
                if not self._adopt(pool):
                    pool.task = self._tasks.spawn(self._bring_up(pool, self._former.take_begun(name)))
        self._former.end()

    def _adopt(self, pool: ZygotePool) -> bool:
        """Makes the zygote of a former supervisor that of the pool, if it runs on the pool's image."""
        if (kept := self._former.take_kept(pool.image)) is None:
            return False
        quick = self._is_quick(kept.described, pool.image)
        pool.zygote = Zygote(kept.instance, pool.image, kept.channel, kept.born_s, kept.forks, quick)
        pool.first_try_done, pool.is_awaited = True, False
        pool.no_zygote.clear()
        self._tasks.spawn(self._watch(pool, pool.zygote))
        self.counts["zygotes_adopted"] += 1
        emit(Event.ZYGOTE_ADOPTED, zygote=kept.instance, image=pool.image.name, forks=kept.forks)
        self._compare(pool, pool.zygote, kept.described)
        return True

    def _is_quick(self, described: Description, image: Image) -> bool:
        return described.identity == identity(self.config.value, image, quick=True)

    def _compare(self, pool: ZygotePool, zygote: Zygote, described: Description) -> None:
        """Replaces a zygote of a former supervisor when it is due, or when a new one would be another."""
        self._review(pool)
        if pool.task is not None:
            return
        if described.is_outdated:
            self._replace(pool, zygote, "libraries of the host were replaced after its start")
        elif described.identity != identity(self.config.value, pool.image, quick=False):
            self._replace(pool, zygote, "it was started by another version of nbagent or with other settings")

    def digests(self) -> set[str]:
        """The images that zygotes run on."""
        return {pool.image.digest for pool in self._pools.values()}

    def launch(self, image: str) -> str:
        """How slots of an image start now: "fork" or "exec"."""
        pool = self._pools.get(image)
        return "fork" if pool is not None and pool.zygote else "exec"

    def reason(self, image: str) -> str:
        """Why slots of an image start by exec now, or by a quick zygote; "" when a complete one forks them."""
        if (pool := self._pools.get(image)) is None:
            return self._by_exec.get(image, "")
        if pool.zygote is not None:
            return pool.zygote.reason
        return f"its zygote failed: {pool.failure}" if pool.failure else "its zygote is being started"

    def is_warming(self, image: str) -> bool:
        """Whether slots of the image are soon forked: a zygote is being started, the first or after an end."""
        pool = self._pools.get(image)
        return pool is not None and pool.is_awaited

    def stats(self) -> dict[str, dict[str, object]]:
        """The zygotes by image, for /stats. `state` is "none" when no zygote is started again."""
        return {name: _stats(pool) for name, pool in self._pools.items()}

    def zygote_for(self, slot: Slot) -> Zygote | None:
        """The zygote that forks this slot; None where it starts by exec."""
        pool = self._pools.get(slot.image)
        return pool.zygote if pool is not None and pool.image.digest == slot.digest else None

    def forked(self, zygote: Zygote) -> None:
        """Counts a fork."""
        zygote.forks += 1
        pool = self._pools.get(zygote.image.name)
        if pool is not None and pool.zygote is zygote:
            self._review(pool)

    def review(self) -> None:
        """Replaces zygotes that are due; called periodically, because a zygote that forks nothing ages too."""
        for pool in self._pools.values():
            self._review(pool)

    def _review(self, pool: ZygotePool) -> None:
        if (zygote := pool.zygote) is None or pool.task is not None:
            return
        settings, age_s = self.config.value.pool, now() - zygote.born_s
        if zygote.quick:
            self._replace(pool, zygote, "it has no warm-up")
        elif zygote.forks >= settings.zygote_slots or age_s >= settings.zygote_age:
            self._replace(pool, zygote, f"{zygote.forks} slots in {age_s:.0f} s")

    def _replace(self, pool: ZygotePool, zygote: Zygote, text: str) -> None:
        emit(Event.ZYGOTE_REPLACED, zygote=zygote.instance, text=text)
        pool.task = self._tasks.spawn(self._bring_up(pool))

    def give_up(self, zygote: Zygote, text: str) -> None:
        """Ends a zygote that failed, and starts another."""
        zygote.ended.set()
        pool = self._pools.get(zygote.image.name)
        if pool is None or pool.zygote is not zygote:
            return
        # A zygote that has run for backoff_max, or has paid for its start, ends the series of failures; so the next one
        # starts without a pause.
        is_paid = now() - zygote.born_s > self.config.value.pool.backoff_max or zygote.forks >= PAID_FORKS
        pool.failures = 0 if is_paid else pool.failures + 1
        pool.is_awaited = is_paid
        pool.zygote = None
        fd_store.forget(zygote.instance)
        pool.no_zygote.set()
        self._log_failure(pool, zygote.instance, text)
        self._tasks.spawn(self._stop(zygote))
        if pool.task is None:
            pool.task = self._tasks.spawn(self._bring_up(pool))
        self.changed()

    def _log_failure(self, pool: ZygotePool, instance: str, text: str) -> None:
        name, former = pool.image.name, pool.zygote
        meanwhile, pool.failure = f"slots of image {name} start by exec", text
        if former is not None:
            meanwhile = f"zygote {former.instance} keeps forking slots"
        self.counts["zygotes_failed"] += 1
        emit(Event.ZYGOTE_ENDED, zygote=instance, image=name, meanwhile=meanwhile, text=text)

    def _end(self, name: str) -> None:
        pool = self._pools.pop(name)
        if pool.task is not None:
            pool.task.cancel()
        if pool.zygote is not None:
            zygote, pool.zygote = pool.zygote, None
            zygote.dismiss()

    async def _stop(self, zygote: Zygote) -> None:
        with contextlib.suppress(OSError):
            await self._systemd.stop(zygote.unit)

    async def _bring_up(self, pool: ZygotePool, begun: Begun | None = None) -> None:
        """Starts a zygote, again after each failure, and replaces the former one by it. The first may have `begun`."""
        while True:
            settings = self.config.value.pool
            await asyncio.sleep(backoff(pool.failures, settings.backoff, settings.backoff_max))
            began_s, instance = now(), begun.instance if begun else f"{pool.image.name}:{secrets.token_hex(3)}"
            quick = pool.zygote is None and (pool.first_try_done or self._is_busy())
            described = None
            try:
                if begun:
                    channel, described = await self._starter.resume(pool.image, begun)
                    quick = self._is_quick(described, pool.image)
                else:
                    gives_way_until = pool.no_zygote if pool.zygote else None
                    channel = await self._starter.start(
                        pool.image, instance, quick=quick, gives_way_until=gives_way_until
                    )
            except Exception as error:
                begun = None
                if not await self._fail(pool, instance, error, now() - began_s):
                    return
            else:
                zygote = Zygote(instance, pool.image, channel, now(), quick=quick)
                self._succeed(pool, zygote, now() - began_s)
                if described is not None:
                    self._compare(pool, zygote, described)
                return

    async def _fail(self, pool: ZygotePool, instance: str, error: Exception, took_s: float) -> bool:
        """Ends what the failed start has left. Returns whether the start may succeed when it is repeated."""
        text = str(error) or f"not ready after {took_s:.0f} s"
        if not isinstance(error, EXPECTED):
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"unexpected error in the start of zygote {instance}", "exception": error}
            )
            text = f"unexpected error: {error!r}"
        fails_always = isinstance(error, StartFailed) and error.details.get("step") == INHERITED_STEP
        if fails_always:
            text += "; no zygote is started again before the image changes"
        pool.failures += 1
        self._log_failure(pool, instance, text)
        with contextlib.suppress(OSError):
            await self._systemd.stop(unit_of(instance))
        pool.first_try_done, pool.is_awaited = True, False
        self.changed()
        if fails_always:
            pool.task = None
            if pool.zygote is not None:  # even a quick one is not replaced
                pool.zygote.quick = False
        return not fails_always

    def _succeed(self, pool: ZygotePool, zygote: Zygote, took_s: float) -> None:
        """Makes the zygote, which is ready, the one that forks."""
        former, pool.zygote = pool.zygote, zygote
        reach(Point.ZYGOTE_READY)
        fd_store.keep(zygote.instance, zygote.channel.fileno())
        pool.no_zygote.clear()
        pool.task, pool.failure = None, ""
        self.counts["zygotes_ready"] += 1
        emit(Event.ZYGOTE_READY, zygote=zygote.instance, image=pool.image.name, took_ms=round(took_s * 1000))
        self._tasks.spawn(self._watch(pool, zygote))
        if former is not None:
            former.dismiss()
        pool.first_try_done, pool.is_awaited = True, False
        self._review(pool)
        self.changed()

    async def _watch(self, pool: ZygotePool, zygote: Zygote) -> None:
        """Replaces a zygote when it ends."""
        text = "it ended"
        with zygote.channel:
            try:
                # A zygote service sends nothing but the failure that ends it.
                if (message := await receive(zygote.channel)) is not None:
                    with message:
                        message.raise_failure()
            except StepFailed as error:
                text = error.failure.text
            except (OSError, MalformedMessage) as error:
                text = str(error)
        fd_store.forget(zygote.instance)
        zygote.ended.set()
        if pool.zygote is zygote:
            self.give_up(zygote, text)

    async def has_ended(self, zygote: Zygote) -> bool:
        """Whether a zygote has ended, after a start by it has failed; waits for an end that is not seen yet."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(zygote.ended.wait(), END_SEEN_S)
        return zygote.ended.is_set()

    def prime(self) -> None:
        """Primes PID 1 for the next scope, without waiting for it; only a delay, when it fails."""
        self._tasks.spawn(self._prime())

    async def _prime(self) -> None:
        with contextlib.suppress(OSError):
            await self._systemd.prime()


def _stats(pool: ZygotePool) -> dict[str, object]:
    zygote = pool.zygote
    return {
        "state": "ready" if zygote else "starting" if pool.task else "none",
        "replacing": zygote is not None and pool.task is not None,
        "failures": pool.failures,
        "forks": zygote.forks if zygote else 0,
        "age_s": round(now() - zygote.born_s) if zygote else 0,
    }
