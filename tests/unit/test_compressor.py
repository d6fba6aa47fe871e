# SPDX-License-Identifier: BSD-3-Clause
"""Compression of slots at rest, over a fake systemd and cgroups of plain files."""

import asyncio
import dataclasses
import errno
import os

import pytest

from nbagent.core.events import Event
from nbagent.core.model import Limits, Slot, SlotState, now
from nbagent.linux import swap
from nbagent.linux.cgroup import Cgroup
from nbagent.policy.compress import STEP_BYTES
from nbagent.supervisor import compressor as compressor_of
from nbagent.supervisor.compressor import Compressor
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.tasks import Tasks
from nbagent.wire import activity

LIMIT_BYTES = 1 << 30
SLOT = Slot(
    id="h-0", image="minimal", digest="d", id_base=1 << 20, uid=2000, state=SlotState.CLAIMED,
    limits=Limits(LIMIT_BYTES, 100, None, 256), token="t", created_s=0.0, claimed_s=0.0, ttl_s=100000.0,
)
ZRAM = swap.Swap(("/dev/zram0",), ())


class Host:
    """Slots, and the requests of the compressor to systemd and the kernel, in order."""

    def __init__(self, directory):
        self.directory, self.requests, self.events, self.counters, self.lives = directory, [], [], Counters(), {}
        self.areas, self.reclaims = ZRAM, True
        # Called during each reclaim.
        self.meanwhile = lambda: None
        self.compressor = Compressor(self, self.counters, Tasks())

    def slot(self, number, memory_bytes=1 << 20, limit_bytes=0):
        group = self.directory / str(number)
        group.mkdir()
        for name, value in (("memory.current", memory_bytes), ("memory.swap.current", 0),
                            ("memory.swap.max", limit_bytes)):
            (group / name).write_text(f"{value}\n")
        slot = dataclasses.replace(SLOT, id=f"h-{number}")
        live = RunningSlot(slot, -1, activity.create(), Cgroup(str(group), str(group), str(group)))
        self.lives[slot.scope] = live
        return live

    async def set_swap(self, name, size_bytes):
        self.requests.append((name, size_bytes))
        if (live := self.lives.get(name)) is None:
            raise FileNotFoundError(name)
        with open(f"{live.cgroup.memory}/memory.swap.max", "w") as file:
            file.write(f"{size_bytes}\n")

    async def reclaim(self, name, pid, size_bytes):
        group = self.lives[name].cgroup
        self.requests.append((os.path.basename(group.memory), f"reclaim {size_bytes}"))
        assert group.may_swap()
        self.meanwhile()
        if isinstance(self.reclaims, OSError):
            raise self.reclaims
        return self.reclaims

    def compress(self, *lives):
        """Offers slots and waits until the compressor has nothing more to do."""

        async def run():
            for live in lives:
                self.compressor.offer(live)
            if self.compressor._task is not None:
                await asyncio.wait_for(self.compressor._task, 10)

        asyncio.run(run())


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host(tmp_path)
    monkeypatch.setattr(swap, "read", lambda: host.areas)
    monkeypatch.setattr(compressor_of, "emit", lambda event, **fields: host.events.append((event, fields["slot"])))
    yield host
    for live in host.lives.values():
        os.close(live.activity_fd)


def test_swap_is_allowed_only_during_the_reclaim(host):
    live = host.slot(1)
    began_s = now()
    host.compress(live)
    assert host.requests == [
        (live.slot.scope, LIMIT_BYTES), ("1", f"reclaim {STEP_BYTES}"), (live.slot.scope, 0),
    ]
    assert began_s <= live.compressed_s <= now()
    assert host.events == [(Event.SLOT_COMPRESSED, "h-1")]
    assert host.counters.document()["counters"]["compressed"] == 1


def test_slots_are_compressed_one_after_the_other_and_each_once(host):
    lives = [host.slot(number) for number in range(3)]
    host.compress(*lives, *lives)
    assert [request for _, request in host.requests] == [LIMIT_BYTES, f"reclaim {STEP_BYTES}", 0] * 3
    assert [slot for _, slot in host.events] == ["h-0", "h-1", "h-2"]


def test_a_large_slot_is_compressed_in_steps_until_the_kernel_finds_no_more(host):
    live = host.slot(1, memory_bytes=3 * STEP_BYTES)
    host.compress(live)
    assert len(host.requests) == 2 + 3
    host.requests.clear()
    host.reclaims = False
    host.compress(live)
    assert len(host.requests) == 2 + 1


@pytest.mark.parametrize("areas", [swap.Swap((), ()), swap.Swap(("/dev/zram0",), ("/dev/sda2",))])
def test_no_slot_is_compressed_where_swap_is_not_in_memory(host, areas):
    host.areas = areas
    live = host.slot(1)
    host.compress(live)
    assert host.requests == [] and live.compressed_s is None
    # The queue is empty, so the slot is compressed only after it is offered again.
    host.areas = ZRAM
    host.compress(host.slot(2))
    assert [slot for _, slot in host.events] == ["h-2"]


def test_no_slot_is_compressed_on_cgroup_v1(host):
    live = host.slot(1)
    live.cgroup = dataclasses.replace(live.cgroup, cpu="/elsewhere")
    host.compress(live)
    assert host.requests == []


def test_compression_ends_when_the_slot_becomes_active(host):
    live = host.slot(1, memory_bytes=8 * STEP_BYTES)
    host.meanwhile = lambda: activity.write(live.activity_fd, 0)
    host.compress(live)
    assert [request for _, request in host.requests] == [LIMIT_BYTES, f"reclaim {STEP_BYTES}", 0]
    # The activity during the compression begins a new rest.
    assert live.rests_since(now()) > live.compressed_s


def test_a_slot_that_became_active_in_the_queue_is_not_compressed(host):
    first, second = host.slot(1), host.slot(2)
    host.meanwhile = lambda: activity.write(second.activity_fd, 1)
    host.compress(first, second)
    assert {name for name, _ in host.requests} == {first.slot.scope, "1"} and second.compressed_s is None


@pytest.mark.parametrize("error", [FileNotFoundError("5.10 has no memory.reclaim"), OSError("it ended")])
def test_a_failed_reclaim_ends_no_slot(host, error):
    host.reclaims = error
    host.compress(host.slot(1), host.slot(2))
    assert host.events == [] and [request for _, request in host.requests].count(0) == 2


def test_a_slot_that_ends_while_it_is_compressed_is_no_error(host):
    live = host.slot(1)

    def end():
        live.slot = live.slot.to(SlotState.STOPPING)
        del host.lives[live.slot.scope]
        os.close(live.activity_fd)

    host.meanwhile = end
    host.compress(live)
    assert host.events == []


def test_swap_that_a_former_supervisor_allowed_is_refused_again(host):
    strict, open_ = host.slot(1), host.slot(2, limit_bytes=LIMIT_BYTES)
    for live in (strict, open_):
        asyncio.run(host.compressor.adopt(live))
    assert host.requests == [(open_.slot.scope, 0)]


def test_reclaim_is_false_when_the_kernel_frees_no_more(tmp_path, monkeypatch):
    group = Cgroup(str(tmp_path), str(tmp_path), str(tmp_path))
    with pytest.raises(FileNotFoundError):
        group.reclaim(4096)
    (tmp_path / "memory.reclaim").write_text("")
    assert group.reclaim(4096) and (tmp_path / "memory.reclaim").read_text() == "4096"

    def refuse(fd, data):
        raise BlockingIOError

    monkeypatch.setattr(os, "write", refuse)
    assert not group.reclaim(4096)


def test_while_no_file_can_be_opened_slots_wait_for_their_next_sample(host, monkeypatch):
    live = host.slot(1)
    with monkeypatch.context() as patched:
        def fail():
            raise OSError(errno.ENFILE, "Too many open files in system")

        patched.setattr(swap, "read", fail)
        host.compress(live)
    assert not host.requests
    host.compress(live)
    assert host.requests
