# SPDX-License-Identifier: BSD-3-Clause
"""Facts about a Python process that a program or its user can see; runs in a cell of a kernel, see test_kernels.py.

`facts()` returns {name: value} in the types of JSON. A forked and an exec'd kernel of one image are compared by them.
"""

import asyncio
import builtins
import codecs
import faulthandler
import gc
import importlib.metadata
import locale
import logging
import multiprocessing
import os
import platform
import re
import resource
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings


def _text(value):
    """`value` as text without addresses and what differs by design of any two kernels."""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "KERNEL", text)


def _status(*names):
    with open("/proc/self/status") as file:
        found = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {name: found.get(name) for name in names}


def _command():
    with open("/proc/self/cmdline") as file:
        return file.read().split("\0")


def _loggers():
    known = logging.root.manager.loggerDict
    return {
        name: [logger.level, logger.propagate, logger.disabled, [_text(handler) for handler in logger.handlers]]
        for name, logger in [("root", logging.root), *known.items()]
        if isinstance(logger, logging.Logger) and (logger.level or not logger.propagate or logger.disabled
                                                   or logger is logging.root)
    }


def _descriptors():
    kinds = {}
    for number in ("0", "1", "2"):
        kinds[number] = re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{number}"))
    return kinds


def _skipped():
    """The Python files whose frames the debugger skips, but for those that start this kernel."""
    kernel = get_ipython().kernel  # noqa: F821
    files = set(getattr(getattr(kernel, "debugger", None), "kernel_modules", ()))
    starts = ("ipykernel_launcher.py", "runpy.py", "forked_slot.py")
    return sorted(one for one in files if one.endswith(".py") and "/nbagent/" not in one
                  and os.path.basename(one) not in starts)


def facts():
    return {
        "flags": _text(sys.flags),
        "interpreter arguments": subprocess._args_from_interpreter_flags(),
        "xoptions": dict(sys._xoptions),
        "warnoptions": list(sys.warnoptions),
        "filters": [_text(one) for one in warnings.filters],
        "node": platform.node(),
        "hostname": socket.gethostname(),
        "uname": list(platform.uname()),
        "path": list(sys.path),
        "argv": _text(sys.argv),
        "orig_argv": _text(sys.orig_argv),
        "command": _text(_command()),
        "executable": [sys.executable, sys.prefix, sys.base_prefix, sys.exec_prefix],
        "name": open("/proc/self/comm").read(),
        "environment": {name: _text(value) for name, value in os.environ.items()},
        "start of environment": sorted(
            re.sub("=.*", "", entry) for entry in open("/proc/self/environ", errors="replace").read().split("\0")
        ),
        "signals": {
            number: _text(signal.getsignal(number)) for number in range(1, signal.NSIG) if number not in (32, 33)
        },
        "status": _status("SigBlk", "SigIgn", "SigCgt", "Umask", "NoNewPrivs", "CapEff", "CapBnd", "Groups", "Uid"),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource)
                   if name.startswith("RLIMIT_")},
        "directory": os.getcwd(),
        "session": [os.getpid() == os.getsid(0), os.getpgid(0) == os.getpid()],
        "nice": os.nice(0),
        "adjustment": open("/proc/self/oom_score_adj").read(),
        "descriptors": _descriptors(),
        "streams": [_text(stream) for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__, sys.stdin)],
        "stream types": [_text(type(stream)) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "collector": [gc.isenabled(), list(gc.get_threshold()), gc.get_debug()],
        "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(),
        "trace": [_text(sys.gettrace()), _text(sys.getprofile()), _text(threading.excepthook)],
        "hooks": [_text(sys.displayhook), _text(sys.excepthook), _text(sys.unraisablehook), _text(sys.breakpointhook)],
        "threads": sorted(re.sub(r"\d+", "N", thread.name) for thread in threading.enumerate()),
        "main thread": [threading.main_thread().ident == threading.get_ident(),
                        threading.main_thread().native_id == os.getpid()],
        "builtins": sorted(vars(builtins)),
        "finders": [_text(finder) for finder in sys.meta_path],
        "path hooks": len(sys.path_hooks),
        "distributions": sorted(one.name for one in importlib.metadata.distributions()),
        "entry points": sorted(one.name for one in importlib.metadata.entry_points(
            group="jupyter_client.kernel_provisioners")),
        "loggers": _loggers(),
        "logging": [logging.raiseExceptions, logging.lastResort is not None, logging.root.manager.disable],
        "loop policy": type(asyncio.get_event_loop_policy()).__name__,
        "loop": type(asyncio.get_event_loop()).__name__,
        "locale": [locale.setlocale(number) for number in (locale.LC_CTYPE, locale.LC_NUMERIC, locale.LC_TIME)],
        "encodings": [sys.getfilesystemencoding(), locale.getpreferredencoding(), sys.stdout.encoding,
                      sys.getfilesystemencodeerrors(), sys.stdout.errors],
        "error handlers": [codecs.lookup_error("strict").__name__],
        "site": [site.ENABLE_USER_SITE, site.USER_SITE, site.USER_BASE, list(site.PREFIXES)],
        "temporary": tempfile.gettempdir(),
        "multiprocessing": [multiprocessing.get_start_method(allow_none=True), multiprocessing.parent_process(),
                            multiprocessing.current_process().name],
        "child's argument": multiprocessing.spawn.get_executable().decode()
        if hasattr(multiprocessing, "spawn") and isinstance(multiprocessing.spawn.get_executable(), bytes) else None,
        "faulthandler": faulthandler.is_enabled(),
        "tracemalloc": tracemalloc.is_tracing(),
        "default timeout": socket.getdefaulttimeout(),
        "zone": [time.tzname, time.timezone],
        "bytecode": [sys.dont_write_bytecode, sys.pycache_prefix],
        "cpus": [os.cpu_count(), len(os.sched_getaffinity(0))],
        "hash": [sys.flags.hash_randomization, hash("a") if os.environ.get("PYTHONHASHSEED") else None],
        "names": sorted(name for name in vars(sys.modules["__main__"]) if name not in (
            "facts", "open") and not name.startswith("_i")),
        "main": [sys.modules["__main__"].__name__, getattr(sys.modules["__main__"], "__file__", None)],
        "extra of sys": sorted(vars(sys)),
        "skipped by the debugger": _skipped(),
    }
