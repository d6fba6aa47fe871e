"""A kernel by fork: what the zygote makes ready, and what a forked kernel has still to do.

`prepare` runs in the zygote, once, after the server is initialised. It imports what a kernel imports sooner or later,
rehearses a kernel's whole life (so that everything that is made on first use is made, and the interpreter has
specialised the code, which it does by writing into it), and builds an IPython shell.
Of all this the server in the same process notices nothing.

`run` runs in a fork of a fork. It puts back what the server had made of the process, and starts ipykernel's own
application, which finds the shell ready. The application reads its configuration files as ever; when they say
something else than they did in the zygote, the shell is built anew, and it is an ordinary start.

Runs under the image's own Python, 3.9 and up, with whatever ipykernel (6.20 and up) the image has.
"""

from __future__ import annotations

import asyncio
import atexit
import builtins
import contextlib
import gc
import importlib
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
from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQInteractiveShell
from tornado import ioloop
from traitlets.config import Config, SingletonConfigurable

from nbagent.linux.process import make_room_for_descriptors
from nbagent.zygote import entropy, warmup
from nbagent.zygote.memory import code_layout, snapshot

# What a kernel imports only when it is needed, and what the server does: tests/lazy-modules writes it.
LIST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "modules.json")
# ipykernel looks every second whether this process is still its parent; 1 means never. The kernel
# tells a forked kernel when its parent has ended, at no cost.
NOBODY = 1
# A kernel that has run a cell has 68.
DESCRIPTORS = 256
# A kernel that is not shut down, as its rehearsal fails, leaves it running.
CONTROL_ENDS_S = 5.0
# The server's applications, whose loggers have tornado's among their children.
APPLICATIONS = frozenset({"ServerApp", "LabApp"})

_shell: Any = None
# What may be dropped but not destroyed: the server's event loop would close descriptors that it shares with the server.
_kept: List[Any] = []


class KernelApp(kernelapp.IPKernelApp):
    """ipykernel's application with the command line already read, and perhaps a shell already made."""

    ready_shell: Any = None
    bound: Any = None

    def parse_command_line(self, argv: Any = None) -> None:
        """What `ipykernel_launcher -f FILE` comes to."""
        self.update_config(Config({"IPKernelApp": {"connection_file": self.connection_file}}))

    def log_connection_info(self) -> None:
        """Says that the kernel listens: to the log, and to who waits for it."""
        super().log_connection_info()
        if self.bound is not None:
            self.bound()

    def init_kernel(self) -> None:
        """Makes the kernel, around the ready shell if that is what the configuration would make."""
        shell = self.ready_shell
        if shell is None or _what_makes_a_shell(self.config) != _what_makes_a_shell(shell.config):
            super().init_kernel()
            return
        # It is shared by all that were made with it.
        shell.config.IPKernelApp = self.config.IPKernelApp
        self.user_ns = shell.user_ns
        _make_current(ZMQInteractiveShell, shell)
        super().init_kernel()
        shell.parent = shell.kernel = self.kernel
        shell.profile_dir, shell.ipython_dir = self.profile_dir, self.ipython_dir
        _settle(shell)


def _what_makes_a_shell(config: Mapping[str, Any]) -> Dict[str, Any]:
    return {section: values for section, values in config.items() if section != "IPKernelApp"}


def _make_current(kind: Any, instance: Any) -> None:
    """Makes `instance`, or None, what `kind.instance()` gives."""
    for base in kind.mro():
        if issubclass(base, SingletonConfigurable) and base is not SingletonConfigurable:
            base._instance = instance


def _settle(shell: Any) -> None:
    """Does again what a shell's making does to the process, and finds in it."""
    shell.init_environment()
    shell.save_sys_module_state()
    shell.sys_excepthook = sys.excepthook
    shell.init_sys_modules()
    shell.init_builtins()
    shell.init_pushd_popd_magic()
    shell.starting_dir = os.getcwd()
    if shell.config.HistoryManager.get("enabled", True) and not shell.history_manager.enabled:
        # With its database, and a thread that writes to it.
        shell.configurables.remove(shell.history_manager)
        shell.init_history()
        shell.init_user_ns()
    shell.history_manager.dir_hist[:] = [type(path)(os.getcwd()) for path in shell.history_manager.dir_hist[:1]]
    atexit.register(shell.atexit_operations)


# In the zygote.


def prepare(server: Any, preload: Iterable[str] = ()) -> None:
    """Makes ready what kernels are to inherit, the modules `preload` among it, and rehearses them with the server.

    Afterwards there are one thread, the descriptors that there were, and no zmq context. Raises RuntimeError when
    that is not so, and ImportError for a module of `preload` that is not there.
    """
    global _shell
    with open(LIST) as file:
        listed = json.load(file)
    descriptors = set(os.listdir("/proc/self/fd"))
    with restore_process_state():
        # What debugpy finds as stderr when it is imported, it keeps: that is not to be a rehearsed kernel's.
        os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # of which it would warn there
        _import(["ipykernel.debugger", *listed["kernel"], *listed["server"]])
        _preload(preload)
        # The first time much runs that never does again.
        warmup.warm_up(server, _perform)
        with code_layout.watch() as runs:
            warmup.warm_up(server, _perform)
        code_layout.gather(runs)
        for _ in range(warmup.ROUNDS):
            warmup.warm_up(server, _perform)
        _shell = _ready_shell()
    entropy.find()
    gc.collect()
    threads = os.listdir("/proc/self/task")
    more = set(os.listdir("/proc/self/fd")) - descriptors
    more = {os.readlink(f"/proc/self/fd/{fd}") for fd in more if os.path.lexists(f"/proc/self/fd/{fd}")}
    if len(threads) != 1 or more:
        raise RuntimeError(f"a prepared zygote has {len(threads)} threads and the descriptors {sorted(more)} more")


def _import(names: Iterable[str]) -> None:
    for name in names:
        # An image need not have every module of the list, nor one that imports without trouble.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _preload(names: Iterable[str]) -> None:
    """Imports what the image wants to be there; what starts threads as it is imported, as OpenBLAS does, ends them."""
    # Matplotlib takes its backend from here when it is imported. A kernel says so too late, when it starts.
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in names:
        importlib.import_module(name)
    # Who can be forked ends its threads by pthread_atfork(3) before a fork and starts them again on first use. This is
    # that fork: afterwards there is one thread, and the zygote copies no other.
    snapshot.fork_noop()


@contextlib.contextmanager
def restore_process_state() -> Iterator[None]:
    """Puts back afterwards what a kernel changes of the process."""
    streams = sys.stdout, sys.stderr, sys.displayhook, sys.excepthook
    main, environment = sys.modules["__main__"], dict(os.environ)
    names = {name: builtins.__dict__.get(name) for name in ("__IPYTHON__", "display", "get_ipython")}
    current = [(kind, vars(kind)["_instance"]) for kind in _kinds(SingletonConfigurable) if vars(kind).get("_instance")]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [(logger, vars(logger).copy(), logger.handlers[:]) for logger in _loggers()]
    loop = _current_loop()
    _kept.append(loop)
    _forget_instances()
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
        _forget_instances()
        for kind, instance in current:
            kind._instance = instance
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, state, its_handlers in loggers:
            vars(logger).update(state)
            logger.handlers[:] = its_handlers
        asyncio.set_event_loop(loop)


def _loggers() -> List[logging.Logger]:
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]


def _kinds(base: Any) -> Iterator[Any]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _forget_instances() -> None:
    """Makes the singletons of traitlets' applications be made anew."""
    for kind in _kinds(SingletonConfigurable):
        # Each that is written to is memory of this process.
        if vars(kind).get("_instance") is not None:
            kind._instance = None


def _current_loop() -> Optional[asyncio.AbstractEventLoop]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return asyncio.get_event_loop()
        except RuntimeError:
            return None


def _ready_shell() -> Any:
    """A shell as ipykernel makes it, but for its database of history."""
    app = KernelApp()
    app.parse_command_line()
    app.init_profile_dir()
    app.init_config_files()
    app.load_config_file()
    history = dict(app.config.HistoryManager)
    app.config.HistoryManager.enabled = False
    namespace: Dict[str, Any] = {}
    shell = ZMQInteractiveShell(parent=app, profile_dir=app.profile_dir, user_ns=namespace,
                                compiler_class=IPythonKernel.compiler_class.default_value)
    app.config.HistoryManager.pop("enabled")
    app.config.HistoryManager.update(history)
    atexit.unregister(shell.atexit_operations)
    shell.parent = None
    return shell


def _perform(
    connection_file: str, listens: Callable[[], None], can_be_ended_by: Callable[[Callable[[], None]], None]
) -> None:
    """Is a kernel for the rehearsal, until it is shut down or ended."""
    with restore_process_state():
        loop = ioloop.IOLoop()
        asyncio.set_event_loop(loop.asyncio_loop)
        can_be_ended_by(lambda: loop.add_callback(loop.stop))
        app = KernelApp.instance(connection_file=connection_file, parent_handle=NOBODY, capture_fd_output=False,
                                 log_level=logging.CRITICAL)
        app.bound = listens
        app.config.HistoryManager.enabled = False
        app.initialize([])
        app.start()
        # It still says that the shutdown is done, which in a process that ends would harm nobody.
        if (control := getattr(app, "control_thread", None)) is not None:
            control.join(CONTROL_ENDS_S)
        app.close()
        atexit.unregister(app.close)
        atexit.unregister(app.iopub_thread.stop)
        atexit.unregister(app.shell.atexit_operations)
        can_be_ended_by(lambda: None)
        loop.close(all_fds=True)


# In the fork.


def run(order: Mapping[str, Any], bound: Callable[[], None]) -> NoReturn:
    """Is a kernel. `order` gives its "connection_file", "cwd" and "environment"; it calls `bound` when it listens."""
    gc.disable()
    _become_a_process_of_its_own(order)
    app = KernelApp.instance(connection_file=order["connection_file"], parent_handle=NOBODY)
    app.ready_shell, app.bound = _shell, bound
    status = 0
    try:
        app.initialize([])
        gc.enable()
        app.start()
    except SystemExit as wish:
        status = wish.code if isinstance(wish.code, int) else int(wish.code is not None)
    # As at the end of every program, but for frames of the zygote's below this one.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _become_a_process_of_its_own(order: Mapping[str, Any]) -> None:
    """Undoes what this process is by having been the server: what a new Python would not have."""
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):
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
    _forget_instances()
    _leave_logging()
    asyncio.set_event_loop(asyncio.new_event_loop())
    # Packages that the server does without: notebook.py.
    for name in [name for name, module in sys.modules.items() if module is None]:
        del sys.modules[name]
    sys.argv[:] = ["ipykernel_launcher", "-f", order["connection_file"]]
    _extend_path()


def _leave_logging() -> None:
    """Takes away what the server's loggers do with what is logged."""
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
    """The user's own packages, and the kernel's directory, where a new Python would look for them.

    The server is started so that it looks at neither; ipykernel would then not add the latter.
    """
    import site

    mine = site.getusersitepackages()
    packages = ("site-packages", "dist-packages")
    first = next((place for place, path in enumerate(sys.path) if path.endswith(packages)), len(sys.path))
    if mine not in sys.path and os.path.isdir(mine):
        sys.path.insert(first, mine)
    if "" not in sys.path and not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(first, "")
