# SPDX-License-Identifier: BSD-3-Clause
"""Messages that no receiver accepts, and the descriptors that are open, of which none may be leaked."""

from __future__ import annotations

import os
import time

MALFORMED = [
    b"{", b"[]", b'{"failure": {"step": "x", "errno": 1e999, "text": ""}}', b'{"fds": ["a", "b"]}', b"x" * 200_000,
]


def open_fds():
    return set(os.listdir("/proc/self/fd"))


def settles_at(count):
    """Whether as many descriptors are open soon; a server closes its connection after the client has its response."""
    deadline_s = time.monotonic() + 5
    while len(open_fds()) != count and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return len(open_fds()) == count
