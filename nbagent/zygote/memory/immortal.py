# SPDX-License-Identifier: BSD-3-Clause
"""Makes every existing object immortal, so that reference counting does not write into the zygote's pages.

CPython keeps an object's reference count in the object itself, so a forked process gets a private copy of each page
with an object that it merely uses. Since PEP 683 (Python 3.12) an object may be immortal: its count is a
fixed value that never changes. `freeze` sets that value in every object, as the interpreter does in its own constants.

A forked kernel of the image minimal after its first cell has 23 MiB private memory without this module and 10 MiB with
it (packaging/docs/benchmarks.md).

The price: existing objects are never destroyed, neither in the zygote nor in the processes forked from it. So `freeze`
is only for processes that have loaded what they need and end by exec, exit or a signal. CPython has no function for it;
the value and the field's place are those of two versions, and with any other `freeze` only calls gc.freeze().

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import sysconfig
from types import CodeType
from typing import Any, List

# Include/object.h of 3.12 and 3.13: _Py_IMMORTAL_REFCNT is UINT_MAX on 64 bits; Py_INCREF and Py_DECREF compare the
# lower 32 bits of the count, which is the object's first field.
VERSIONS = ((3, 12), (3, 13))
IMMORTAL = 0xFFFFFFFF
# Frames, by the names of their types, stay mortal because they end before the zygote forks.
MORTAL = frozenset({"frame", "generator", "coroutine"})
# Objects whose referents are collected by one call: few enough that the list of them is small.
BATCH = 1000
# The kernel maps nothing at the first addresses, and by itself nothing above 47 bits on x86_64 and 48 on arm64, where
# programs and libraries are above 47.
FIRST_ADDRESS, ADDRESSES = 1 << 12, 1 << 48


def supported() -> bool:
    """Whether objects of this interpreter can be made immortal from outside."""
    return (
        sys.implementation.name == "cpython"
        and sys.version_info[:2] in VERSIONS
        and sys.maxsize > 2**32
        and sys.byteorder == "little"
        and not hasattr(sys, "gettotalrefcount")  # a debug build counts references elsewhere too
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
    )


def freeze() -> int:
    """Exempts existing objects from garbage collection and makes them immortal; returns the number of immortal objects.

    The number is 0 where immortal objects are not supported. With one thread, after all loading.
    """
    gc.collect()
    count = _make_immortal() if supported() else 0
    gc.freeze()
    return count


def _make_immortal() -> int:
    # An object is marked as visited by being immortal, because a set of a million numbers would remain in the zygote's
    # memory. Objects that are immortal before are constants of the interpreter: those of them that refer to other
    # objects are in get_objects(). It does not list `pending`, to which no listed object refers.
    pending: List[Any] = [obj for obj in gc.get_objects() if type(obj).__name__ not in MORTAL]
    words, references, count = _memory(), sys.getrefcount, len(pending)
    for obj in pending:
        words[(id(obj) - FIRST_ADDRESS) >> 2] = IMMORTAL
    while pending:
        batch = pending[-BATCH:]
        del pending[-BATCH:]
        reached = gc.get_referents(*batch)
        for code in batch:
            if type(code) is CodeType:
                # The garbage collector does not traverse code objects.
                reached += (code.co_consts, code.co_names, code.co_linetable, code.co_exceptiontable)
                reached += (code.co_filename, code.co_name, code.co_qualname)
        for obj in reached:
            if references(obj) < IMMORTAL and type(obj).__name__ not in MORTAL:
                if type(obj) in (str, bytes):
                    hash(obj)  # is written into the object when it is first computed
                words[(id(obj) - FIRST_ADDRESS) >> 2] = IMMORTAL
                pending.append(obj)
                count += 1
    return count


def _memory() -> memoryview:
    """All memory from FIRST_ADDRESS on as words of 32 bits; an assignment takes a fifth of the time of from_address."""
    everything = (ctypes.c_char * (ADDRESSES - FIRST_ADDRESS)).from_address(FIRST_ADDRESS)
    return memoryview(everything).cast("B").cast("I")
