"""Puts what the zygote loads into a file in memory, so that a fork has little to copy.

fork(2) copies the page tables of all anonymous memory, and an exit tears them down again; a slot takes three forks
of 80 MiB. Of a file that is mapped privately the kernel copies nothing: what a child touches it finds in the page
cache. What is written, by the zygote or by a child, is a copy of its own either way.

`begin` comes before anything is loaded: it makes malloc's heap large, of a file that is mapped shared, and has Python
take its arenas from that heap. So what is loaded is written into the file itself. `settle` maps the same file in the
same place, but privately: what is in memory does not change by that, so nobody has to stand still for it. The file is
then sealed, by which nobody can change it any more (F_SEAL_WRITE), and closed. A fork in between would write into its
parent's memory, so the first one settles; but for `fork_noop`, whose child has no such memory.

It needs the heap of glibc, which grows by brk(2). Where there is another, `begin` does nothing.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
from typing import Any, List, Optional, Tuple

# More than a zygote loads, pandas and matplotlib among it. What is left of it goes back, and was never touched.
HEAP_BYTES = 256 << 20
# What the heap is made of. Below malloc's threshold for mappings of their own (128 KiB, mallopt(3)), and of a size
# whose release gives the free end of the heap back (64 KiB and up, FASTBIN_CONSOLIDATION_THRESHOLD of glibc's).
PIECE_BYTES = 100_000
HUGE_BYTES = 2 << 20
# Lower numbers are a slot's descriptors'.
FREE_FD = 64
_PAGE_BYTES = mmap.PAGESIZE
_MAP_FIXED = 0x10
# malloc.h: how many heaps there may be, one for each thread; 0 for as many as malloc likes.
_M_ARENA_MAX = -8
_MADV_DONTFORK, _MADV_DOFORK, _MADV_COLLAPSE = 10, 11, 25
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class _ArenaAllocator(ctypes.Structure):
    """PyObjectArenaAllocator of Include/cpython/objimpl.h."""

    _fields_ = (("ctx", ctypes.c_void_p), ("alloc", ctypes.c_void_p), ("free", ctypes.c_void_p))


class _Heap:
    """The part of the heap that is a file: addresses from `start` to `end`, in a row of `pieces` that malloc gave."""

    def __init__(self, libc: Any, pieces: List[int]) -> None:
        self._libc, self._last = libc, pieces[-1]
        self.start, self.end = _up(pieces[0], HUGE_BYTES), self._last // _PAGE_BYTES * _PAGE_BYTES
        fd = os.memfd_create("nbagent-zygote", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FREE_FD)
        os.close(fd)
        os.truncate(self._fd, self.end - self.start)
        # All there is in it are malloc's own words before each piece, which stand still while all pieces are taken.
        for piece in pieces:
            page = (piece - 1) // _PAGE_BYTES * _PAGE_BYTES
            if self.start <= page < self.end:
                os.pwrite(self._fd, ctypes.string_at(page, _PAGE_BYTES), page - self.start)
        self._map(mmap.MAP_SHARED)
        # Threads that load something take it from here too.
        libc.mallopt(_M_ARENA_MAX, 1)
        # The last one keeps the others from going back to the kernel at once.
        for piece in pieces[:-1]:
            libc.free(piece)
        self._arenas = _ArenaAllocator()
        ctypes.pythonapi.PyObject_GetArenaAllocator(ctypes.byref(self._arenas))
        # realloc of nothing is malloc; a zygote gives nothing back. A child does by munmap(2), which
        # refuses what does not begin with a page; to malloc it is in use for ever, so nobody is harmed.
        ours = _ArenaAllocator(None, _address_of(libc.realloc), _address_of(libc.getpid))
        ctypes.pythonapi.PyObject_SetArenaAllocator(ctypes.byref(ours))

    def settle(self) -> None:
        ctypes.pythonapi.PyObject_SetArenaAllocator(ctypes.byref(self._arenas))
        self._libc.mallopt(_M_ARENA_MAX, 0)
        # It and what is free before it are the end of the heap, and go back to the kernel.
        self._libc.free(self._last)
        self.end = min(self.end, _up(self._libc.sbrk(0), _PAGE_BYTES))
        # One page fault for 2 MiB until something there is written. Linux 6.1 and up, as far as there is such memory.
        self._libc.madvise(self.start, self.end - self.start, _MADV_COLLAPSE)
        self._map(mmap.MAP_PRIVATE)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        os.close(self._fd)

    def fork_noop(self) -> None:
        everything = self.start, self.end - self.start
        # Wherever the child looks for the heap it finds nothing, and the kernel has it call _exit(2) instead.
        self._libc.madvise(*everything, _MADV_DONTFORK)
        before = self._libc.signal(signal.SIGSEGV, _address_of(self._libc._exit))
        # Not os.fork: there is nothing to be done in the child, and what is done in the parent would settle.
        pid = ctypes.pythonapi.fork()
        if pid == 0:
            os._exit(0)
        self._libc.signal(signal.SIGSEGV, before)
        self._libc.madvise(*everything, _MADV_DOFORK)
        if pid > 0:
            os.waitpid(pid, 0)

    def _map(self, how: int) -> None:
        size, access = self.end - self.start, mmap.PROT_READ | mmap.PROT_WRITE
        if self._libc.mmap(self.start, size, access, how | _MAP_FIXED, self._fd, 0) != self.start:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


_heap: Optional[_Heap] = None


def begin() -> bool:
    """Has all memory come from a file that is shared. First of all, with one thread; whether it could be done."""
    global _heap
    libc = _glibc()
    if libc is None:
        return False
    # A list that grows would take its memory from between the pieces.
    pieces: List[Any] = [None] * (HEAP_BYTES // PIECE_BYTES)
    for number in range(len(pieces)):
        pieces[number] = libc.malloc(PIECE_BYTES)
    row = _row(pieces)
    for piece in pieces[: len(pieces) - len(row)]:
        libc.free(piece)
    if not row:
        return False
    _heap = _Heap(libc, row)
    os.register_at_fork(before=settle)
    return True


def settle() -> None:
    """Makes what is loaded what all forks have in common. With one thread; again is nothing."""
    global _heap
    if _heap is not None:
        heap, _heap = _heap, None
        heap.settle()


def fork_noop() -> None:
    """Forks a child that ends at once, for what C libraries do before and after a fork in the parent."""
    if _heap is not None:
        _heap.fork_noop()
    elif (pid := os.fork()) == 0:
        os._exit(0)
    else:
        os.waitpid(pid, 0)


def _row(pieces: List[Any]) -> List[int]:
    """The last pieces, that follow each other up to the end of the heap; none if they do not, as the first may."""
    if None in pieces:
        return []
    step, last = pieces[-1] - pieces[-2], pieces[-1]
    count = 0
    while count < len(pieces) and pieces[-1 - count] == last - step * count:
        count += 1
    start, end = _heap_range()
    row = pieces[len(pieces) - count:]
    return row if count > len(pieces) // 2 and start < row[0] < last + PIECE_BYTES <= end else []


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


def _up(address: int, to: int) -> int:
    return -(-address // to) * to
