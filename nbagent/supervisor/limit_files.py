# SPDX-License-Identifier: BSD-3-Clause
"""The files of a slot that show its limits in the place of the host's: /proc/meminfo, and the processors online.

Each slot has its own two in its directory on the host, mounted read-only in the slot. The supervisor writes them at the
start, at a change of limits, and at each sample, so that the free memory is as old as the last sample. lxcfs computes
such files at each read, in a process for all slots whose end would end every later read in them.

The file of the processors follows the CPU quota and the limit of tasks, because os.cpu_count() and
sysconf(_SC_NPROCESSORS_ONLN) read it. /proc/cpuinfo and /proc/stat stay those of the host, with which
sched_getaffinity(2) agrees: a copy would cost each slot 1.4 KiB a processor, and a copy of counters stands still, so
that psutil.cpu_percent() would be 0.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nbagent.wire.limits_page import SlotLimits, processors

MEMORY, PROCESSORS = "meminfo", "online"
NAMES = (MEMORY, PROCESSORS)
ONLINE = Path("/sys/devices/system/cpu/online")
# Fields that psutil, procps and others read; without one of them psutil prints a warning. Those without a figure are 0.
_FIELDS = (
    "MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "SwapCached", "Active", "Inactive", "Active(anon)",
    "Inactive(anon)", "Active(file)", "Inactive(file)", "Unevictable", "Mlocked", "SwapTotal", "SwapFree", "Dirty",
    "Writeback", "AnonPages", "Mapped", "Shmem", "Slab", "SReclaimable", "SUnreclaim",
)


_USED, _FREE = ("Active", "Active(anon)", "AnonPages"), ("MemFree", "MemAvailable")
_FORMS = {"MemTotal": "%(total)8d", **dict.fromkeys(_USED, "%(used)8d"), **dict.fromkeys(_FREE, "%(free)8d")}
_MEMINFO = "".join(f"{field + ':':16}{_FORMS.get(field, f'{0:8d}')} kB\n" for field in _FIELDS)


class LimitFiles:
    """The files of one slot, in `directory`. A slot of an older version has none, and gets none."""

    def __init__(self, directory: Path, online: Path = ONLINE) -> None:
        self._directory, self._online = str(directory), online
        self._written: dict[str, bytes] = {}
        self._limits: SlotLimits | None = None

    def create(self, limits: SlotLimits) -> None:
        """Makes the files. Raises OSError."""
        self._write(MEMORY, meminfo(limits.memory_bytes, 0), os.O_CREAT | os.O_EXCL)
        self._write(PROCESSORS, self._processors(limits), os.O_CREAT | os.O_EXCL)

    def update(self, limits: SlotLimits, used_bytes: int) -> None:
        """Writes what has changed. An error is ignored, because the slot goes on with the former content."""
        contents = {MEMORY: meminfo(limits.memory_bytes, used_bytes)}
        if limits != self._limits:
            contents[PROCESSORS] = self._processors(limits)
        for name, content in contents.items():
            if self._written.get(name) != content:
                with contextlib.suppress(OSError):
                    self._write(name, content, 0)

    def _processors(self, limits: SlotLimits) -> bytes:
        present, self._limits = "0", limits
        with contextlib.suppress(OSError):
            present = self._online.read_text().strip()
        return shown_processors(present, limits)

    def _write(self, name: str, content: bytes, flags: int) -> None:
        # In place, because the slot has this inode mounted.
        fd = os.open(f"{self._directory}/{name}", os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
        try:
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
        finally:
            os.close(fd)
        self._written[name] = content


def meminfo(memory_bytes: int, used_bytes: int) -> bytes:
    """The content of /proc/meminfo for a slot: always of the same length, so that one write replaces it whole."""
    free_bytes = max(0, memory_bytes - used_bytes)
    used_bytes = memory_bytes - free_bytes
    return (_MEMINFO % {"total": memory_bytes >> 10, "used": used_bytes >> 10, "free": free_bytes >> 10}).encode()


def shown_processors(online: str, limits: SlotLimits) -> bytes:
    """The content of the file `online` for a slot: as many of the host's, from the first, as its limits suffice for.

    `online` is a list of numbers and ranges, such as "0,2-5".
    """
    numbers = [number for part in online.split(",") for number in _range(part)]
    numbers = numbers[:processors(limits, len(numbers))]
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return (",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges) + "\n").encode()


def _range(part: str) -> range:
    low, _, high = part.partition("-")
    return range(int(low), int(high or low) + 1)
