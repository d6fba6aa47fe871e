# SPDX-License-Identifier: BSD-3-Clause
"""Resources of the host that are nearly used up are reported once, and again when they suffice."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from nbagent.linux import resources
from nbagent.linux.resources import Kernel, Resource
from nbagent.supervisor.resources import Resources, read


def test_a_resource_is_reported_when_it_is_low_and_when_it_suffices(journal: list[dict[str, str]]) -> None:
    host = Resources()

    def texts(free: int) -> list[str]:
        host.note([Resource("inodes of /run/nbagent", free, 1000), Resource("open files", 900, 1000)])
        found = [entry["MESSAGE"] for entry in journal]
        journal.clear()
        return found

    assert texts(50) == []
    assert texts(49) == ["inodes of /run/nbagent of this host are nearly used up: 49 of 1000 are left"]
    assert host.free_percent == {"inodes of /run/nbagent": 4.9, "open files": 90.0}
    assert texts(0) == texts(100) == []
    assert texts(101) == ["inodes of /run/nbagent of this host suffice again: 101 of 1000 are left"]
    assert texts(101) == []


def test_the_resources_of_this_machine_have_limits() -> None:
    with Kernel() as kernel:
        found = {resource.name: resource for resource in (*resources.of_file_system(Path("/")), *read(kernel))}
    assert {"blocks", "processes and threads", "open files", "descriptors of the supervisor"} <= found.keys()
    assert all(0 <= each.free <= each.limit for each in found.values())


def test_a_process_without_a_free_descriptor_has_none_left() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert resources.of_process().free > 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        assert resources.of_process() == Resource("descriptors", 0, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    with Kernel(tmp_path) as kernel:
        assert kernel.read() == []


def test_the_counts_of_the_kernel_are_read_while_no_file_can_be_opened(tmp_path: Path) -> None:
    for name, text in (("loadavg", "0.1 0.2 0.3 1/120 9"), ("sys/fs/file-nr", "900\t0\t1000"),
                       ("sys/kernel/pid_max", "100"), ("sys/kernel/threads-max", "200")):
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / name).write_text(text)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Kernel(tmp_path) as kernel:
        (tmp_path / "proc/sys/fs/file-nr").write_text("999\t0\t1000")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            assert kernel.read() == [Resource("processes and threads", 0, 100), Resource("open files", 1, 1000)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_not_there_is_left_out(journal: list[dict[str, str]]) -> None:
    def nothing(_: Kernel) -> Iterator[Resource]:
        yield from ()

    host = Resources(nothing)
    with Kernel() as kernel:
        host.note(list(nothing(kernel)))
    assert host.free_percent == {} and journal == []
