# SPDX-License-Identifier: BSD-3-Clause
"""The bound on file locks: when they are counted, to which slot they belong, and which slot is ended."""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import struct

import pytest

from nbagent.core.model import Limits, Slot, SlotState
from nbagent.linux import cgroup
from nbagent.supervisor import lock_guard
from nbagent.supervisor.lock_guard import GROWTH_BYTES, READ_S, LockGuard, locks_by_owner, unreclaimable_bytes
from nbagent.supervisor.running_slot import RunningSlot
from nbagent.supervisor.tasks import Tasks

SLOT = Slot(
    id="h-0", image="minimal", digest="d", id_base=1 << 20, uid=2000, state=SlotState.CLAIMED,
    limits=Limits(1 << 30, 100, None, 256), token="t", created_s=0.0, claimed_s=0.0, ttl_s=100000.0,
)
LOCKS = """\
1: POSIX  ADVISORY  WRITE 4711 00:2f:1234 0 0
1: -> POSIX  ADVISORY  WRITE 4712 00:2f:1234 0 0
2: FLOCK  ADVISORY  WRITE 4711 00:2f:1235 0 EOF
3: OFDLCK ADVISORY  READ -1 {device}:1236 128 128
4: LEASE  ACTIVE    READ 4713 08:01:17 0 EOF
"""


class Stopper:
    def __init__(self):
        self.ended = []

    def end(self, live, event, text, *, at_once):
        assert at_once
        self.ended.append((live.slot.id, text))


@pytest.fixture
def slots(tmp_path, monkeypatch):
    """Two slots with a root each; the first has the file system of the test, and process 4711."""
    monkeypatch.setattr(cgroup, "unit_of_process", lambda pid: {4711: "nbagent-h-1.scope"}.get(pid, "other.service"))
    lives = []
    with contextlib.ExitStack() as stack:
        for number, directory in ((1, tmp_path), (2, "/proc")):
            fd = os.open(directory, os.O_PATH)
            stack.callback(os.close, fd)
            live = RunningSlot(dataclasses.replace(SLOT, id=f"h-{number}"))
            live.root_fd = fd
            lives.append(live)
        yield lives


def write(tmp_path, size_bytes):
    device = os.stat(tmp_path).st_dev
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nSUnreclaim:   {size_bytes >> 10} kB\n")
    (tmp_path / "locks").write_text(LOCKS.format(device=f"{os.major(device):02x}:{os.minor(device):02x}"))


def test_locks_are_counted_by_process_or_device(tmp_path):
    write(tmp_path, 0)
    device = os.stat(tmp_path).st_dev
    assert locks_by_owner(tmp_path / "locks") == {
        4711: 2, 4712: 1, 4713: 1, f"{os.major(device):02x}:{os.minor(device):02x}": 1,
    }


def test_only_the_newest_locks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_guard, "COUNTED_MAX", 2)
    write(tmp_path, 0)
    assert locks_by_owner(tmp_path / "locks") == {4711: 1, 4712: 1}


def test_the_kernels_list_has_this_form(tmp_path):
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    before = locks_by_owner("/proc/locks")[os.getpid()]
    for offset in range(0, 20, 2):
        fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    assert locks_by_owner("/proc/locks")[os.getpid()] == before + 10
    os.close(file)
    with open("/proc/meminfo") as meminfo:
        assert unreclaimable_bytes(meminfo.read()) > 1 << 20


async def test_a_slot_with_too_many_locks_is_ended_after_memory_has_grown(tmp_path, slots, monkeypatch):
    monkeypatch.setattr(lock_guard, "LOCKS_MAX", 2)
    stopper, tasks, at_s = Stopper(), Tasks(), 100.0
    guard = LockGuard(stopper, tasks, tmp_path)

    async def check(size_bytes):
        nonlocal at_s
        at_s += READ_S
        write(tmp_path, size_bytes)
        guard.check(lambda: slots, at_s)
        await tasks.finish()

    # As while no open file is left.
    guard.check(lambda: slots, at_s)
    await check(1 << 30)
    await check((1 << 30) + GROWTH_BYTES - 4096)
    assert stopper.ended == []
    await check((1 << 30) + GROWTH_BYTES)
    assert stopper.ended == [
        ("h-1", "it holds 3 of the 50000 newest file locks of the host, which fill its memory"),
    ]
    # Memory that stays used is not counted again, and less is the new beginning.
    await check((1 << 30) + GROWTH_BYTES)
    await check(1 << 20)
    await check((1 << 20) + GROWTH_BYTES)
    assert len(stopper.ended) == 2


async def test_a_slot_whose_root_is_gone_stops_no_count(tmp_path, slots, monkeypatch):
    monkeypatch.setattr(lock_guard, "LOCKS_MAX", 1)
    slots[1].root_fd = -1
    stopper, tasks = Stopper(), Tasks()
    guard = LockGuard(stopper, tasks, tmp_path)
    for at_s, size_bytes in ((100.0, 0), (200.0, GROWTH_BYTES)):
        write(tmp_path, size_bytes)
        guard.check(lambda: slots, at_s)
    await asyncio.sleep(0)
    await tasks.finish()
    assert [name for name, _ in stopper.ended] == ["h-1"]
