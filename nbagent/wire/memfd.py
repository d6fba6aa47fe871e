# SPDX-License-Identifier: BSD-3-Clause
"""Bytes that are too large for a packet travel in a sealed memfd. Standard library only; Python 3.9 and up."""

from __future__ import annotations

import fcntl
import os
from typing import Iterable

from nbagent.wire.fields import MalformedMessage

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def create(name: str, chunks: Iterable[bytes]) -> int:
    """A memfd with `chunks` in it, sealed against any change. The descriptor is the caller's. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for chunk in chunks:
            left = memoryview(chunk)
            while left:
                left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def size(fd: int, limit_bytes: int) -> int:
    """The size of a sealed memfd of at most `limit_bytes`, which is open for reading.

    Raises MalformedMessage for any other descriptor, because a read of it could block or fail, or its content could
    change.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _SEALS != _SEALS or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise MalformedMessage("a descriptor is not a sealed memfd that can be read")
    size_bytes = os.fstat(fd).st_size
    if size_bytes > limit_bytes:
        raise MalformedMessage(f"{size_bytes} bytes, more than {limit_bytes}")
    return size_bytes


def read(fd: int, limit_bytes: int) -> bytes:
    """All of a sealed memfd. Raises MalformedMessage as `size` does."""
    return os.pread(fd, size(fd, limit_bytes), 0)
