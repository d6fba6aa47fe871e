# SPDX-License-Identifier: BSD-3-Clause
"""Takes the free blocks between existing objects, so that new objects get pages of their own.

Loading modules leaves free blocks scattered among objects that stay. A forked process would place its objects into
these blocks and get a private copy of one page for each. After `fill`, Python's allocator and malloc have only
whole pages left to allocate from.

The blocks are never freed: half a MiB to 2 MiB, allocated once in the zygote. Needs CPython 3.11 and up and glibc; does
nothing elsewhere. CPython 3.10 is excluded because its interpreter allocates so many blocks of 32 bytes during the loop
of `_fill_pools` that no six of the loop's own are ever consecutive.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Objects/obmalloc.c and pycore_obmalloc.h of CPython 3.11 to 3.13: a pool of 16 KiB holds blocks of one size after a
# header; objects larger than SMALL_MAX_BYTES come from malloc.
POOL_BYTES, POOL_HEADER_BYTES, SMALL_MAX_BYTES, ALIGNMENT_BYTES = 16 << 10, 48, 512, 16
# This many consecutive blocks, beginning at a pool's first one, show that the pool is a new one without other objects.
CONSECUTIVE = 6
# Sizes that malloc serves from its heap; larger ones get a mapping of their own (M_MMAP_THRESHOLD in mallopt(3)).
LARGE_BYTES = (100_000, 65536, 32768, 16384, 8192, 4096, 2048)


def fill() -> int:
    """Allocates all free blocks that lie between used ones; with one thread. Returns the bytes allocated."""
    libc = ctypes.CDLL(None)
    if sys.implementation.name != "cpython" or sys.version_info < (3, 11) or not hasattr(libc, "gnu_get_libc_version"):
        return 0
    return _fill_pools() + _fill_heap(libc)


def _fill_pools() -> int:
    api = ctypes.pythonapi
    api.PyObject_Malloc.argtypes, api.PyObject_Malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    filled_bytes = 0
    for size in range(ALIGNMENT_BYTES, SMALL_MAX_BYTES + 1, ALIGNMENT_BYTES):
        consecutive = 0
        while consecutive < CONSECUTIVE:
            address = api.PyObject_Malloc(size)
            if address is None:
                raise MemoryError
            filled_bytes += size
            is_next = address % POOL_BYTES == POOL_HEADER_BYTES + consecutive * size
            consecutive = consecutive + 1 if is_next else 0
    return filled_bytes


def _fill_heap(libc: Any) -> int:
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    filled_bytes, blocks = 0, [libc.malloc(LARGE_BYTES[0])]
    # Blocks at equal distances come from the free end of the heap, where all later allocations will come from.
    while len(blocks) < CONSECUTIVE:
        address = libc.malloc(LARGE_BYTES[0])
        last = blocks[-1]
        follows = address > last if len(blocks) < 2 else address - last == last - blocks[-2]
        if not follows:
            filled_bytes += len(blocks) * LARGE_BYTES[0]
            blocks = []
        blocks.append(address)
    for size in (*LARGE_BYTES, *range(1024, ALIGNMENT_BYTES, -ALIGNMENT_BYTES)):
        # The loop ends although the interpreter itself allocates from malloc meanwhile: free blocks only become fewer.
        while (address := libc.malloc(size)) < blocks[0]:
            filled_bytes += size
        libc.free(address)
    for address in blocks:
        libc.free(address)
    return filled_bytes
