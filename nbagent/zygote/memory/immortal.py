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
from typing import Any, List, Set

# Include/object.h of 3.12 and 3.13: _Py_IMMORTAL_REFCNT is UINT_MAX on 64 bits; Py_INCREF and Py_DECREF compare the
# lower 32 bits of the count, which is the object's first field.
VERSIONS = ((3, 12), (3, 13))
IMMORTAL = 0xFFFFFFFF


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
    # This function's own containers, and frames, stay mortal because they end before the zygote forks.
    mortal: Set[int] = set()
    pending: List[Any] = gc.get_objects()
    seen: Set[int] = set()
    mortal.update((id(mortal), id(pending), id(seen)))
    while pending:
        obj = pending.pop()
        if id(obj) in seen or id(obj) in mortal or type(obj).__name__ in ("frame", "generator", "coroutine"):
            continue
        seen.add(id(obj))
        pending.extend(gc.get_referents(obj))
        if type(obj) is CodeType:
            # The garbage collector does not traverse code objects.
            pending.extend((obj.co_consts, obj.co_names, obj.co_linetable, obj.co_exceptiontable))
            pending.extend((obj.co_filename, obj.co_name, obj.co_qualname))
        elif type(obj) in (str, bytes):
            hash(obj)  # is written into the object when it is first computed
    count = ctypes.c_uint32
    for address in seen:
        count.from_address(address).value = IMMORTAL
    return len(seen)
