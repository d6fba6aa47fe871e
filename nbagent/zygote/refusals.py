# SPDX-License-Identifier: BSD-3-Clause
"""Answers of the notebook server when a resource of the slot is used up: its storage, or its processes and threads.

jupyter_server answers most requests that fail for want of it with "Unhandled error", or with the text of a later error.
Here each such answer of its API has the reason, which JupyterLab shows in a dialog.

Runs inside an image, under the image's own Python; 3.9 and up.
"""

from __future__ import annotations

import os
from typing import Any, Iterator, Optional

from jupyter_server.base.handlers import APIHandler
from tornado.web import HTTPError

from nbagent.sandbox.spec import ACTIVITY_FD
from nbagent.zygote import full_storage, task_limit


def answer() -> None:
    """Makes the API's handlers answer so; for the whole process, and to be called once."""
    write_error = APIHandler.write_error

    def write_error_or_reason(handler: Any, status_code: int, **kwargs: Any) -> None:
        if status_code >= 500:
            error = (kwargs.get("exc_info") or (None, None))[1]
            if (refusal := _refusal(error)) is not None:
                status_code = refusal.status_code
                handler.set_status(status_code)
                kwargs["exc_info"] = (HTTPError, refusal, None)
        write_error(handler, status_code, **kwargs)

    APIHandler.write_error = write_error_or_reason


def _refusal(error: Optional[BaseException]) -> Optional[HTTPError]:
    """The answer for an error that has such a reason."""
    home = os.path.expanduser("~")
    full = HTTPError(507, full_storage.explanation(home))  # Insufficient Storage, RFC 4918
    for cause in _causes(error):
        if full_storage.is_cause(cause):
            return full
        if task_limit.is_cause(cause):
            return HTTPError(503, task_limit.explanation(ACTIVITY_FD))
    # Some libraries ignore the failed write of a file and fail when they read it (nbformat's notebook_secret).
    return full if full_storage.is_full(home) else None


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An exception, and those that it was raised after."""
    seen = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
