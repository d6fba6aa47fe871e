"""Makes what the zygote has loaded stay one copy for all its children.

A forked process shares its parent's pages until it writes, and CPython writes wherever it looks: it counts references
in the objects themselves. Since PEP 683 (Python 3.12) an object may be immortal: its count is a fixed value
that nobody changes. `freeze` gives that value to every object there is, as the interpreter does to its own constants.

Measured with the image minimal, a forked kernel after its first cell: 23 MiB private without, 10 MiB with it
(packaging/docs/benchmarks.md).

The price: what exists now is never destroyed, neither in the zygote nor in its children. Whoever calls this has loaded
what is to stay and will end by exec, exit or a signal. CPython has no call for it; the value and its place are
those of two versions, and with any other `freeze` does no more than gc.freeze().

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import sysconfig
from types import CodeType
from typing import Any, List, Set

# Include/object.h of 3.12 and 3.13: _Py_IMMORTAL_REFCNT is UINT_MAX on 64 bits, and Py_INCREF
# and Py_DECREF look at the lower 32 of the count, the object's first field.
VERSIONS = ((3, 12), (3, 13))
IMMORTAL = 0xFFFFFFFF


def possible() -> bool:
    """Whether this interpreter is one whose objects can be made immortal from outside."""
    return (
        sys.implementation.name == "cpython"
        and sys.version_info[:2] in VERSIONS
        and sys.maxsize > 2**32
        and sys.byteorder == "little"
        and not hasattr(sys, "gettotalrefcount")  # a debug build counts otherwise
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
    )


def freeze() -> int:
    """Keeps what exists out of the garbage collector's sight, and immortal where possible. Gives the number of objects.

    With one thread, at the end of all loading.
    """
    gc.collect()
    made = _make_immortal() if possible() else 0
    gc.freeze()
    return made


def _make_immortal() -> int:
    # Objects of this function, and frames, go as ever.
    spare: Set[int] = set()
    pending: List[Any] = gc.get_objects()
    seen: Set[int] = set()
    spare.update((id(spare), id(pending), id(seen)))
    while pending:
        thing = pending.pop()
        if id(thing) in seen or id(thing) in spare or type(thing).__name__ in ("frame", "generator", "coroutine"):
            continue
        seen.add(id(thing))
        pending.extend(gc.get_referents(thing))
        if type(thing) is CodeType:
            # The collector does not look into code.
            pending.extend((thing.co_consts, thing.co_names, thing.co_linetable, thing.co_exceptiontable))
            pending.extend((thing.co_filename, thing.co_name, thing.co_qualname))
        elif type(thing) in (str, bytes):
            hash(thing)  # which the object keeps, from the first time that somebody asks
    count = ctypes.c_uint32
    for address in seen:
        count.from_address(address).value = IMMORTAL
    return len(seen)
