"""Fills the free places between what is loaded, so that what comes next lies together.

Loading leaves holes: blocks that were freed among others that stay. Whoever is forked would put its objects into them,
one here and one there, and have a copy of its own of a page for each. After `fill` both allocators, Python's and
malloc, have only places in whole pages left to give.

Nothing refers to what the holes are filled with, and nobody gives it back: half a MiB to 2 MiB, once for all
who are forked. Needs CPython 3.10 and up, and glibc; does nothing elsewhere.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Objects/obmalloc.c and pycore_obmalloc.h of CPython 3.10 to 3.13: blocks of one size in pools of 16 KiB, which begin
# with a header; larger objects are malloc's.
POOL_BYTES, POOL_HEADER_BYTES, SMALL_MAX_BYTES, ALIGNMENT_BYTES = 16 << 10, 48, 512, 16
# So many blocks in a row from a pool's beginning: nobody else has anything in that pool.
ROW = 6
# malloc's places of all sizes, from the largest that is not a mapping of its own (mallopt(3), M_MMAP_THRESHOLD).
LARGE_BYTES = (100_000, 65536, 32768, 16384, 8192, 4096, 2048)


def fill() -> int:
    """Takes what is free between what is not; with one thread. Gives the bytes."""
    libc = ctypes.CDLL(None)
    if sys.implementation.name != "cpython" or sys.version_info < (3, 10) or not hasattr(libc, "gnu_get_libc_version"):
        return 0
    return _fill_pools() + _fill_heap(libc)


def _fill_pools() -> int:
    api = ctypes.pythonapi
    api.PyObject_Malloc.argtypes, api.PyObject_Malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    taken = 0
    for size in range(ALIGNMENT_BYTES, SMALL_MAX_BYTES + 1, ALIGNMENT_BYTES):
        row = 0
        while row < ROW:
            place = api.PyObject_Malloc(size)
            if place is None:
                raise MemoryError
            taken += size
            row = row + 1 if place % POOL_BYTES == POOL_HEADER_BYTES + row * size else 0
    return taken


def _fill_heap(libc: Any) -> int:
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    taken, row = 0, [libc.malloc(LARGE_BYTES[0])]
    # Where there is one behind the other there is no hole, but all the room from which the rest will come.
    while len(row) < ROW:
        place = libc.malloc(LARGE_BYTES[0])
        follows = place > row[-1] if len(row) < 2 else place - row[-1] == row[-1] - row[-2]
        if not follows:
            taken += len(row) * LARGE_BYTES[0]
            row = []
        row.append(place)
    for size in (*LARGE_BYTES, *range(1024, ALIGNMENT_BYTES, -ALIGNMENT_BYTES)):
        # Python too takes some of malloc's places as it loops, so that they are fewer every time.
        while (place := libc.malloc(size)) < row[0]:
            taken += size
        libc.free(place)
    for place in row:
        libc.free(place)
    return taken
