# SPDX-License-Identifier: BSD-3-Clause
"""Loads the zygote into a file in memory instead of anonymous memory, so that a fork has little to copy.

fork(2) copies the page tables of all anonymous memory, and exit(2) frees them again; a slot takes three forks
of 80 MiB. The page tables of a privately mapped file are not copied: a child that touches such a page finds it in
the page cache. A page that the zygote or a child writes to becomes anonymous memory of that process in either case.

`begin` comes before anything is loaded. It grows malloc's heap, maps a memfd over it (MAP_SHARED), and makes Python
allocate its arenas from that heap, so that everything loaded is written into the file itself. `seal` maps the same file
at the same address with MAP_PRIVATE. That changes no byte in memory, so other threads need not be stopped. The file
is then sealed (F_SEAL_WRITE), so that no process can change it, and closed. A child forked before that would write into
its parent's memory; so a hook of os.fork seals first. Only `fork_noop` leaves the file open, and its child has no such
memory.

Needs glibc's heap, which grows by brk(2). `begin` does nothing with another one.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
from typing import Any, List, Optional, Tuple

# More than a zygote loads, pandas and matplotlib included. `seal` returns the rest, which was never touched.
HEAP_BYTES = 256 << 20
# The heap is grown by blocks of this size. It is below malloc's threshold for separate mappings (128 KiB, mallopt(3)),
# and large enough (64 KiB, glibc's FASTBIN_CONSOLIDATION_THRESHOLD) for free() to return the heap's free end to the
# kernel.
BLOCK_BYTES = 100_000
HUGE_BYTES = 2 << 20
# Lower descriptor numbers are for a slot's own descriptors.
FREE_FD = 64
_PAGE_BYTES = mmap.PAGESIZE
_MAP_FIXED = 0x10
# malloc.h: the maximum number of malloc's arenas; malloc makes one for each thread up to this, 0 restores its default.
_M_ARENA_MAX = -8
_MADV_DONTFORK, _MADV_DOFORK, _MADV_COLLAPSE = 10, 11, 25
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class _ArenaAllocator(ctypes.Structure):
    """PyObjectArenaAllocator of Include/cpython/objimpl.h."""

    _fields_ = (("ctx", ctypes.c_void_p), ("alloc", ctypes.c_void_p), ("free", ctypes.c_void_p))


class _Heap:
    """The part of the heap that is a file: addresses from `start` to `end`, within consecutive `blocks` of malloc."""

    def __init__(self, libc: Any, blocks: List[int]) -> None:
        self._libc, self._last = libc, blocks[-1]
        self.start, self.end = _round_up(blocks[0], HUGE_BYTES), self._last // _PAGE_BYTES * _PAGE_BYTES
        fd = os.memfd_create("nbagent-zygote", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD)
        os.close(fd)
        os.truncate(self._fd, self.end - self.start)
        # The heap holds nothing yet but malloc's header before each block, which is constant while the block is in use.
        for block in blocks:
            page = (block - 1) // _PAGE_BYTES * _PAGE_BYTES
            if self.start <= page < self.end:
                os.pwrite(self._fd, ctypes.string_at(page, _PAGE_BYTES), page - self.start)
        self._map(mmap.MAP_SHARED)
        # Other threads that load something must use this heap too.
        libc.mallopt(_M_ARENA_MAX, 1)
        # The last block stays allocated; otherwise malloc would return the others to the kernel at once.
        for block in blocks[:-1]:
            libc.free(block)
        self._arenas = _ArenaAllocator()
        ctypes.pythonapi.PyObject_GetArenaAllocator(ctypes.byref(self._arenas))
        # Called as alloc(ctx, size) and free(ctx, address, size): realloc(NULL, size) is malloc(size), and getpid()
        # ignores its arguments, because a zygote never frees an arena. A child frees by munmap(2) after `seal` has
        # restored Python's allocator; that fails with EINVAL at an address within a page, and otherwise unmaps memory
        # that malloc regards as in use for ever.
        arenas = _ArenaAllocator(None, _address_of(libc.realloc), _address_of(libc.getpid))
        ctypes.pythonapi.PyObject_SetArenaAllocator(ctypes.byref(arenas))

    def seal(self) -> None:
        ctypes.pythonapi.PyObject_SetArenaAllocator(ctypes.byref(self._arenas))
        self._libc.mallopt(_M_ARENA_MAX, 0)
        # The last block and the free memory before it are the end of the heap; malloc returns them to the kernel.
        self._libc.free(self._last)
        self.end = min(self.end, _round_up(self._libc.sbrk(0), _PAGE_BYTES))
        # With huge pages a child has one page fault for 2 MiB, until it writes there. Linux 6.1 and up; failure to find
        # free huge pages is harmless.
        self._libc.madvise(self.start, self.end - self.start, _MADV_COLLAPSE)
        self._map(mmap.MAP_PRIVATE)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        os.close(self._fd)

    def fork_noop(self) -> None:
        file_range = self.start, self.end - self.start
        # The child has no heap; its first access raises SIGSEGV, whose handler is _exit().
        self._libc.madvise(*file_range, _MADV_DONTFORK)
        former_handler = self._libc.signal(signal.SIGSEGV, _address_of(self._libc._exit))
        # The C library's fork() runs the handlers of pthread_atfork(3), but not those of os.register_at_fork(), which
        # would seal.
        pid = ctypes.pythonapi.fork()
        if pid == 0:
            os._exit(0)
        self._libc.signal(signal.SIGSEGV, former_handler)
        self._libc.madvise(*file_range, _MADV_DOFORK)
        if pid > 0:
            os.waitpid(pid, 0)

    def _map(self, sharing: int) -> None:
        size, access = self.end - self.start, mmap.PROT_READ | mmap.PROT_WRITE
        if self._libc.mmap(self.start, size, access, sharing | _MAP_FIXED, self._fd, 0) != self.start:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


_heap: Optional[_Heap] = None


def begin() -> bool:
    """Makes all later allocations come from the file; returns whether it succeeded.

    To be called before anything is loaded, with one thread.
    """
    global _heap
    libc = _glibc()
    if libc is None:
        return False
    # A list that grew would be reallocated between the blocks.
    blocks: List[Any] = [None] * (HEAP_BYTES // BLOCK_BYTES)
    for number in range(len(blocks)):
        blocks[number] = libc.malloc(BLOCK_BYTES)
    run = _consecutive(blocks)
    for block in blocks[: len(blocks) - len(run)]:
        libc.free(block)
    if not run:
        return False
    _heap = _Heap(libc, run)
    os.register_at_fork(before=seal)
    return True


def seal() -> None:
    """Makes the file the common memory of all later forks. With one thread; a second call does nothing."""
    global _heap
    if _heap is not None:
        heap, _heap = _heap, None
        heap.seal()


def fork_noop() -> None:
    """Forks a child that exits at once, so that C libraries run their pthread_atfork(3) handlers in the parent."""
    if _heap is not None:
        _heap.fork_noop()
    elif (pid := os.fork()) == 0:
        os._exit(0)
    else:
        os.waitpid(pid, 0)


def _consecutive(blocks: List[Any]) -> List[int]:
    """The last `blocks` at equal distances, up to the end of the heap; the first ones may lie elsewhere.

    Empty unless these are more than half of all and lie in the heap that grows by brk(2).
    """
    if None in blocks:
        return []
    step, last = blocks[-1] - blocks[-2], blocks[-1]
    count = 0
    while count < len(blocks) and blocks[-1 - count] == last - step * count:
        count += 1
    start, end = _heap_range()
    run = blocks[len(blocks) - count:]
    return run if count > len(blocks) // 2 and start < run[0] < last + BLOCK_BYTES <= end else []


def _glibc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.argtypes, libc.malloc.restype = [size], address
    libc.free.argtypes, libc.free.restype = [address], None
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], address
    libc.mmap.argtypes = [address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t]
    libc.mmap.restype = address
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, address], address
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    return libc


def _address_of(function: Any) -> Any:
    return ctypes.cast(function, ctypes.c_void_p)


def _heap_range() -> Tuple[int, int]:
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith("[heap]"):
                start, _, end = line.split()[0].partition("-")
                return int(start, 16), int(end, 16)
    return 0, 0


def _round_up(address: int, to: int) -> int:
    return -(-address // to) * to
