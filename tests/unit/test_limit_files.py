# SPDX-License-Identifier: BSD-3-Clause
"""The files that show a slot's limits, by pure functions and in a directory."""

import os
import stat

import psutil
import pytest

from nbagent.supervisor.limit_files import NAMES, LimitFiles, meminfo, shown_processors
from nbagent.wire.limits_page import SlotLimits

GIB = 1 << 30


@pytest.mark.parametrize(("online", "quota", "tasks", "shown"), [
    ("0-15", None, 256, "0-15"), ("0-15", 2.0, 256, "0-1"), ("0-15", 0.5, 256, "0"), ("0-15", 1.5, 256, "0-1"),
    ("0-15", 64.0, 256, "0-15"), ("0,2-5,8", 3.0, 256, "0,2-3"), ("0,2-5,8", None, 256, "0,2-5,8"),
    ("0", 1.0, 256, "0"), ("1,3,5", 2.0, 256, "1,3"), ("0-63", None, 256, "0-15"), ("0-63", None, 1024, "0-63"),
])
def test_a_slot_has_as_many_processors_online_as_its_limits_suffice_for(online, quota, tasks, shown):
    assert shown_processors(online, SlotLimits(GIB, quota, tasks)) == f"{shown}\n".encode()


def test_the_memory_is_that_of_the_slot_and_psutil_reads_it_without_a_warning(tmp_path, monkeypatch, recwarn):
    (tmp_path / "meminfo").write_bytes(meminfo(2 * GIB, GIB // 2))
    (tmp_path / "vmstat").write_text("")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    found = psutil.virtual_memory()
    assert (found.total, found.available, found.percent) == (2 * GIB, GIB * 3 // 2, 25.0)
    assert not [warning for warning in recwarn if "memory" in str(warning.message)]


def test_a_slot_above_its_limit_has_no_free_memory_and_the_length_stays():
    above, below = meminfo(GIB, 2 * GIB), meminfo(64 * GIB, 0)
    assert b"MemAvailable:          0 kB" in above and len(above) == len(below)


def test_files_keep_their_inode_at_a_change_and_only_root_writes_them(tmp_path):
    (tmp_path / "cpus").write_text("0-15\n")
    files = LimitFiles(tmp_path, tmp_path / "cpus")
    files.create(SlotLimits(GIB, None))
    before = {name: (tmp_path / name).stat() for name in NAMES}
    assert all(stat.S_IMODE(status.st_mode) == 0o644 for status in before.values())
    assert (tmp_path / "online").read_text() == "0-15\n"
    files.update(SlotLimits(2 * GIB, 2.0), 0)
    assert (tmp_path / "online").read_text() == "0-1\n"
    assert f"MemTotal:       {2 * GIB >> 10:8d} kB" in (tmp_path / "meminfo").read_text()
    files.update(SlotLimits(2 * GIB, 2.0, 16), 0)
    assert (tmp_path / "online").read_text() == "0\n"
    assert {name: (tmp_path / name).stat().st_ino for name in NAMES} == {n: s.st_ino for n, s in before.items()}


def test_a_slot_of_an_older_version_gets_no_files(tmp_path):
    LimitFiles(tmp_path).update(SlotLimits(GIB, 1.0), 0)
    assert os.listdir(tmp_path) == []
