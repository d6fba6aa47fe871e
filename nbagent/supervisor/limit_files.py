# SPDX-License-Identifier: BSD-3-Clause
"""The files of a slot that show its limits in the place of the host's: /proc/meminfo, and the processors online.

Each slot has its own two in its directory on the host, mounted read-only in the slot. The supervisor writes them at the
start, at a change of limits, and at each sample, so that the free memory is as old as the last sample. lxcfs computes
such files at each read, in a process for all slots whose end would end every later read in them.

The file of the processors follows the CPU quota, because os.cpu_count() and sysconf(_SC_NPROCESSORS_ONLN) read it.
/proc/cpuinfo and /proc/stat stay those of the host, with which sched_getaffinity(2) agrees: a copy would cost each slot
1.4 KiB a processor, and a copy of counters stands still, so that psutil.cpu_percent() would be 0.
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


class LimitFiles:
    """The files of one slot, in `directory`. A slot of an older version has none, and gets none."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._written: dict[str, bytes] = {}

    def create(self, limits: SlotLimits, online: Path = ONLINE) -> None:
        """Makes the files. Raises OSError."""
        for name, content in self._contents(limits, 0, online).items():
            self._write(name, content, os.O_CREAT | os.O_EXCL)

    def update(self, limits: SlotLimits, used_bytes: int, online: Path = ONLINE) -> None:
        """Writes what has changed. An error is ignored, because the slot goes on with the former content."""
        for name, content in self._contents(limits, used_bytes, online).items():
            if self._written.get(name) != content:
                with contextlib.suppress(OSError):
                    self._write(name, content, 0)

    def _contents(self, limits: SlotLimits, used_bytes: int, online: Path) -> dict[str, bytes]:
        present = "0"
        with contextlib.suppress(OSError):
            present = online.read_text().strip()
        return {MEMORY: meminfo(limits.memory_bytes, used_bytes),
                PROCESSORS: shown_processors(present, limits.cpu_quota)}

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
    figures = {"MemTotal": memory_bytes, "MemFree": free_bytes, "MemAvailable": free_bytes,
               "Active": used_bytes, "Active(anon)": used_bytes, "AnonPages": used_bytes}
    return "".join(f"{field + ':':16}{figures.get(field, 0) >> 10:8d} kB\n" for field in _FIELDS).encode()


def shown_processors(online: str, cpu_quota: float | None) -> bytes:
    """The content of the file `online` for a slot: as many of the host's, from the first, as its quota suffices for.

    `online` is a list of numbers and ranges, such as "0,2-5".
    """
    numbers = [number for part in online.split(",") for number in _range(part)]
    if cpu_quota is not None:
        numbers = numbers[:processors(cpu_quota, len(numbers))]
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
