# SPDX-License-Identifier: BSD-3-Clause
"""A slot whose storage is full: how that is recognised and explained, and a place for temporary files of kernels.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import errno
import os
from typing import Dict

SMALL_BYTES = 1 << 16


def is_cause(error: BaseException) -> bool:
    """Whether an error is for want of space."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def spare_temporary(environment: Dict[str, str], directory: str) -> None:
    """Gives a kernel that starts while /tmp is full another directory for temporary files.

    ipykernel tries to write there for each cell, and IPython when it cannot make its own directory.
    """
    if "TMPDIR" not in environment and is_full("/tmp") and not is_full(directory):
        environment["TMPDIR"] = directory


def is_full(path: str) -> bool:
    """Whether the file system of a path has no room for a small file."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize < SMALL_BYTES or status.f_favail == 0


def explanation(home: str) -> str:
    """The reason, with the size of the storage."""
    status = os.statvfs(home)
    size_mib = status.f_blocks * status.f_frsize >> 20
    files, most = status.f_files - status.f_ffree, status.f_files
    return (
        f"The storage of this notebook is full: {size_mib} MiB, in {files} of at most {most} files. Delete files in"
        " the home directory, /tmp, /var/tmp or /dev/shm, and try again."
    )
