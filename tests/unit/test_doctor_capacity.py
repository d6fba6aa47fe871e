# SPDX-License-Identifier: BSD-3-Clause
"""The checks of memory, room and the kernel's limits by `nbagent doctor`, on a host of a few files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from host_files import host

from nbagent.config import host_config
from nbagent.core import paths
from nbagent.doctor import capacity
from nbagent.image import ids
from nbagent.policy import admission

SETTINGS = host_config.HostConfig()
MEMINFO = {"proc/meminfo": "MemTotal: 8912896 kB\n"}


@pytest.mark.parametrize(("blocks", "inodes", "status", "found"), [
    ((50, 100), (9, 10), "ok", "50 % of the blocks are free (50)"),
    ((4, 100), (9, 10), "warn", "4 % of the blocks are free (4), for images"),
    ((50, 100), (0, 1000), "fail", "0 % of the inodes are free (0), for images"),
    ((50, 100), (0, 0), "ok", "50 % of the blocks are free (50)"),  # btrfs
])
def test_a_file_system_without_room_is_found(
    tmp_path: Path, blocks: tuple[int, int], inodes: tuple[int, int], status: str, found: str
) -> None:
    def read(path: Path) -> os.statvfs_result:
        assert path == tmp_path / "var/lib/nbagent/images"
        return os.statvfs_result((4096, 4096, blocks[1], blocks[0], blocks[0], inodes[1], inodes[0], inodes[0], 0, 255))

    finding = capacity.check_room(tmp_path, paths.IMAGES, "images", read)
    assert (finding.status, finding.found) == (status, found)


def test_a_directory_that_does_not_exist_needs_no_room(tmp_path: Path) -> None:
    assert capacity.check_room(tmp_path, paths.IMAGES, "images").status == "ok"
    tmp_path.joinpath("var/lib/nbagent/images").mkdir(parents=True)
    found = capacity.check_room(tmp_path, paths.IMAGES, "images").found
    assert re.search(r"\d+ % of the (blocks|inodes) are free", found)


def test_the_use_of_processes_and_open_files_is_compared_with_their_limits(tmp_path: Path) -> None:
    limits = {"proc/sys/kernel/pid_max": "32768\n", "proc/sys/kernel/threads-max": "192000\n"}
    host(tmp_path, {**limits, "proc/loadavg": "1 1 1 3/1000 4711\n", "proc/sys/fs/file-nr": "5000\t0\t100000\n"})
    finding = capacity.check_use(tmp_path)
    assert (finding.status, finding.found) == (
        "ok", "1000 of 32768 processes and threads, 5000 of 100000 open files",
    )
    host(tmp_path, {"proc/loadavg": "1 1 1 3/30000 4711\n"})
    assert "nearly all processes and threads" in capacity.check_use(tmp_path).found
    host(tmp_path, {"proc/loadavg": "1 1 1 3/10 4711\n", "proc/sys/fs/file-nr": "90000\t0\t100000\n"})
    assert "nearly all open files" in capacity.check_use(tmp_path).found
    assert capacity.check_use(tmp_path / "elsewhere").status == "ok"


def test_a_file_of_the_journal_for_each_slot_is_a_warning(tmp_path: Path) -> None:
    assert capacity.check_journal(tmp_path).status == "ok"
    journal = tmp_path / "var/log/journal/0123"
    journal.mkdir(parents=True)
    for name in ("system.journal", "user-1000.journal", "user-1879048192@0a-0b.journal"):
        (journal / name).touch()
    assert capacity.check_journal(tmp_path).status == "ok"
    for uid in (ids.BASES.start, ids.BASES.start + 70_000):
        (journal / f"user-{uid}.journal").touch()
    finding = capacity.check_journal(tmp_path)
    assert finding.status == "warn" and finding.found.startswith("2 files of /var/log/journal are of slots")


def test_memory_of_all_slots_is_compared_with_the_host(tmp_path: Path) -> None:
    host(tmp_path, {"proc/meminfo": "MemTotal:  8912896 kB\nSwapTotal: 1048576 kB\n"})  # 8.5 GiB
    promise = host_config.parse({"slots": {"overcommit": 4.0}})
    assert capacity.capacity_of(tmp_path, promise) == 34
    assert capacity.check_memory(tmp_path, promise).status == capacity.check_memory(tmp_path, SETTINGS).status == "ok"
    greedy = host_config.parse({"slots": {"capacity": 500, "overcommit": 4.0}})
    assert capacity.check_memory(tmp_path, greedy).status == "warn"
    large = host_config.parse({"slots": {"memory": "16G", "memory_max": "16G"}})
    assert capacity.check_memory(tmp_path, large).status == "fail"


@pytest.mark.parametrize("memory_kb", [2 << 20, 25_165_824, 64 << 20, 1 << 40])
@pytest.mark.parametrize("slots", [{}, {"capacity": 7}, {"memory": "300M", "overcommit": 1.5}, {"memory": "4G"}])
def test_capacity_is_the_one_of_admission(tmp_path: Path, memory_kb: int, slots: dict[str, object]) -> None:
    host(tmp_path, {"proc/meminfo": f"MemTotal: {memory_kb} kB\n"})
    settings = host_config.parse({"slots": slots, "host": {"memory_reserve": "1G"}})
    wanted = settings.slots
    expected = admission.most(memory_kb << 10, settings.host.memory_reserve, wanted.memory)
    if wanted.capacity is not None:
        expected = wanted.capacity
    elif wanted.overcommit is not None:
        expected = admission.promised(memory_kb << 10, wanted.memory, wanted.overcommit)
    assert capacity.capacity_of(tmp_path, settings) == expected
    assert capacity.check_memory(tmp_path, settings).status in ("ok", "fail")
    assert f"{expected} slots" in capacity.check_memory(tmp_path, settings).found or memory_kb == 2 << 20


ZRAM = "/dev/zram0    partition    1048572    0    100\n"


@pytest.mark.parametrize(
    ("areas", "status", "found"),
    [("", "ok", "systemd-zram-generator"), (ZRAM, "ok", "1G in zram; idle slots are compressed"),
     ("/dev/sda2  partition  1048572  0  -2\n" + ZRAM, "warn", "/dev/sda2 may be on a disk"),
     ("/swapfile  file  1048572  0  -2\n", "warn", "/swapfile may be on a disk")],
)
def test_slots_are_compressed_only_if_all_swap_is_in_zram(tmp_path: Path, areas: str, status: str, found: str) -> None:
    total = 1048576 if areas else 0
    host(tmp_path, {
        "proc/meminfo": f"MemTotal: 8912896 kB\nSwapTotal: {total} kB\n", "proc/swaps": "Filename Type\n" + areas,
        "sys/block/zram0/comp_algorithm": "lzo [lz4]\n", "sys/fs/cgroup/cgroup.controllers": "memory\n",
    })
    finding = capacity.check_swap(tmp_path, SETTINGS)
    assert finding.status == status and found in finding.found
    assert bool(finding.mend) == (status == "warn")
    # If slots are never compressed, any swap is right.
    assert capacity.check_swap(tmp_path, host_config.parse({"cull": {"compress": "never"}})).status == "ok"
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").unlink()
    assert "slots do not use" in capacity.check_swap(tmp_path, SETTINGS).found or not areas


def test_a_kernel_limit_that_is_too_low_for_the_capacity_is_a_warning(tmp_path: Path) -> None:
    limit = capacity.LIMITS[0]
    settings = host_config.parse({"slots": {"capacity": 1000}})
    host(tmp_path, {"proc/sys/kernel/pid_max": "32768\n", **MEMINFO})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert (finding.status, finding.name) == ("warn", "kernel.pid_max")
    assert finding.mend.startswith("sysctl -w kernel.pid_max=68096")
    host(tmp_path, {"proc/sys/kernel/pid_max": "4194304\n"})
    assert capacity.check_limit(tmp_path, limit, settings).status == "ok"
    assert capacity.check_limit(tmp_path, capacity.LIMITS[-1], settings).found == "not in use"


def test_file_max_is_judged_by_what_users_open(tmp_path: Path) -> None:
    (limit,) = (known for known in capacity.LIMITS if known.each_bytes)
    settings = host_config.parse({"slots": {"capacity": 1305, "memory_max": "4G"}})
    # The value of a machine with 24 GiB, for a host that is a container of it.
    host(tmp_path, {"proc/sys/fs/file-max": "2466177\n", **MEMINFO})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert finding.status == "ok" and finding.found.endswith("may take 22369621")
    host(tmp_path, {"proc/sys/fs/file-max": f"{2**63 - 1}\n"})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert finding.status == "ok" and finding.found.endswith("open files")
    host(tmp_path, {"proc/sys/fs/file-max": "300000\n"})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert finding.status == "warn" and "too few for 1305 slots" in finding.found


@pytest.mark.parametrize(("cpus", "slots", "threads"), [
    (2, {}, "up to 2 threads each"), (16, {}, "up to 16 threads each"),
    (64, {}, "up to 16 threads each; one for each of 64 processors requires slots.tasks = 1024"),
    (64, {"tasks": 1024}, "up to 64 threads each"), (64, {"cpu_quota": "200%"}, "up to 2 threads each"),
    (256, {"cpu_quota": "1/2"}, "up to 16 threads each; one for each of 128 processors requires slots.tasks = 2048"),
])
def test_the_threads_that_tasks_suffice_for_are_named(cpus: int, slots: dict[str, object], threads: str) -> None:
    found = capacity.check_tasks(cpus, host_config.parse({"slots": slots}))
    assert found.status == "ok" and found.found.endswith(threads)


def test_tasks_that_are_too_few_for_a_kernel_with_libraries_are_named() -> None:
    assert capacity.check_tasks(64, host_config.parse({"slots": {"tasks": 28}})).status == "ok"
    found = capacity.check_tasks(64, host_config.parse({"slots": {"tasks": 27}}))
    assert (found.status, found.mend) == ("warn", "raise slots.tasks to 28")
