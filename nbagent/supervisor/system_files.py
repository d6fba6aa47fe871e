# SPDX-License-Identifier: BSD-3-Clause
"""The files of sysfs that slots see: the processors of the host.

They are copied once, because sysfs itself has the host's inodes, whose watches and locks all slots would share, and
describes the host's disks and network.

lscpu, psutil and joblib count processors and cores by them. The number that a slot's quota suffices for is in the file
`online`, over which each slot mounts its own (nbagent.supervisor.limit_files), in its environment
(nbagent.wire.limits_page), and in its cgroup.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SYSFS = Path("/sys")
_FILES = (
    "devices/system/cpu/online", "devices/system/cpu/possible", "devices/system/cpu/present",
    "devices/system/cpu/kernel_max", "devices/system/cpu/cpu[0-9]*/topology/*", "devices/system/node/online",
    "devices/system/node/possible", "devices/system/node/has_cpu", "devices/system/node/node[0-9]*/cpulist",
    "devices/system/node/node[0-9]*/cpumap",
)
# Where a slot mounts its cgroup.
_DIRECTORY = "fs/cgroup"


def make(target: Path, source: Path = SYSFS) -> None:
    """Makes the directory `target`, unless it exists; slots that run have it mounted. Raises OSError."""
    if target.exists():
        return
    made = target.with_name(f"{target.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    (made / _DIRECTORY).mkdir(parents=True)
    for pattern in _FILES:
        for path in source.glob(pattern):
            copy = made / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.write_bytes(path.read_bytes())
            except OSError:
                # Some files of sysfs exist and have no value on some machines.
                copy.unlink(missing_ok=True)
    made.rename(target)
