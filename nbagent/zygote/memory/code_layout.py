# SPDX-License-Identifier: BSD-3-Clause
"""Places the code that runs in every slot side by side in memory.

CPython writes into a code object while running it: it counts executions, specialises instructions, and since 3.13
records the direction of each branch. So a forked process soon has a private copy of each page with code that it runs.
About 3,000 of a zygote's 27,000 code objects run in a slot, scattered over the heap. `record` collects the code that
runs, and `relocate` replaces it by copies that lie one after the other, grouped by the threads that ran it, because a
slot's server and its kernels run in different processes. A copy equals its original but starts unspecialised, so
the code has to run a few times more before the zygote forks.

The effect in figures: packaging/docs/benchmarks.md. Before CPython 3.12, which introduced sys.monitoring, `record`
collects nothing.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from types import CodeType, FunctionType
from typing import Any, Dict, Iterator, Set, Tuple

from nbagent.zygote.memory import heap_fill

# The code object and the identifiers of the threads that ran it, by id() because distinct code objects may be equal.
Runs = Dict[int, Tuple[CodeType, Set[int]]]


def supported() -> bool:
    """Whether this interpreter can report which code runs."""
    return hasattr(sys, "monitoring")


@contextlib.contextmanager
def record() -> Iterator[Runs]:
    """Yields a mapping that receives all code that runs within the `with` block, in all threads."""
    runs: Runs = {}
    if not supported():
        yield runs
        return
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]

    def note(code: CodeType, _offset: int) -> None:
        runs.setdefault(id(code), (code, set()))[1].add(threading.get_ident())

    tool, events = monitoring.PROFILER_ID, (monitoring.events.PY_START, monitoring.events.PY_RESUME)
    monitoring.use_tool_id(tool, __name__)
    for event in events:
        monitoring.register_callback(tool, event, note)
    monitoring.set_events(tool, sum(events))
    try:
        yield runs
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


def relocate(runs: Runs) -> int:
    """Moves the recorded code; returns the number of functions whose code, or a part of it, was replaced by a copy."""
    functions = [
        obj for obj in gc.get_objects() if type(obj) is FunctionType and _contains_run(obj.__code__, runs)
    ]

    def sort_key(function: FunctionType) -> Tuple[Any, ...]:
        code = function.__code__
        threads = runs[id(code)][1] if id(code) in runs else ()
        return sorted(threads), code.co_filename, code.co_firstlineno

    functions.sort(key=sort_key)
    # The originals live until all copies exist; otherwise a copy would be placed where an original was freed.
    originals = [function.__code__ for function in functions]
    heap_fill.fill()
    copies: Dict[int, CodeType] = {}
    for function in functions:
        function.__code__ = _copy(function.__code__, runs, copies)
    return len(originals)


def _contains_run(code: CodeType, runs: Runs) -> bool:
    return id(code) in runs or any(
        _contains_run(constant, runs) for constant in code.co_consts if type(constant) is CodeType
    )


def _copy(code: CodeType, runs: Runs, copies: Dict[int, CodeType]) -> CodeType:
    """A copy of `code` and of the recorded code nested in it. Functions that share a code object share its copy."""
    if not _contains_run(code, runs):
        return code
    if id(code) not in copies:
        constants = tuple(
            _copy(constant, runs, copies) if type(constant) is CodeType else constant for constant in code.co_consts
        )
        copies[id(code)] = code.replace(co_consts=constants)
    return copies[id(code)]
