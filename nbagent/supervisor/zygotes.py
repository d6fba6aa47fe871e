"""The zygotes: one for each image whose slots are forked, and the launcher that has them fork.

A zygote and its keeper are a unit of systemd's, `nbagent-zygote@IMAGE:GENERATION.service`. The keeper connects
here, and that connection is the zygote: closed by either side, it is over, and no slot with it. So a supervisor
that starts begins with zygotes of its own. A zygote that has forked many slots or is old is replaced by one that
is ready; one that ended, or does not answer, by one that is started then, and slots start by exec until it is
there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbagent.config.host_config import HostConfig
from nbagent.core.errors import StartFailed
from nbagent.core.events import Event, emit
from nbagent.core.model import Limits, Slot, SlotState, now
from nbagent.image.store import Image
from nbagent.linux import cgroup, journal
from nbagent.policy.pool import backoff
from nbagent.runtime.zygote_service import ZYGOTE_PATH
from nbagent.sandbox.plan import CODE_PATH
from nbagent.sandbox.spec import SandboxSpec
from nbagent.supervisor.aio import readable
from nbagent.supervisor.launcher import (
    Attach,
    ExecLauncher,
    Launched,
    Parts,
    Scope,
    forked_filter,
    forking_filter,
    pid_of,
    sandbox_spec,
)
from nbagent.systemd.bus import JobFailed, Systemd
from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION

# From a request to the processes of the slot; the keeper itself gives its zygote up before.
FORK_TIMEOUT_S = 10.0
HELLO_TIMEOUT_S = 20.0
# A zygote takes 5 to 11 s of a processor to make, 60 slots a second take both (packaging/docs/density.md). While a
# former one forks, the next has what nobody else wants; for so long, then it is made at its full weight.
PATIENCE_S = 300.0
CPU_WEIGHT, CPU_WEIGHT_GIVING_WAY = 100, 1
# Whatever it is: what waits for it goes on.
GO = b"go"
_PACKET_BYTES = 65536


class ZygoteGone(Exception):
    """A zygote that did not fork: it ended, or does not answer."""


@dataclass(eq=False)
class Zygote:
    """One zygote. `connection` leads to its keeper."""

    instance: str
    image: Image
    connection: socket.socket
    born_s: float
    forks: int = 0

    @property
    def unit(self) -> str:
        """The unit of it and its keeper."""
        return unit_of(self.instance)

    def dismiss(self) -> None:
        """Lets it end when it has made the slots it was asked for."""
        # Closed under the watch, the descriptor might be another's before the watch ends.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


@dataclass(eq=False)
class ZygotePool:
    """What is known of one image's zygotes. `zygote` is the one that forks; `task` brings up the next.

    `first_try_done` is set when the first has come up, or has failed to; `no_zygote` while there is none that forks.
    """

    image: Image
    zygote: Zygote | None = None
    task: asyncio.Task[None] | None = None
    failures: int = 0
    first_try_done: asyncio.Event = field(default_factory=asyncio.Event)
    no_zygote: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.no_zygote.set()


class Zygotes:
    """The zygotes of this host. `changed` is called when slots of an image start in another way than before."""

    def __init__(self, config: HostConfig, systemd: Systemd, changed: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.changed = changed
        self._systemd = systemd
        self._pools: dict[str, ZygotePool] = {}
        self._expected: dict[str, asyncio.Future[socket.socket]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    async def open(self, path: Path = Path(ZYGOTE_PATH)) -> None:
        """Ends what is left of a former supervisor's zygotes, and listens for keepers."""
        for unit in self._systemd.zygotes():
            # Asked to: what has lost its supervisor while it started is no failure.
            with contextlib.suppress(OSError):
                await self._systemd.stop(unit)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(before)
        self._listener.listen()
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    async def close(self) -> None:
        """Lets go of all zygotes, which end; slots do not."""
        self.want({})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def want(self, images: Mapping[str, Image]) -> None:
        """Has a zygote for each of these images that forks its slots, and for no other."""
        wanted = {name: image for name, image in images.items() if image.launch == "fork"}
        for name, pool in list(self._pools.items()):
            if wanted.get(name) != pool.image:
                self._end(name)
        for name, image in wanted.items():
            if name not in self._pools:
                pool = self._pools[name] = ZygotePool(image)
                pool.task = self._spawn(self._bring_up(pool))

    def digests(self) -> set[str]:
        """The images that zygotes run on."""
        return {pool.image.digest for pool in self._pools.values()}

    def launch(self, image: str) -> str:
        """How slots of an image start now: "fork", also while they wait for its first zygote, or "exec"."""
        pool = self._pools.get(image)
        return "fork" if pool is not None and (pool.zygote or not pool.first_try_done.is_set()) else "exec"

    async def zygote_for(self, slot: Slot) -> Zygote | None:
        """Who forks this slot; None where it starts by exec. The first zygote of an image is waited for."""
        pool = self._pools.get(slot.image)
        if pool is None or pool.image.digest != slot.digest:
            return None
        await pool.first_try_done.wait()
        return pool.zygote

    def forked(self, zygote: Zygote) -> None:
        """Counts a fork."""
        zygote.forks += 1
        pool = self._pools.get(zygote.image.name)
        if pool is not None and pool.zygote is zygote:
            self._review(pool)

    def review(self) -> None:
        """Replaces the zygotes that have done their share; from time to time, as one that forks nothing ages too."""
        for pool in self._pools.values():
            self._review(pool)

    def _review(self, pool: ZygotePool) -> None:
        if (zygote := pool.zygote) is None or pool.task is not None:
            return
        settings, age_s = self.config.pool, now() - zygote.born_s
        if zygote.forks >= settings.zygote_slots or age_s >= settings.zygote_age:
            emit(Event.ZYGOTE_REPLACED, zygote=zygote.instance, text=f"{zygote.forks} slots in {age_s:.0f} s")
            pool.task = self._spawn(self._bring_up(pool))

    def give_up(self, zygote: Zygote, text: str) -> None:
        """Ends a zygote that is no good, and starts another."""
        pool = self._pools.get(zygote.image.name)
        if pool is None or pool.zygote is not zygote:
            return
        pool.zygote = None
        pool.no_zygote.set()
        pool.failures += 1
        self._say_ended(pool, zygote.instance, text)
        self._spawn(self._stop(zygote))
        if pool.task is None:
            pool.task = self._spawn(self._bring_up(pool))
        self.changed()

    def _say_ended(self, pool: ZygotePool, instance: str, text: str) -> None:
        name, former = pool.image.name, pool.zygote
        meanwhile = f"slots of image {name} start by exec" if former is None else f"{former.instance} forks on"
        emit(Event.ZYGOTE_ENDED, zygote=instance, image=name, meanwhile=meanwhile, text=text)

    def _end(self, name: str) -> None:
        pool = self._pools.pop(name)
        pool.first_try_done.set()
        if pool.task is not None:
            pool.task.cancel()
        if pool.zygote is not None:
            zygote, pool.zygote = pool.zygote, None
            zygote.dismiss()

    async def _stop(self, zygote: Zygote) -> None:
        with contextlib.suppress(OSError):
            await self._systemd.stop(zygote.unit)

    async def _bring_up(self, pool: ZygotePool) -> None:
        """Until there is a new zygote, which takes the place of the former."""
        while True:
            settings = self.config.pool
            await asyncio.sleep(backoff(pool.failures, settings.backoff, settings.backoff_max))
            began_s, instance = now(), f"{pool.image.name}:{secrets.token_hex(3)}"
            try:
                connection = await self._start(pool, instance)
            except (OSError, JobFailed, TimeoutError, StartFailed) as error:
                text = str(error) or f"not ready after {now() - began_s:.0f} s"
                pool.failures += 1
                self._say_ended(pool, instance, text)
                with contextlib.suppress(OSError):
                    await self._systemd.stop(unit_of(instance))
                pool.first_try_done.set()
                continue
            former, pool.zygote = pool.zygote, Zygote(instance, pool.image, connection, now())
            pool.no_zygote.clear()
            pool.task = None
            emit(Event.ZYGOTE_READY, zygote=instance, image=pool.image.name, took_ms=round((now() - began_s) * 1000))
            self._spawn(self._watch(pool, pool.zygote))
            if former is not None:
                former.dismiss()
            pool.first_try_done.set()
            self.changed()
            return

    async def _start(self, pool: ZygotePool, instance: str) -> socket.socket:
        """Starts a zygote, and returns when it is ready. Raises OSError, JobFailed, TimeoutError or StartFailed."""
        unit, gives_way = unit_of(instance), pool.zygote is not None
        if gives_way:
            self._systemd.set_cpu_weight(unit, CPU_WEIGHT_GIVING_WAY)
        made = asyncio.ensure_future(self._made(pool.image, instance))
        no_zygote = asyncio.ensure_future(pool.no_zygote.wait())
        try:
            if gives_way:
                await asyncio.wait({made, no_zygote}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                self._systemd.set_cpu_weight(unit, CPU_WEIGHT)
            async with asyncio.timeout(self.config.slots.start_timeout):
                return await made
        finally:
            made.cancel()
            no_zygote.cancel()

    async def _made(self, image: Image, instance: str) -> socket.socket:
        hello = self._expected[instance] = asyncio.get_running_loop().create_future()
        try:
            await self._systemd.start(unit_of(instance))
            connection: socket.socket = await hello
        finally:
            del self._expected[instance]
        try:
            spec = zygote_spec(image, self.config.slots.storage_bytes)
            connection.send(json.dumps({"spec": spec.save(), "preload": list(image.preload)}).encode())
            answer = json.loads(await _packet(connection) or b"{}")
            if "ready" not in answer:
                failed = answer.get("failed", {"text": "its keeper ended"})
                raise StartFailed(str(failed["text"]), step="zygote")
        except BaseException:
            connection.close()
            raise
        return connection

    async def _watch(self, pool: ZygotePool, zygote: Zygote) -> None:
        """Notices the end of a zygote."""
        with zygote.connection:
            await readable(zygote.connection.fileno())
        if pool.zygote is zygote:
            # A life of some length makes good for the failures before.
            if now() - zygote.born_s > self.config.pool.backoff_max:
                pool.failures = 0
            self.give_up(zygote, "it ended")

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            self._spawn(self._greet(connection))

    async def _greet(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = json.loads(await _packet(connection))
            expected = self._expected.get(str(hello["unit"]))
        except (TimeoutError, OSError, ValueError, KeyError, TypeError):
            expected = None
        if expected is None or expected.done() or struct.unpack("3i", credentials)[1] != 0:
            connection.close()
        else:
            expected.set_result(connection)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class ForkLauncher:
    """Starts a slot by a fork of its image's zygote, in milliseconds; by exec where there is none."""

    def __init__(self, zygotes: Zygotes) -> None:
        self.zygotes = zygotes
        self._exec = ExecLauncher()
        # Where the service may not do that, moves take as long as they take.
        self._primer: cgroup.MigrationPrimer | None = None
        with contextlib.suppress(OSError):
            self._primer = cgroup.MigrationPrimer()
        self._under_way = 0

    async def launch(
        self, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        while (zygote := await self.zygotes.zygote_for(slot)) is not None:
            self._under_way += 1
            try:
                forked = spec._replace(forked=True, forked_filter=forked_filter())
                return await self._fork(zygote, slot, forked, listener, scope, attach)
            except ZygoteGone as error:
                self.zygotes.give_up(zygote, str(error))
                await scope.stop()
            finally:
                self._under_way -= 1
        return await self._exec.launch(slot, spec, listener, scope, attach)

    async def _fork(
        self, zygote: Zygote, slot: Slot, spec: SandboxSpec, listener: socket.socket, scope: Scope, attach: Attach
    ) -> Launched:
        with Parts(slot) as parts, contextlib.ExitStack() as stack:
            go_fd = _ask(zygote, slot, spec, listener, parts)
            stack.callback(os.close, go_fd)
            self.zygotes.forked(zygote)
            init, = await _forked(parts, "init")
            mine = stack.enter_context(contextlib.ExitStack())
            mine.callback(os.close, init)
            pids = _pids([init], slot, zygote)
            # Alone, a slot has its scope and builds its root while the zygote still forks. That is one call of PID 1's
            # more, a millisecond, which among others only holds those up.
            early = asyncio.ensure_future(_enclose(scope, pids[:], parts)) if self._under_way == 1 else None
            try:
                server_fd, = await _forked(parts, "fork_server")
                stack.callback(os.close, server_fd)
                pids += _pids([server_fd], slot, zygote)
                if early is None:
                    await _enclose(scope, pids, parts)
                else:
                    await early
                    scope.add(pids[1:])
            finally:
                if early is not None:
                    early.cancel()
                    await asyncio.gather(early, return_exceptions=True)
            os.write(go_fd, GO)
            launched = await parts.running(init, spec, attach)
            mine.pop_all()
            return launched

    def prepare(self) -> None:
        """Sees to it that PID 1 does not wait, by the time when it is to move the slot's processes into their scope."""
        if self._primer is not None and self._under_way == 0:
            self._primer.prime()


def _ask(zygote: Zygote, slot: Slot, spec: SandboxSpec, listener: socket.socket, parts: Parts) -> int:
    """Asks the zygote's keeper for a slot. Returns where its server is told to go on. Raises ZygoteGone."""
    go_read, go_write = os.pipe()
    with parts.theirs, open(go_read), journal.stream(slot.id, slot.scope) as stream:
        fds = [parts.theirs.fileno(), listener.fileno(), parts.activity_fd, parts.config_fd, stream.fileno(), go_read]
        try:
            socket.send_fds(zygote.connection, [json.dumps(spec.save()).encode()], fds)
        except OSError as error:
            os.close(go_write)
            raise ZygoteGone(f"its keeper takes no request: {error}") from error
    return go_write


async def _forked(parts: Parts, *names: str) -> list[int]:
    """Pidfds of processes that are forked. Raises ZygoteGone."""
    try:
        async with asyncio.timeout(FORK_TIMEOUT_S):
            return await parts.given(*names)
    except (TimeoutError, StartFailed) as error:
        raise ZygoteGone(str(error) or f"no fork within {FORK_TIMEOUT_S:g} s") from error


async def _enclose(scope: Scope, pids: list[int], parts: Parts) -> None:
    """Makes the slot's scope, of which the first process is told that it may begin."""
    await scope.start(pids)
    parts.control.send(GO)


def _pids(pidfds: list[int], slot: Slot, zygote: Zygote) -> list[int]:
    """The processes of pidfds. Raises StartFailed when one has ended, or is not what it should be.

    They are the word of an image: only what is forked in its own unit is taken for a slot.
    """
    pids = [pid_of(fd, slot) for fd in pidfds]
    for pid in pids:
        if cgroup.unit_of_process(pid) != zygote.unit:
            raise StartFailed(f"process {pid} is none of {zygote.unit}", step="fork")
    return pids


def unit_of(instance: str) -> str:
    """The unit of a zygote."""
    return f"nbagent-zygote@{instance}.service"


def zygote_spec(image: Image, storage_bytes: int) -> SandboxSpec:
    """The sandbox of a zygote of `image`: a slot's, as nobody's."""
    nobody = Slot(
        id="zygote", image=image.name, digest=image.digest, id_base=image.id_base, uid=0, state=SlotState.STARTING,
        limits=Limits(0, 0, None, 0), token="", created_s=0.0,
    )
    assert image.python is not None
    return sandbox_spec(nobody, image, storage_bytes, 0.0)._replace(
        user="root",
        command=[image.python, "-I", f"{CODE_PATH}/zygote/zygote.py",
                 *([] if image.share_memory else [PRIVATE_MEMORY_OPTION])],
        syscall_filter=forking_filter(),
    )


async def _packet(connection: socket.socket) -> bytes:
    await readable(connection.fileno())
    return connection.recv(_PACKET_BYTES)
