# SPDX-License-Identifier: BSD-3-Clause
"""The state of a forked kernel that shows how it was started: it is given the values of a kernel started by exec.

The zygote is a notebook server, so its interpreter has a server's warning filters, command line and caches. `record`
runs in the zygote before the server is imported: it imports the modules that every kernel imports at its start, and
notes their files, and the warning filters and environment variables that they set. `note` adds filters and variables of
modules that the zygote preloads. `become` and `skip_internal_frames` run in the forked kernel.

Standard library, and the image's ipykernel; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import sys
import warnings
from typing import Any, Dict, Iterator, List, Mapping

from nbagent.linux.process import set_command_line

# The modules of a kernel's start, among them those that it imports before it has its debugger.
_MODULES = (
    "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipykernel.debugger", "IPython.core.debugger",
    "psutil", "tornado.platform.asyncio",
)
# The module of its command line.
LAUNCHER = "ipykernel_launcher"

# The first part of the names of modules that a forked kernel has on its stack, and an exec'd one does not have.
_OWN = "nbagent."

_filters: List[Any] = []
_files: List[str] = []
_variables: Dict[str, str] = {}
_launcher = LAUNCHER


def record() -> None:
    """Imports a kernel's modules, and notes what they set. In the zygote, before the server is imported."""
    global _launcher
    with _noted_variables():
        # Before the import of debugpy, which warns on standard error about frozen modules otherwise.
        os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
        for name in _MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    _variables.pop("PYDEVD_DISABLE_FILE_VALIDATION", None)
    _filters[:] = warnings.filters
    _files[:] = _files_of(sys.modules)
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(LAUNCHER)
        if spec is not None and spec.origin is not None:
            _launcher = spec.origin


@contextlib.contextmanager
def note() -> Iterator[None]:
    """Notes the warning filters and environment variables that modules set whose import is in this context."""
    server = list(warnings.filters)
    _set_filters(_filters)
    try:
        with _noted_variables():
            yield
        _filters[:] = warnings.filters
    finally:
        _set_filters(server)


@contextlib.contextmanager
def _noted_variables() -> Iterator[None]:
    before = dict(os.environ)
    yield
    _variables.update({name: value for name, value in os.environ.items() if before.get(name) != value})


def skip_internal_frames(kernel: Any) -> None:
    """Makes the kernel's debugger skip the frames of the modules of a kernel's start, and those of nbagent.

    ipykernel passes the files of all loaded modules to debugpy, which compares each function that is called after that
    with each of them. Those of the server and of preloaded modules would make it three times as slow.
    """
    debugger: Any = getattr(kernel, "debugger", None)
    if _files and getattr(debugger, "kernel_modules", None):
        own = {name: module for name, module in sys.modules.items() if name.startswith(_OWN)}
        kernel._kernel_modules = debugger.kernel_modules = list(dict.fromkeys([*_files, *_files_of(own)]))


def _files_of(modules: Mapping[str, Any]) -> List[str]:
    return [module.__file__ for module in list(modules.values()) if getattr(module, "__file__", None)]


def _set_filters(filters: List[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    module: Any = warnings
    if hasattr(module, "_filters_mutated"):
        module._filters_mutated()
    else:  # Python 3.14
        with module._lock:
            module._filters_mutated_lock_held()


def become(command: List[str]) -> None:
    """Gives this process the state that a kernel started by `command`, of jupyter_client, has after its imports."""
    _set_filters(_filters)
    for name, value in _variables.items():
        os.environ.setdefault(name, value)
    sys.argv[:] = [_launcher, *command[command.index(LAUNCHER) + 1:]]
    sys.orig_argv[:] = command
    options = (word[2:].partition("=") for word in command if word.startswith("-X"))
    sys._xoptions.clear()
    sys._xoptions.update({name: text or True for name, _, text in options})
    forget_host_name()
    _count_processors()
    # A kernel finds nbagent's modules by the package, which is loaded, and its own programs find none.
    packages = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path[:] = [path for path in sys.path if path != packages]
    show(command, os.environ)


def _count_processors() -> None:
    """Makes os.cpu_count() follow PYTHON_CPU_COUNT, which Python 3.13 and later read at their start."""
    if not hasattr(sys, "_get_cpu_count_config"):
        return
    text, known = os.environ.get("PYTHON_CPU_COUNT", ""), sys._get_cpu_count_config()
    wanted = int(text) if text.isdigit() else 0
    if wanted == max(known, 0):
        return
    cpus: Any = os.sysconf("SC_NPROCESSORS_ONLN")

    def cpu_count() -> Any:
        return wanted or cpus

    def process_cpu_count() -> Any:
        return wanted or len(os.sched_getaffinity(0))

    os.cpu_count, os.process_cpu_count = cpu_count, process_cpu_count  # type: ignore[attr-defined]


def show(command: List[str], environment: Mapping[str, str]) -> None:
    """Shows this process in /proc as one that execve(2) has started by `command`."""
    with contextlib.suppress(OSError):  # a kernel without CONFIG_CHECKPOINT_RESTORE
        set_command_line(command, environment)


def forget_host_name() -> None:
    """Empties the caches of the standard library that have the zygote's host name and MAC address."""
    platform._uname_cache = None  # type: ignore[attr-defined]
    platform._platform_cache.clear()  # type: ignore[attr-defined]
    modules: Any = sys.modules
    if "uuid" in modules:
        modules["uuid"]._node = None
