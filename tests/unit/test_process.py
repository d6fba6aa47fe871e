# SPDX-License-Identifier: BSD-3-Clause
"""Functions about the attributes of a process (nbagent.linux.process)."""

import os
import resource
from pathlib import Path

import pytest

from nbagent.linux.process import make_room_for_descriptors, runs_replaced_files


def table_size() -> int:
    """The size of the kernel's descriptor table of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("FDSize:")).split()[1])


@pytest.mark.parametrize(("limit", "expected"), [(4096, 2048), (1024, 1024)])
def test_the_descriptor_table_grows_up_to_the_resource_limit(limit: int, expected: int) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            before = os.listdir("/proc/self/fd")
            make_room_for_descriptors(2048)
            status = 0 if table_size() == expected and os.listdir("/proc/self/fd") == before else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("mapping", "is_replaced"), [
    (b"r-xp 00001000 fe:00 123    /usr/lib/x86_64-linux-gnu/libz.so.1.2.13 (deleted)\n", True),
    (b"r-xp 00001000 fe:00 124    /usr/bin/python3.11 (deleted)\n", True),
    (b"r-xp 00001000 fe:00 123    /usr/lib/x86_64-linux-gnu/libz.so.1.2.13\n", False),
    (b"r--p 00001000 fe:00 123    /usr/lib/locale/C.utf8/LC_CTYPE (deleted)\n", False),
    (b"r-xp 00000000 00:01 1024   /memfd:libffi (deleted)\n", False),
    (b"rwxp 00000000 00:00 0 \n", False),
    (b"r-xp 00000000 00:00 0      [vdso]\n", False),
])
def test_a_process_runs_replaced_files_while_it_has_mapped_one_that_was_removed(
    tmp_path: Path, mapping: bytes, is_replaced: bool
) -> None:
    maps = tmp_path / "maps"
    first = b"5605a0000000-5605a0001000 r--p 00000000 fe:00 124    /usr/bin/python3.11\n"
    maps.write_bytes(first + b"7f12a0000000-7f12a0001000 " + mapping)
    assert runs_replaced_files(str(maps)) is is_replaced
    assert not runs_replaced_files(str(tmp_path / "absent"))
