# SPDX-License-Identifier: BSD-3-Clause
"""Kernels by fork: `prepare` loads a kernel into the zygote, `run` starts one in a forked process.

`prepare` runs in the zygote, once, after the server is initialised. It imports all modules that a kernel imports sooner
or later, runs kernels from start to shutdown as a warm-up (because much is created on first use, and because the
interpreter specialises code by writing into it), and builds an IPython shell. It restores the process
state that the server in the same process depends on.

`run` runs in a process forked from the slot's fork server. It resets the process state that the server has set, and
starts ipykernel's own application with the prepared shell. The application reads its configuration files as in any
kernel; if they differ from those that the zygote read, it builds a new shell, so that the user's settings apply.

Runs under the image's own Python, 3.9 and up, with whatever ipykernel (6.20 and up) the image has.
"""

from __future__ import annotations

import asyncio
import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NoReturn, Optional

from ipykernel import kernelapp
from ipykernel.compiler import XCachingCompiler
from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQInteractiveShell
from tornado import ioloop
from traitlets.config import Config, SingletonConfigurable

from nbagent.linux.process import make_room_for_descriptors
from nbagent.zygote import as_execd, entropy, provisioner, thread_pools, warmup
from nbagent.zygote.inherited import Openers
from nbagent.zygote.memory.sharing import MemorySharing

# Modules that a kernel or the server imports only when needed; written by tests/lazy-modules.
MODULES_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "modules.json")
# ipykernel polls every second whether its parent process is still `parent_handle`; 1 disables that. A forked kernel
# gets SIGKILL when its parent ends, by PR_SET_PDEATHSIG, which needs no polling.
NO_PARENT_POLL = 1
# A kernel that has run a cell has 68 descriptors.
DESCRIPTORS = 256
# A request on the control channel, such as the debugger's, that does not end.
CONTROL_THREAD_TIMEOUT_S = 2.0
# The server's applications; they make their loggers the parents of tornado's.
APPLICATIONS = frozenset({"ServerApp", "LabApp"})

_shell: Any = None
# References that keep the server's event loops alive, because a loop closes its descriptors when it is destroyed.
_retained_loops: List[Any] = []


class IPKernelApp(kernelapp.IPKernelApp):
    """ipykernel's application without a command line, optionally with a prepared shell.

    `on_bound` is called when the kernel's sockets are bound.
    """

    ready_shell: Any = None
    on_bound: Any = None

    def parse_command_line(self, argv: Any = None) -> None:
        """Sets the configuration that results from `ipykernel_launcher -f FILE`."""
        self.update_config(Config({"IPKernelApp": {"connection_file": self.connection_file}}))

    def log_connection_info(self) -> None:
        """Calls `on_bound`: ipykernel calls this method as soon as all sockets are bound."""
        super().log_connection_info()
        if self.on_bound is not None:
            self.on_bound()

    def init_kernel(self) -> None:
        """Creates the kernel, with the prepared shell if its configuration equals the current one."""
        shell = self.ready_shell
        if shell is None or _shell_config(self.config) != _shell_config(shell.config):
            super().init_kernel()
            as_execd.skip_internal_frames(self.kernel)
            return
        # The shell's components refer to the same configuration object, so it is changed in place.
        shell.config.IPKernelApp = self.config.IPKernelApp
        self.user_ns = shell.user_ns
        _make_current(ZMQInteractiveShell, shell)
        super().init_kernel()
        as_execd.skip_internal_frames(self.kernel)
        shell.parent = shell.kernel = self.kernel
        shell.profile_dir, shell.ipython_dir = self.profile_dir, self.ipython_dir
        _attach_to_process(shell)


def _shell_config(config: Mapping[str, Any]) -> Dict[str, Any]:
    return {section: values for section, values in config.items() if section != "IPKernelApp"}


def _make_current(cls: Any, instance: Any) -> None:
    """Makes `cls.instance()` return `instance`."""
    for base in cls.mro():
        if issubclass(base, SingletonConfigurable) and base is not SingletonConfigurable:
            base._instance = instance


def _attach_to_process(shell: Any) -> None:
    """Repeats the steps of the shell's constructor that read or change state of the process."""
    shell.init_environment()
    shell.save_sys_module_state()
    shell.sys_excepthook = sys.excepthook
    shell.init_sys_modules()
    shell.init_builtins()
    shell.init_pushd_popd_magic()
    shell.starting_dir = os.getcwd()
    if shell.config.HistoryManager.get("enabled", True) and not shell.history_manager.enabled:
        # The history manager in the zygote has neither its database nor the thread that writes to it.
        shell.configurables.remove(shell.history_manager)
        shell.init_history()
        shell.init_user_ns()
    shell.history_manager.dir_hist[:] = [type(path)(os.getcwd()) for path in shell.history_manager.dir_hist[:1]]
    atexit.register(shell.atexit_operations)


# In the zygote.


def prepare(
    server: Any, memory: MemorySharing, preload: Iterable[str], openers: Openers, *, quick: bool,
    importing: Callable[[str], None] = lambda _name: None,
) -> Dict[str, str]:
    """Loads what kernels inherit, the modules `preload` included, and warms up server and kernels unless `quick`.

    `importing` is called with the name of each of these modules before its import, and with "" after the last.
    Afterwards the process has one thread and no zmq context. `openers` records which module opened a file that is still
    open. Returns the modules of `preload` whose import failed, with the reason. Raises Inherited if threads are left.
    """
    global _shell
    with open(MODULES_PATH) as file:
        modules = json.load(file)
    with restore_process_state():
        # debugpy, which as_execd.record() has imported, keeps the sys.stderr that it finds on import, and that of a
        # warm-up kernel ends with it.
        _import(modules["server"])
        # Matplotlib reads its backend from the environment on import. A kernel sets the variable only when it starts.
        os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        with as_execd.note():
            _import(modules["kernel"])
            left_out = _preload(preload, openers, importing)
        if not quick:
            _warm_up(server, memory, openers)
        _shell = _ready_shell()
    entropy.find_generators()
    gc.collect()
    openers.check_threads()
    return left_out


def _warm_up(server: Any, memory: MemorySharing, openers: Openers) -> None:
    with openers.during("a request or a kernel of the warm-up"):
        # The first warm-up is not recorded, since much of its code runs only once in a process.
        warmup.warm_up(server, _run_warmup_kernel)
        with memory.arrange_code():
            warmup.warm_up(server, _run_warmup_kernel)
        for _ in range(warmup.ROUNDS):
            warmup.warm_up(server, _run_warmup_kernel)


def _import(names: Iterable[str]) -> None:
    for name in names:
        # An image may lack modules of the list, or have versions whose import fails.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _preload(names: Iterable[str], openers: Openers, importing: Callable[[str], None]) -> Dict[str, str]:
    """Imports the modules that the image's manifest names, and ends the threads that their libraries started.

    Returns those whose import failed, with the reason. Raises Inherited for those whose threads do not end.
    """
    failed: Dict[str, str] = {}
    for name in names:
        importing(name)
        with openers.during(f"the module {name}"):
            try:
                importlib.import_module(name)
            except (Exception, SystemExit) as error:  # a module may raise anything
                failed[name] = f"its import failed: {error!r}"
    importing("")
    openers.check_threads()
    thread_pools.find()
    return failed


@contextlib.contextmanager
def restore_process_state() -> Iterator[None]:
    """Restores on exit the process state that a kernel changes."""
    streams = sys.stdout, sys.stderr, sys.displayhook, sys.excepthook
    main, environment = sys.modules["__main__"], dict(os.environ)
    names = {name: builtins.__dict__.get(name) for name in ("__IPYTHON__", "display", "get_ipython")}
    instances = [
        (cls, vars(cls)["_instance"]) for cls in _subclasses(SingletonConfigurable) if vars(cls).get("_instance")
    ]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [(logger, vars(logger).copy(), logger.handlers[:]) for logger in _loggers()]
    loop = _current_loop()
    _retained_loops.append(loop)
    _clear_instances()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.stdout, sys.stderr, sys.displayhook, sys.excepthook = streams
        sys.modules["__main__"] = main
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        for name, value in names.items():
            if value is None:
                builtins.__dict__.pop(name, None)
            else:
                builtins.__dict__[name] = value
        _clear_instances()
        for cls, instance in instances:
            cls._instance = instance
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, state, log_handlers in loggers:
            vars(logger).update(state)
            logger.handlers[:] = log_handlers
        asyncio.set_event_loop(loop)


def _loggers() -> List[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]


def _subclasses(base: Any) -> Iterator[Any]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _clear_instances() -> None:
    """Makes the next `instance()` of every singleton of traitlets create a new object."""
    for cls in _subclasses(SingletonConfigurable):
        # Only where needed, because each write costs a forked process a private page.
        if vars(cls).get("_instance") is not None:
            cls._instance = None


def _current_loop() -> Optional[asyncio.AbstractEventLoop]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return asyncio.get_event_loop()
        except RuntimeError:
            return None


def _ready_shell() -> Any:
    """A shell as ipykernel creates it, but without the history database."""
    app = IPKernelApp()
    app.parse_command_line()
    app.init_profile_dir()
    app.init_config_files()
    app.load_config_file()
    history = dict(app.config.HistoryManager)
    app.config.HistoryManager.enabled = False
    namespace: Dict[str, Any] = {}
    shell = ZMQInteractiveShell(parent=app, profile_dir=app.profile_dir, user_ns=namespace,
                                compiler_class=_compiler_class())
    app.config.HistoryManager.pop("enabled")
    app.config.HistoryManager.update(history)
    atexit.unregister(shell.atexit_operations)
    shell.parent = None
    return shell


def _compiler_class() -> Any:
    """The class with which ipykernel compiles cells; before ipykernel 7 it is no trait of the kernel."""
    trait = getattr(IPythonKernel, "compiler_class", None)
    return XCachingCompiler if trait is None else trait.default_value


def _run_warmup_kernel(
    connection_file: str, on_bound: Callable[[], None], set_stop: Callable[[Callable[[], None]], None]
) -> None:
    """Runs a kernel in this process until it is shut down or stopped (`warmup.RunKernel`)."""
    with restore_process_state():
        loop = ioloop.IOLoop()
        asyncio.set_event_loop(loop.asyncio_loop)
        set_stop(lambda: loop.add_callback(loop.stop))
        app = IPKernelApp.instance(connection_file=connection_file, parent_handle=NO_PARENT_POLL,
                                   capture_fd_output=False, log_level=logging.CRITICAL)
        app.on_bound = on_bound
        app.config.HistoryManager.enabled = False
        app.initialize([])
        app.start()
        _join_control_thread(app)
        app.close()
        atexit.unregister(app.close)
        atexit.unregister(app.iopub_thread.stop)
        atexit.unregister(app.shell.atexit_operations)
        set_stop(lambda: None)
        loop.close(all_fds=True)


def _join_control_thread(app: Any) -> None:
    """Ends the control thread after the request that it handles: a shutdown's, whose reply it still sends.

    Otherwise app.close() first ends the IOPub thread, for which the flush at the end of that request waits 10 s, while
    jupyter_client sends SIGTERM after 2.5 s, before the data of the user's files is written.
    """
    control = getattr(app, "control_thread", None)
    if control is None:
        return
    with contextlib.suppress(Exception):
        control.io_loop.add_callback(control.io_loop.stop)
    control.join(CONTROL_THREAD_TIMEOUT_S)


# In the fork.


def run(order: Mapping[str, Any], bound: Callable[[], None]) -> NoReturn:
    """Runs a kernel with the "command", "connection_file", "cwd" and "environment" of `order`.

    Calls `bound` once it listens.
    """
    gc.disable()
    _reset_process(order)
    app = IPKernelApp.instance(connection_file=order["connection_file"], parent_handle=NO_PARENT_POLL)
    app.ready_shell, app.on_bound = _shell, bound
    status = 0
    try:
        app.initialize([])
        gc.enable()
        app.start()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    _join_control_thread(app)
    # The steps of the interpreter's own exit, which cannot run because the zygote's frames are below this one.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _finalise()
    os._exit(status)


def _finalise() -> None:
    """Does what the interpreter's finalisation does for the user's data: destroys the objects of the user's namespace,
    which writes the rest of files that are not closed, and flushes all files and those of the C library.
    """
    with contextlib.suppress(Exception):
        _shell.user_ns.clear()
        _shell.user_ns_hidden.clear()
        _shell.user_module.__dict__.clear()
        sys.modules.pop("__main__", None)
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    with contextlib.suppress(Exception):
        gc.collect()
    # Objects of modules, and of frames that are not destroyed, have files too. A text file flushes the file below it.
    files = [found for found in gc.get_objects() if isinstance(found, (io.TextIOWrapper, io.BufferedWriter,
                                                                       io.BufferedRandom))]
    for file in [*files, sys.stdout, sys.stderr]:
        with contextlib.suppress(Exception):
            file.flush()
    ctypes.CDLL(None).fflush(None)


def _reset_process(order: Mapping[str, Any]) -> None:
    """Gives this process the state of a newly started Python, in place of the state that the server has set."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # None is the handler of a library, such as readline's of SIGWINCH.
        if signal.getsignal(number) is not None:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"], JPY_PARENT_PID=str(os.getppid()))
    time.tzset()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    make_room_for_descriptors(DESCRIPTORS)
    entropy.reseed()
    _clear_instances()
    _reset_logging()
    asyncio.set_event_loop(asyncio.new_event_loop())
    # The server blocks the import of packages that it does not need: notebook_server.py.
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]
    provisioner.unregister()
    _extend_path()
    as_execd.become(list(order["command"]))
    thread_pools.resize(os.environ)


def _reset_logging() -> None:
    """Removes the handlers, levels and parents that the server has set in loggers."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            logger.name = name
            logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, logging.NullHandler)]
            parent = logger.parent
            if not logger.propagate or (parent is not None and parent.name in APPLICATIONS):
                logger.propagate, logger.parent = True, logging.root
                logger.setLevel(logging.NOTSET)
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)


def _extend_path() -> None:
    """Adds the user's site-packages and the working directory to sys.path, as in a newly started Python.

    The server's path has no working directory, because it runs a file, and no directory that was made after its start.
    """
    import site

    user_site = site.getusersitepackages()
    packages = ("site-packages", "dist-packages")
    first = next((index for index, path in enumerate(sys.path) if path.endswith(packages)), len(sys.path))
    if site.ENABLE_USER_SITE and user_site not in sys.path and os.path.isdir(user_site):
        # Those of a virtual environment come before the user's, those of another Python after them.
        own = sys.prefix != sys.base_prefix and sum(path.startswith(f"{sys.prefix}/") for path in sys.path[first:])
        sys.path.insert(first + own, user_site)
    if "" not in sys.path and not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(first, "")
