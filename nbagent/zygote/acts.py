# SPDX-License-Identifier: BSD-3-Clause
"""The requests to a notebook server that are acts of a person. Standard library only; Python 3.9 and up."""

from __future__ import annotations

import re

# JupyterLab polls by GET only.
ACTING_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# Requests that pages send by themselves, below the base URL: jupyterlab-git polls by POST every 3 s.
POLLED = re.compile(
    r"git(?:/.+)?/(?:branch|changed_files|remote/(?:details/)?(?:fetch|show)|stash|status|submodules|tags)$"
)


def is_act(method: str, path: str, status: int, by_user: bool = True) -> bool:
    """Whether a request with this response is an act of a person; `path` is below the base URL.

    A refused request is none: anyone who knows the URL of a slot can send it, and so could keep the slot from ending.
    Nor is one that is answered without a login (`by_user`), as by Jupyter's redirect of each path with a slash at its
    end.
    """
    return by_user and method in ACTING_METHODS and status < 400 and POLLED.match(path) is None
