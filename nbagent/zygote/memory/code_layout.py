"""Puts the code that runs in every slot side by side in memory.

CPython writes into a function's code as it runs it: it counts, it specialises, and since 3.13 it notes which way each
branch went. So whoever is forked soon has a copy of its own of each page with code that it runs, and the 3,000
pieces of code that run in a slot lie somewhere among the 27,000 of a zygote. `watch` notes which run, and `gather`
gives them a new place, one after the other; those that the same threads run lie together, as a slot's server and its
kernels are different processes. It is the same code otherwise; what it was specialised for it has to learn again.

What it is worth: packaging/docs/benchmarks.md. Does nothing before CPython 3.12, which began sys.monitoring.

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

# By the id of a piece of code, as equal ones are not the same: the code, and the identifiers of threads that ran it.
Runs = Dict[int, Tuple[CodeType, Set[int]]]


@contextlib.contextmanager
def watch() -> Iterator[Runs]:
    """Notes in what it gives all code that runs meanwhile, in all threads."""
    runs: Runs = {}
    monitoring: Any = getattr(sys, "monitoring", None)
    if monitoring is None:
        yield runs
        return

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


def gather(runs: Runs) -> int:
    """Moves the code that has run; gives the number of functions whose code, or a part of it, has a new place."""
    functions = [
        thing for thing in gc.get_objects() if type(thing) is FunctionType and _concerned(thing.__code__, runs)
    ]

    def sort_key(function: FunctionType) -> Tuple[Any, ...]:
        code = function.__code__
        threads = runs[id(code)][1] if id(code) in runs else ()
        return sorted(threads), code.co_filename, code.co_firstlineno

    functions.sort(key=sort_key)
    # Kept until all is moved: who is freed leaves a hole for the next.
    former = [function.__code__ for function in functions]
    heap_fill.fill()
    moved: Dict[int, CodeType] = {}
    for function in functions:
        function.__code__ = _move(function.__code__, runs, moved)
    return len(former)


def _concerned(code: CodeType, runs: Runs) -> bool:
    return id(code) in runs or any(
        _concerned(constant, runs) for constant in code.co_consts if type(constant) is CodeType
    )


def _move(code: CodeType, runs: Runs, moved: Dict[int, CodeType]) -> CodeType:
    """A copy of the code with copies of what has run within it. Functions that shared the code share the copy."""
    if not _concerned(code, runs):
        return code
    if id(code) not in moved:
        constants = tuple(
            _move(constant, runs, moved) if type(constant) is CodeType else constant for constant in code.co_consts
        )
        moved[id(code)] = code.replace(co_consts=constants)
    return moved[id(code)]
