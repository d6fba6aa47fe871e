# SPDX-License-Identifier: BSD-3-Clause
"""Functions by which a process changes itself (nbagent.linux.process)."""

import os
import resource
from pathlib import Path

import pytest

from nbagent.linux.process import make_room_for_descriptors


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
