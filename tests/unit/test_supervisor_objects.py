# SPDX-License-Identifier: BSD-3-Clause
"""The objects of the supervisor one by one: pools, host load, slots by key, tasks, records and readiness."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from fakes import FakeZygotes, Host, cancelled, make_image, turns

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import ConfigError, StartFailed
from nbagent.core.model import Limits, Slot, SlotState, now
from nbagent.supervisor import __main__ as program
from nbagent.supervisor.composition import Supervisor
from nbagent.supervisor.host_load import HostLoad, Memory
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.readiness import ready
from nbagent.supervisor.records import Records
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.tasks import Tasks, in_thread

TOP = Path(__file__).resolve().parents[2]
GIB = 1 << 30
SLOT = Slot(
    id="c07-1", image="minimal", digest="sha256-0", id_base=1 << 20, uid=2000, state=SlotState.WARM,
    limits=Limits(GIB, 100, None, 256), token="t", created_s=1.0,
)


class Parts:
    """A pool with its slots, without a supervisor."""

    def __init__(self, path):
        (path / "slots").mkdir()
        self.config = CurrentConfig(host_config.parse({"pool": {"backoff": "1s", "backoff_max": "3s"}}))
        self.slots, self.changed = Slots(), asyncio.Event()
        self.records = Records(path / "slots")
        self.pools = Pools(self.config, self.slots, self.records, self.changed)
        self.pools.set_images({"minimal": make_image(path)})

    def slot(self, name, **changes):
        live = RunningSlot(dataclasses.replace(SLOT, id=name, **changes))
        self.slots.add(live)
        (self.records.path / name).mkdir()
        return live


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path)


async def test_a_pool_gives_its_oldest_slot_first_and_each_once(parts):
    first, second = parts.slot("c07-1"), parts.slot("c07-2")
    for live in (first, second):
        parts.pools.offer(live)
    assert [parts.pools.take("minimal") for _ in range(3)] == [first, second, None]


async def test_a_slot_goes_to_the_claim_that_waits_longest_and_not_into_the_pool(parts):
    waits = [asyncio.ensure_future(parts.pools.wait("minimal", 10)) for _ in range(2)]
    await turns(2)
    assert parts.pools["minimal"].count_waiting() == 2 and parts.changed.is_set()
    live = parts.slot("c07-1")
    parts.pools.offer(live)
    assert await waits[0] is live and not waits[1].done()
    # A slot that a claim takes has no record that a restart would adopt.
    assert not list((parts.records.path / "c07-1").iterdir()) and not parts.pools.warm_slots()
    await cancelled(waits[1])
    assert parts.pools["minimal"].count_waiting() == 0


async def test_a_slot_given_to_a_cancelled_claim_goes_to_the_next(parts):
    first, second = (asyncio.ensure_future(parts.pools.wait("minimal", 10)) for _ in range(2))
    await turns(2)
    live = parts.slot("c07-1")
    parts.pools.offer(live)
    # The first claim has the slot, but is cancelled before it runs.
    await cancelled(first)
    assert await second is live


async def test_a_wait_ends_after_its_timeout(parts):
    with pytest.raises(TimeoutError):
        await parts.pools.wait("minimal", 0.001)
    assert parts.pools["minimal"].count_waiting() == 0


async def test_a_slot_that_has_ended_is_not_offered(parts):
    live = parts.slot("c07-1")
    parts.pools.offer(live)
    parts.pools.remove(live)
    parts.pools.remove(live)
    parts.slots.move(live, SlotState.STOPPING)
    parts.pools.offer(live)
    assert parts.pools.take("minimal") is None


async def test_the_pause_of_a_pool_doubles_and_ends_with_a_start_or_another_image(parts, tmp_path):
    pauses = [parts.pools.start_failed("minimal", StartFailed("no", step="exec")) for _ in range(4)]
    assert pauses == [1.0, 2.0, 3.0, 3.0]
    assert now() + 2 < parts.pools.next_start_s(now(), now() + 100) <= now() + 3
    assert parts.pools.snapshot(FakeZygotes())[0].paused_s > 2
    parts.pools.set_images({"minimal": make_image(tmp_path, digest="sha256-1")})
    assert parts.pools["minimal"].failures == 0 and parts.pools.digests() == {"sha256-1"}
    assert parts.pools.next_start_s(now(), 5.0) == 5.0


async def test_the_pool_of_a_removed_image_stays_until_its_last_slot_has_ended(parts):
    live = parts.slot("c07-1")
    parts.pools.offer(live)
    parts.pools.set_images({})
    pool, = parts.pools.snapshot(FakeZygotes())
    assert pool.digest is None and pool.wanted == 0 and not parts.pools.digests()
    parts.pools.remove(live)
    parts.slots.remove(live)
    parts.pools.set_images({})
    assert not parts.pools


def test_the_load_counts_starts_by_launch_and_reads_memory_at_most_ten_times_a_second(tmp_path, clock):
    slots, zygotes, reads = Slots(), FakeZygotes(), []
    zygotes.forks.add("forked")
    for number, image in enumerate(("minimal", "forked", "forked")):
        slots.add(RunningSlot(dataclasses.replace(SLOT, id=f"c07-{number}", image=image, state=SlotState.STARTING)))

    def memory():
        reads.append(1)
        return Memory(24 * GIB, 8 * GIB)

    promise = CurrentConfig(host_config.parse({"slots": {"overcommit": 4.0}}))
    load = HostLoad(promise, slots, zygotes, tmp_path / "drain", memory)
    host = load.host()
    assert (host.capacity, host.live, host.starts.processors) == (96, 3, 1.5)
    load.host()
    assert len(reads) == 1
    clock.advance(1)
    load.host()
    assert len(reads) == 2
    assert load.room(host, "forked") > load.room(host, "minimal") > 0
    load.set_draining(True)
    assert load.draining and load.room(load.host(), "minimal") == 0
    load.set_draining(False)
    load.set_draining(False)
    assert not load.draining


def without_threads(monkeypatch):
    """As while process ids are used up."""
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


async def test_work_that_needs_a_thread_fails_as_the_system_call_does(monkeypatch):
    with monkeypatch.context() as patch:
        without_threads(patch)
        with pytest.raises(BlockingIOError, match="can't start new thread"):
            await in_thread(lambda: 1)
    assert await in_thread(lambda: 2) == 2


async def test_the_root_of_a_slot_is_closed_once_while_no_thread_can_be_started(monkeypatch):
    fd = os.open("/", os.O_PATH)
    with monkeypatch.context() as patch:
        without_threads(patch)
        await RunningSlot(SLOT, root_fd=fd).release_storage()
    other = os.open("/", os.O_PATH)
    assert other == fd
    # The executor does now what it could not do before.
    await in_thread(lambda: None)
    os.close(other)


async def test_parts_of_the_host_are_tried_while_no_thread_can_be_started(tmp_path, monkeypatch):
    async with Host(tmp_path) as host:
        with monkeypatch.context() as patch:
            without_threads(patch)
            for _ in range(2):
                await host.supervisor.health.check()
        assert "can't start new thread" in host.supervisor.health.faults["image"]
        await host.supervisor.health.check()
        assert not host.supervisor.health.faults


def test_a_drain_is_in_force_while_its_file_cannot_be_created_and_has_it_afterwards(tmp_path):
    file = tmp_path / "full" / "drain"
    load = HostLoad(CurrentConfig(host_config.parse({})), Slots(), FakeZygotes(), file)
    load.set_draining(True)
    assert load.draining and load.host().draining
    load.set_draining(False)
    assert not load.draining
    load.set_draining(True)
    file.parent.mkdir()
    assert load.draining and file.exists()
    load.set_draining(False)
    assert not load.draining and not file.exists()


def test_the_next_end_is_that_of_the_first_claimed_slot(tmp_path, clock):
    slots = Slots()
    load = HostLoad(CurrentConfig(host_config.parse({})), slots, FakeZygotes(), tmp_path / "drain")
    assert load.next_end_s() is None and load.retry_after_s() == 1
    for number, ttl_s in enumerate((500.0, 20.0)):
        slots.add(RunningSlot(dataclasses.replace(
            SLOT, id=f"c07-{number}", state=SlotState.CLAIMED, claimed_s=now(), ttl_s=ttl_s)))
    clock.advance(2)
    assert 17 <= load.next_end_s() <= 18 and load.retry_after_s() == 18


def test_a_slot_is_found_by_its_key_while_it_is_claimed():
    slots, live = Slots(), RunningSlot(SLOT)
    slots.add(live)
    slots.move(live, SlotState.CLAIMED, key="k1")
    assert slots.claimed_by_key("k1") is live and slots.claimed_by_key("k2") is None
    # The key of a slot that ends may be used by another slot before the first one is removed.
    slots.move(live, SlotState.STOPPING)
    assert slots.claimed_by_key("k1") is None
    other = RunningSlot(dataclasses.replace(SLOT, id="c07-2", uid=2001, state=SlotState.CLAIMED, key="k1"))
    slots.add(other)
    slots.move(live, SlotState.GONE)
    slots.remove(live)
    assert slots.claimed_by_key("k1") is other


async def test_tasks_are_kept_until_they_end_and_cancelled_together():
    tasks, ended = Tasks(), []

    async def work(number):
        try:
            await asyncio.sleep(1000 if number else 0)
        finally:
            ended.append(number)

    short, long = tasks.spawn(work(0)), tasks.spawn(work(1))
    await short
    assert ended == [0]
    await tasks.cancel()
    assert ended == [0, 1] and long.cancelled()
    await tasks.finish()


async def test_an_error_that_ends_a_task_is_reported_at_once():
    tasks, reports, loop = Tasks(), [], asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, report: reports.append(report))

    async def work():
        raise KeyError("a fault")

    task = tasks.spawn(work())
    await tasks.finish()
    assert task.done() and [repr(report["exception"]) for report in reports] == ["KeyError('a fault')"]
    assert "work" in reports[0]["message"]


def test_the_files_of_a_slot_are_private_and_its_socket_is_the_routers(tmp_path):
    (tmp_path / "slots").mkdir()
    records = Records(tmp_path / "slots")
    with records.create(SLOT, tmp_path) as listener:
        assert listener.getsockname() == str(records.http_path(SLOT))
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (records.path / SLOT.id).iterdir()}
    assert (modes["slot.json"], modes["http.sock"]) == (0o600, 0o660)
    assert list(records.load()) == [(SLOT.id, SLOT)]
    records.remove(SLOT.id)
    records.remove(SLOT.id)
    assert not list(records.load())


@pytest.mark.parametrize(("response", "error"), [
    (b"HTTP/1.1 200 OK\r\n\r\n", None), (b"HTTP/1.0 302 Found\r\n\r\n", None),
    (b"HTTP/1.1 401 Unauthorized\r\n\r\n", None),
    (b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "500"), (b"", "nothing"), (b"SSH-2.0\r\n", "SSH"),
    (b"x" * 200_000, "no line break in its first 8192 bytes"), (b"HTTP/1.1 500 \x1b[2J\xff\n", r"500 \?\[2J"),
])
async def test_a_slot_is_ready_with_a_response_below_500(tmp_path, response, error):
    requests = []

    async def serve(reader, writer):
        requests.append(await reader.readline())
        writer.write(response)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
    async with server:
        if error is None:
            await ready(tmp_path / "s", "/user/c07-1/api")
        else:
            with pytest.raises(StartFailed, match=error):
                await ready(tmp_path / "s", "/user/c07-1/api")
    assert requests == [b"GET /user/c07-1/api HTTP/1.1\r\n"]
    await turns()


async def test_a_socket_without_a_listener_is_not_ready(tmp_path):
    with pytest.raises(StartFailed, match="no response from"):
        await ready(tmp_path / "absent", "/")


def test_no_object_of_the_supervisor_has_more_than_a_dozen_attributes(tmp_path):
    from fakes import Host

    async def attributes():
        async with Host(tmp_path) as host:
            supervisor = host.supervisor
            agent, calls = supervisor.agent, supervisor.calls
            guards = (supervisor.memory_guard, supervisor.processor_guard)
            tops = (agent, calls, supervisor.adoption, agent._starter, calls._claims, *guards)
            objects = {id(one): one for top in tops for one in (top, *vars(top).values())}
            return {
                type(one).__name__: len(vars(one)) for one in objects.values()
                if type(one).__module__.startswith("nbagent.supervisor")
            }

    counts = asyncio.run(attributes())
    assert {"Agent", "Calls", "Claims", "Allocator", "Pools", "SlotStarter", "SlotStopper", "HostLoad"} <= set(counts)
    assert max(counts.values()) <= 12, counts
    assert Supervisor.__name__ not in counts


@pytest.mark.parametrize(("error", "status"), [("MemoryError()", 1), ("ValueError('x')", 7)])
def test_a_task_without_memory_ends_the_supervisor_and_another_error_does_not(error, status):
    """The next supervisor adopts what is complete; a task that ended between two steps may leave a slot as it is."""
    text = f"""
import asyncio, sys
from nbagent.supervisor.__main__ import end_without_memory
from nbagent.supervisor.tasks import Tasks, in_thread

async def fail():
    raise {error}

async def main():
    asyncio.get_running_loop().set_exception_handler(end_without_memory)
    Tasks().spawn(fail())
    await asyncio.sleep(0.1)

asyncio.run(main())
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == status and "unexpected error" in done.stderr


@pytest.mark.parametrize("error", [None, ConfigError("unknown setting"), OSError(errno.EIO, "Input/output error")])
def test_a_reload_ends_for_systemd_whatever_it_meets(monkeypatch, journal, error):
    notified = []
    monkeypatch.setattr(program.daemon, "notify", notified.append)

    def load():
        if error is not None:
            raise error

    monkeypatch.setattr(program.host_config, "load", load)
    with contextlib.suppress(OSError):
        program._reload(Mock())
    assert notified == ["RELOADING=1", "READY=1"]
