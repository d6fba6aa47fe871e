# SPDX-License-Identifier: BSD-3-Clause
"""The resources of which a host has a limited number: blocks and inodes of file systems, processes, and open files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Resource(NamedTuple):
    """A resource of the host: how many are free, of how many."""

    name: str
    free: int
    limit: int

    @property
    def free_percent(self) -> float:
        """The free part."""
        return 100 * self.free / self.limit


def of_file_system(path: Path, read: Callable[[Path], os.statvfs_result] = os.statvfs) -> list[Resource]:
    """The blocks and inodes of the file system of `path`. Raises OSError."""
    status = read(path)
    counts = (("blocks", status.f_bavail, status.f_blocks), ("inodes", status.f_favail, status.f_files))
    # Some file systems have no number of inodes.
    return [Resource(name, free, limit) for name, free, limit in counts if limit]


class Kernel:
    """The counts of the kernel, as a context.

    Its files are opened once, because none can be opened while the kernel has no open file left.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._files: dict[str, int] = {}
        for name in ("loadavg", "sys/kernel/pid_max", "sys/kernel/threads-max", "sys/fs/file-nr"):
            with contextlib.suppress(OSError):
                self._files[name] = os.open(root / "proc" / name, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._files.values():
            os.close(fd)

    def read(self) -> list[Resource]:
        """Processes and threads, and open files, of all users; without those whose limit is not known."""
        threads = int((self._text("loadavg") or "0 0 0 0/0 0").split()[3].partition("/")[2])
        names = ("sys/kernel/pid_max", "sys/kernel/threads-max")
        most = min((int(text) for name in names if (text := self._text(name))), default=0)
        # The open files, 0, and their limit.
        files = (self._text("sys/fs/file-nr") or "0 0 0").split()
        counts = (("processes and threads", threads, most), ("open files", int(files[0]), int(files[2])))
        # A limit can be set below what is in use.
        return [Resource(name, max(0, limit - used), limit) for name, used, limit in counts if limit]

    def _text(self, name: str) -> str:
        return os.pread(self._files[name], 4096, 0).decode() if name in self._files else ""


def of_process() -> Resource:
    """The descriptors that this process may still open. Raises OSError."""
    # RLIM_INFINITY is -1.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = limit if limit > 0 else 1 << 20
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        used = limit
    return Resource("descriptors", max(0, limit - used), limit)
