# SPDX-License-Identifier: BSD-3-Clause
"""The sizes of thread pools of preloaded libraries, in a kernel whose limits are not those of the zygote.

Libraries such as OpenBLAS read the number of their threads from the environment when they are loaded, in the zygote; a
slot's claim may have set another CPU quota. `find` runs in the zygote, `resize` in the forked kernel.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any, List, Mapping, Optional, Tuple

# A part of a library's file name, the variables that it reads, and the functions that set its number of threads.
_LIBRARIES = (
    ("openblas", ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), (
        "openblas_set_num_threads", "openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
        "scipy_openblas_set_num_threads64_",
    )),
    ("libmkl_rt", ("MKL_NUM_THREADS", "OMP_NUM_THREADS"), ("MKL_Set_Num_Threads",)),
    ("libgomp", ("OMP_NUM_THREADS",), ("omp_set_num_threads",)),
    ("libiomp", ("OMP_NUM_THREADS",), ("omp_set_num_threads",)),
    ("libomp", ("OMP_NUM_THREADS",), ("omp_set_num_threads",)),
)

# The function that sets it, the variables, and the number of the zygote.
_found: List[Tuple[Any, Tuple[str, ...], Optional[str]]] = []


def find() -> None:
    """Finds the libraries that are loaded."""
    with open("/proc/self/maps") as file:
        mapped = {line.split(None, 5)[5].rstrip("\n") for line in file if line.count("/")}
    _found.clear()
    for path in sorted(mapped):
        for part, names, functions in _LIBRARIES:
            if os.path.basename(path).startswith(part) or (part == "openblas" and part in os.path.basename(path)):
                with contextlib.suppress(OSError):
                    library = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_NOW)
                    setters = [getattr(library, name) for name in functions if hasattr(library, name)]
                    _found.extend((setter, names, _number(os.environ, names)) for setter in setters[:1])
                break


def resize(environment: Mapping[str, str]) -> None:
    """Sets the number of threads of each library whose variables have changed. A pool may start its threads by it."""
    for setter, names, former in _found:
        number = _number(environment, names)
        if number != former:
            setter(ctypes.c_int(int(number) if number else len(os.sched_getaffinity(0))))


def _number(environment: Mapping[str, str], names: Tuple[str, ...]) -> Optional[str]:
    """The first of these variables that is a number."""
    return next((text for name in names if (text := environment.get(name, "")).isdigit() and int(text)), None)
