# SPDX-License-Identifier: BSD-3-Clause
"""Named points in the life of a slot at which a test ends the supervisor as a crash would, each exactly once.

A drop-in with Environment=NBAGENT_CRASH_POINTS=1 enables them. The supervisor then ends without any clean-up at the
point that the file CRASH_POINT names, and removes this file first, so that the next supervisor goes on.
"""

from __future__ import annotations

import contextlib
import enum
import os

from nbagent.core import paths

_ENABLED = "NBAGENT_CRASH_POINTS" in os.environ
_STATUS = 137  # as after SIGKILL, in a shell


class Point(enum.Enum):
    """A point, by what has been done when the supervisor ends."""

    RECORD_CREATED = "a slot has a record, but no process"
    FORKED = "the init of a slot is forked, but in no scope"
    SCOPE_STARTED = "a slot has a scope, and its record is that of a start"
    SERVES = "a slot serves, and its record is that of a start"
    WARM_RECORDED = "a slot has the record of a warm one"
    PREPARING = "a claim has taken a slot, and its limits are the former"
    LIMITS_SET = "a claimed slot has its limits, but no content"
    CONTENT_STARTED = "content is being delivered"
    CLAIM_RECORDED = "a slot is claimed by its record, and no response was sent"
    ROUTE_REMOVED = "a released slot has no record, but runs"
    STOPPED = "a released slot is stopped, and its remains are not removed"
    UPDATE_RECORDED = "a slot has a record with new limits, and a scope with the former"
    SLOT_ADOPTED = "one of several slots is adopted"
    ZYGOTE_READY = "a zygote is ready, and systemd does not have its connection"
    IMAGE_REPLACED = "the pool has a new image, and its zygote was not started"


def reach(point: Point) -> None:
    """Ends this process when a test has named the point."""
    if _ENABLED and _is_named(point):
        os._exit(_STATUS)


def _is_named(point: Point) -> bool:
    with contextlib.suppress(FileNotFoundError):
        if paths.CRASH_POINT.read_text().strip() == point.name:
            paths.CRASH_POINT.unlink()
            return True
    return False
