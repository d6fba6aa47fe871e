# SPDX-License-Identifier: BSD-3-Clause
"""The slots whose memory is compressed, and the time of it. Pure.

An unused notebook has tens of MB of memory that no process reads. They are compressed when the slot has been at rest
for long enough, one slot at a time and once in each time of rest. Pages that are read again during the rest, because an
open browser tab requests the list of kernels every ten seconds, are in use and would be swapped in again at once.
"""

from __future__ import annotations

# Between two steps other processes run, and a slot that has become active is detected. lz4 takes some 50 ms for a step.
STEP_BYTES = 32 << 20
# Of one processor; the rest of the time is for users.
SHARE = 0.5


def due(rests_since_s: float, compressed_s: float | None, after_s: float | None, now_s: float) -> bool:
    """Whether a slot has been at rest for `after_s`, and active since it was compressed last. `after_s` None: never."""
    if after_s is None or now_s - rests_since_s < after_s:
        return False
    return compressed_s is None or compressed_s < rests_since_s


def steps(memory_bytes: int) -> int:
    """The number of steps in which memory is compressed."""
    return -(-memory_bytes // STEP_BYTES)


def pause_s(took_s: float) -> float:
    """The pause after a slot whose compression took `took_s`."""
    return took_s * (1 - SHARE) / SHARE
