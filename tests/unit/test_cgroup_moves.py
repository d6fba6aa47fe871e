# SPDX-License-Identifier: BSD-3-Clause
"""MigrationPrimer: a process is moved into its own cgroup, with cgroup v1 and v2."""

import os
import threading
import time
from pathlib import Path

import pytest

from nbagent.linux import cgroup


def test_prime_writes_the_own_process_to_the_own_cgroup(tmp_path: Path) -> None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
    at = tmp_path / ("" if len(lines) == 1 else "unified") / own
    with pytest.raises(FileNotFoundError):
        cgroup.MigrationPrimer(tmp_path)
    at.mkdir(parents=True, exist_ok=True)
    procs = at / "cgroup.procs"
    procs.write_text("")
    before = set(threading.enumerate())
    primer = cgroup.MigrationPrimer(tmp_path)
    # The kernel takes 0 in cgroup.procs as the writing process.
    for written in ("0", "00"):
        primer.prime()
        deadline_s = time.monotonic() + 10
        while procs.read_text() != written:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    # The end of the pipe ends the thread, and only then may its other descriptors be closed.
    os.close(primer._trigger_write)
    for thread in set(threading.enumerate()) - before:
        thread.join()
    os.close(primer._trigger_read)
    os.close(primer._procs)
