# SPDX-License-Identifier: BSD-3-Clause
"""The limits of a slot, for its own programs: the part of the activity page that the supervisor writes, and the
variables by which libraries read them.

A library that sizes itself by the processors or the memory of the host is slow in a slot with a quota, because its
threads wait for each other, or is killed. A claim and a change of a slot may set other limits than the slot was started
with, so the server of a slot reads the page before each start of a kernel or terminal.

Layout after activity.py's part, little endian: a double, the processors of the CPU quota, 0.0 for none; a uint64, the
memory in bytes, 0 while nothing was written; a uint32, the processes and threads, 0 in a page of an older supervisor.
Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING, Dict, List, MutableMapping, NamedTuple, Optional

if TYPE_CHECKING:
    from nbagent.core.model import Limits

_LAYOUT = struct.Struct("<dQI")
_OFFSET = 64
# Variables with the number of threads that a library starts, or the number of processors that it sees.
THREADS = (
    "PYTHON_CPU_COUNT", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS",
    "POLARS_MAX_THREADS", "RAYON_NUM_THREADS", "LOKY_MAX_CPU_COUNT", "NUMBA_NUM_THREADS",
)
# Of a slot's processes and threads for each thread of a library, so that there is room for three kernels with four
# pools of threads each (numpy's OpenBLAS, scipy's, OpenMP and another), their own threads, and the server.
TASKS_PER_THREAD = 16


class SlotLimits(NamedTuple):
    """A slot's memory, the CPU quota in processors (None: no quota), and the processes and threads (0: unknown)."""

    memory_bytes: int
    cpu_quota: Optional[float]
    tasks: int = 0

    @classmethod
    def of(cls, limits: Limits) -> SlotLimits:
        """Those of the limits of a slot's scope."""
        return cls(limits.memory_bytes, limits.cpu_quota, limits.tasks)


def write(fd: int, limits: SlotLimits) -> None:
    """Writes the limits to the page."""
    os.pwrite(fd, _LAYOUT.pack(limits.cpu_quota or 0.0, limits.memory_bytes, limits.tasks), _OFFSET)


def read(fd: int) -> Optional[SlotLimits]:
    """The limits on the page; None when there are none, as on that of a slot of an older supervisor."""
    quota, memory_bytes, tasks = _LAYOUT.unpack(os.pread(fd, _LAYOUT.size, _OFFSET).ljust(_LAYOUT.size, b"\0"))
    return SlotLimits(memory_bytes, quota if quota > 0 else None, tasks) if memory_bytes else None


def processors(limits: SlotLimits, present: int) -> int:
    """The number of processors that a library may start a thread for: of `present`, those that the limits suffice for.

    A quota is rounded up, because one thread less would leave a part of it. At the limit of tasks a library fails when
    it starts its threads, as numpy's OpenBLAS does at its import.
    """
    found = present
    if limits.cpu_quota is not None:
        found = min(found, math.ceil(limits.cpu_quota))
    if limits.tasks:
        found = min(found, limits.tasks // TASKS_PER_THREAD)
    return max(1, found)


def variables(limits: SlotLimits, present: int) -> Dict[str, str]:
    """The environment variables for these limits, on a host with `present` processors for the slot.

    Without a quota a slot may use all processors that are idle, so the number of threads is left to the libraries,
    unless there are more processors than the limit of tasks suffices for. OpenMP's threads wait without spinning in
    every slot, because those that spin take the time of the others that the quota, or the other slots, leave.
    """
    found = {"OMP_WAIT_POLICY": "PASSIVE", "MEM_LIMIT": str(limits.memory_bytes)}
    number = processors(limits, present)
    if limits.cpu_quota is not None or number < present:
        found.update(dict.fromkeys(THREADS, str(number)))
    if limits.cpu_quota is not None:
        found["CPU_LIMIT"] = f"{limits.cpu_quota:g}"
    return found


class LimitVariables:
    """Keeps the variables of environments at the limits of the page. A value that the image has set stays."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._given: Dict[str, List[str]] = {}

    def apply(self, *environments: MutableMapping[str, str]) -> None:
        """Sets the variables for the current limits in these environments."""
        try:
            limits = read(self._fd)
        except OSError:
            return
        if limits is None:
            return
        wanted = variables(limits, len(os.sched_getaffinity(0)))
        for environment in environments:
            for name in {*wanted, *self._given}:
                present = environment.get(name)
                if present is None or present in self._given.get(name, ()):
                    if name in wanted:
                        environment[name] = wanted[name]
                    else:
                        environment.pop(name, None)
        for name, value in wanted.items():
            known = self._given.setdefault(name, [])
            if value not in known:
                known.append(value)
