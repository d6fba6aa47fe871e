# SPDX-License-Identifier: BSD-3-Clause
"""Answers of the notebook server when the slot's storage is full.

jupyter_server answers most requests that fail for want of space with "Unhandled error", or with the text of a later
error. Here each such answer of its API is 507 with the reason, which JupyterLab shows in a dialog.

Runs inside an image, under the image's own Python; 3.9 and up.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Dict, Optional

from jupyter_server.base.handlers import APIHandler
from tornado.web import HTTPError

STATUS = 507  # Insufficient Storage, RFC 4918
SMALL_BYTES = 1 << 16


def answer() -> None:
    """Makes the API's handlers answer so; for the whole process, and to be called once."""
    write_error = APIHandler.write_error

    def write_error_or_reason(handler: Any, status_code: int, **kwargs: Any) -> None:
        home = os.path.expanduser("~")
        error = (kwargs.get("exc_info") or (None, None))[1]
        # Some libraries ignore the failed write of a file and fail when they read it (nbformat's notebook_secret).
        if status_code >= 500 and (lacks_space(error) or is_full(home)):
            status_code = STATUS
            handler.set_status(STATUS)
            kwargs["exc_info"] = (HTTPError, HTTPError(STATUS, explanation(home)), None)
        write_error(handler, status_code, **kwargs)

    APIHandler.write_error = write_error_or_reason


def lacks_space(error: Optional[BaseException]) -> bool:
    """Whether an exception, or one that it was raised after, is ENOSPC."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


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
