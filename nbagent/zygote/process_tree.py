# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of a forked slot as children of its server, for psutil.

A forked kernel is a child of the fork server, as the server is itself. jupyter-resource-usage, and others that show
what a user takes, add up the server and its descendants, which are without the kernels.

Standard library, and the image's psutil; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, List


def adopt_kernels() -> None:
    """Makes psutil's children() of this process, the server, include the other children of its parent."""
    psutil: Any = sys.modules.get("psutil")
    if psutil is None:
        return
    server, parent, own_children = os.getpid(), os.getppid(), psutil.Process.children

    def children(process: Any, recursive: bool = False) -> List[Any]:
        found: List[Any] = own_children(process, recursive)
        # Not in a process that the server has forked, nor when the fork server has ended and init is the parent.
        if process.pid == server == os.getpid() and os.getppid() == parent:
            with contextlib.suppress(psutil.NoSuchProcess):  # one has ended meanwhile
                for kernel in own_children(psutil.Process(parent)):
                    if kernel.pid != server:
                        found += [kernel, *(own_children(kernel, recursive=True) if recursive else [])]
        return found

    psutil.Process.children = children
