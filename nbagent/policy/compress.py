"""Whose memory is compressed, and when. Pure.

A notebook that nobody touches keeps tens of MB that nothing reads. Once it has been at rest for long enough they are
compressed, one slot at a time, and once for each time of rest: what comes back on its own, as an open browser tab asks
every ten seconds what kernels there are, is in use and would only go and come again.
"""

from __future__ import annotations

# Between two steps the kernel gives the processor away and a person who comes back is noticed. lz4 takes some
# 50 ms for so much.
STEP_BYTES = 32 << 20
# Of one processor; the rest of the time is the users'.
SHARE = 0.5


def due(rests_since_s: float, compressed_s: float | None, after_s: float | None, now_s: float) -> bool:
    """Whether a slot is to be compressed: at rest for `after_s`, and not since it was compressed last.

    `after_s` None: never.
    """
    if after_s is None or now_s - rests_since_s < after_s:
        return False
    return compressed_s is None or compressed_s < rests_since_s


def steps(memory_bytes: int) -> int:
    """In how many steps memory is compressed."""
    return -(-memory_bytes // STEP_BYTES)


def pause_s(took_s: float) -> float:
    """The pause after a slot whose compression took so long."""
    return took_s * (1 - SHARE) / SHARE
