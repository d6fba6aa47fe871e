# SPDX-License-Identifier: BSD-3-Clause
"""The zygote: a notebook server that is initialised up to its listening socket, and forks slots.

    python3 zygote.py [--private-memory] [--quick] [--activated=NAMES]

Runs inside an image, under the image's own Python, in a root of its own, as root of the image's user namespace
with the few capabilities that a fork of a slot takes (nbagent.sandbox.plan). Over the channel at CONTROL_FD it
receives requests from the zygote service (nbagent.runtime.zygote_service lists the messages): first the modules to
preload, then one request for each slot.

It has one thread, no event loop and the descriptors it had at first, and checks that before each fork. It knows of a
slot only what is in the request; the token is in the configuration, which it does not read. The server was initialised
with placeholders for a slot's token and address: they are found by a search of all objects, and replaced in the child.

Standard library, the image's JupyterLab and IPython; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NoReturn, cast

# Without -I, because the flags, the hash seed and the path of its Python are those of all kernels. The directory of
# this file, whose modules are submodules, is not searched.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(path for path in sys.path if path != _HERE)]
gc.disable()

from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION, QUICK_OPTION, share_memory

# Before the imports below, so that the modules they load are in the shared memory.
memory = share_memory(not {PRIVATE_MEMORY_OPTION, QUICK_OPTION} & set(sys.argv))

from nbagent.zygote import as_execd

# Before the server is imported, whose warning filters a kernel does not have.
as_execd.record()

from jupyter_server.extension.manager import ExtensionManager

from nbagent.linux import namespaces as ns
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime.slot_process import JOINED, place_fds, run
from nbagent.sandbox import plan
from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message, report_failure
from nbagent.wire.failure import INHERITED_STEP, NOTE_MAX_CHARACTERS, NOTES_MAX, Failure
from nbagent.zygote import activated, entropy, forkserver, kernel, notebook_server, process_tree, provisioner
from nbagent.zygote.inherited import IMPORTED, Inherited, Openers, descriptors
from nbagent.zygote.placeholders import PlaceholderSubstitution

CONTROL_FD = LISTEN_FD
# Placeholders of the same form as a slot's own values, so that values derived from them have the right form too.
BASE_URL = "/user/zygote-000000000000/"
TOKEN = "zygote-token-" + "0" * 32
INIT_MAX_BYTES = 4096
# The option of a zygote that executes itself anew, and how often it may.
AGAIN_OPTION = "--again="
ROUNDS_MAX = 4
UID_MAX = 65535


class Unclean(Exception):
    """A state that a fork would copy wrongly: more than one thread, or a descriptor that is not the zygote's."""


class ZygotePlan:
    """The modules to preload, those of them to leave out, and the extensions to load after the fork, with the reasons.

    A zygote that finds a module or an extension that a fork would break executes itself anew without it, because a
    thread or a file that was opened cannot be undone.

    `imported_after_fork` are those of `after_fork` that are not even imported before it.
    """

    def __init__(
        self, preload: List[str], after_fork: Dict[str, str], left_out: Dict[str, str],
        imported_after_fork: Iterable[str] = (), rounds: int = 0,
    ) -> None:
        self.preload, self.after_fork, self.left_out, self.rounds = preload, after_fork, left_out, rounds
        self.imported_after_fork = list(imported_after_fork)

    def notes(self) -> List[str]:
        """The differences from the manifest, for the journal."""
        return [
            *(f"the module {name} is not preloaded: {reason}" for name, reason in self.left_out.items()),
            *(f"the extension {name} is loaded in each slot after the fork: {reason}"
              for name, reason in self.after_fork.items() if reason),
        ]

    def saved(self) -> Dict[str, Any]:
        """The arguments of the same plan, with reasons as long as a note, because execve(2) takes at most 128 KiB."""
        reasons = {
            key: {name: reason[:NOTE_MAX_CHARACTERS] for name, reason in getattr(self, key).items()}
            for key in ("after_fork", "left_out")
        }
        return {**vars(self), **reasons}

    def without(self, error: Inherited) -> bool:
        """Leaves out what caused the error; False when that is not possible, or was not enough twice."""
        found = {name for name in error.modules if name not in self.left_out}
        found |= {name for name in error.extensions if name not in self.after_fork}
        found |= {name for name in error.imported if name not in self.imported_after_fork}
        if not error.avoidable or not found or self.rounds >= ROUNDS_MAX:
            return False
        self.left_out.update(error.modules)
        self.after_fork.update(error.extensions)
        self.imported_after_fork += [name for name in error.imported if name not in self.imported_after_fork]
        self.rounds += 1
        return True


@contextlib.contextmanager
def _without(method: str, names: Iterable[str]) -> Iterator[None]:
    """Lets the server not call this method of its extension manager for the extensions `names`."""
    original, skipped = getattr(ExtensionManager, method), frozenset(names)

    def call(manager: Any, name: str, *arguments: Any, **options: Any) -> Any:
        return None if name in skipped else original(manager, name, *arguments, **options)

    setattr(ExtensionManager, method, call)
    try:
        yield
    finally:
        setattr(ExtensionManager, method, original)


class Zygote:
    """The process state that every slot begins with."""

    def __init__(self, control: Channel, nowhere: int, plan: ZygotePlan) -> None:
        self.control, self.nowhere, self.plan = control, nowhere, plan
        # Before the imports below, which may set variables of their own.
        self.activated = activated.values(sys.argv, os.environ)
        # Libraries that support fork, such as OpenBLAS, end their threads by a pthread_atfork(3) handler before a fork
        # and start them again on first use.
        self.fds, openers = descriptors(), Openers(memory.fork_noop)
        watched = openers.of_methods(ExtensionManager, add_extension=IMPORTED, link_extension="", load_extension="")
        with _without("load_extension", plan.after_fork), _without("add_extension", plan.imported_after_fork), watched:
            self.server = notebook_server.initialise(BASE_URL, TOKEN)
        openers.check_extensions()
        openers.check_threads()
        preload = [name for name in plan.preload if name not in plan.left_out]
        failed = kernel.prepare(
            self.server, memory, preload, openers, quick=QUICK_OPTION in sys.argv,
            importing=lambda name: control.send({"imports": name}),
        )
        plan.left_out.update(failed)
        self.loop = notebook_server.release_loop(self.server)
        # OpenSSL loads what it needs for its generator when that is first used: 4 ms and 1,000 pages of every child's.
        entropy.reseed()
        self.places = PlaceholderSubstitution(BASE_URL, TOKEN, without=globals())
        memory.freeze()
        openers.check(self.fds)

    def serve(self) -> None:
        """Forks on request, until the zygote service closes the channel."""
        # The kernel reaps its children; the end of a slot is for the slot's own init.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while (request := self.control.receive()) is not None:
            with request:
                try:
                    self.check(request)
                    pid = self._fork(request)
                except (OSError, Unclean) as error:
                    self.control.send(Failure.of(error, "fork").save())
                    continue
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:  # the supervisor has abandoned the slot, so that the child has exited already
                self.control.send({"ended": True})
                continue
            try:
                self.control.send({}, {"fork_server": pidfd})
            finally:
                os.close(pidfd)

    def check(self, request: Message) -> None:
        """Raises Unclean unless there is one thread, and no descriptor but those of the start and of the request."""
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise Unclean(f"{threads} threads, where a fork copies one")
        strange = descriptors() - self.fds - set(request.fds.values())
        if strange:
            raise Unclean(f"open descriptors that were not there at first: {sorted(strange)}")

    def _fork(self, request: Message) -> int:
        # The pid namespace of its children. setns(2) back to its own takes CAP_SYS_ADMIN over the host's, so it goes to
        # `nowhere` afterwards, which has no process and keeps nothing of the slot alive.
        ns.setns(request.fds["pidns"])
        pid = os.fork()
        if pid == 0:
            os.close(request.take("pidns"))
            os.close(self.nowhere)
            # Keep descriptors 3 to 5 occupied until place_fds() fills them.
            self.control.detach()
            os.dup2(ACTIVITY_FD, CONTROL_FD, inheritable=False)
            self._child(request)
        ns.setns(self.nowhere)
        return pid

    def _child(self, request: Message) -> NoReturn:
        # It touches no memory before it is in the slot's scope, and so waits for bytes and not for a message.
        go_fd = request.take("go")
        if not os.read(go_fd, 2):
            os._exit(0)
        os.close(go_fd)
        control = Channel.from_fd(request.take("control"))
        report_failure(control, "exec", lambda: self._slot(request, control))

    def _slot(self, request: Message, control: Channel) -> NoReturn:
        init = Channel.from_fd(request.take("init"), INIT_MAX_BYTES)
        slot = fields.mapping(request.body, "slot")
        print_fd = request.take("output")
        listen_fd, activity_fd, config_fd = (request.take(name) for name in ("listen", "activity", "config"))
        environment = cast(Dict[str, str], fields.mapping(slot, "environment"))
        activated.apply(self.activated, environment)
        os.setsid()

        def begin_fork_server() -> None:
            control.close()
            for fd in (listen_fd, activity_fd, config_fd):
                os.close(fd)
            _enter(slot, init, print_fd, [])
            as_execd.show([sys.executable, forkserver.__file__], environment)

        # Before this process reads the server's secrets, which no kernel may have.
        provisioner.use(forkserver.split_off_server(kernel.run, init, begin_fork_server))
        # While init builds the root: all that needs none.
        entropy.reseed()
        os.environ.clear()
        os.environ.update(environment)
        settings = notebook_server.read_settings(config_fd)
        self.places.fill(settings["base_url"], settings["token"])
        application = notebook_server.reinitialise(self.server, self.loop, BASE_URL, settings["base_url"])
        _enter(slot, init, print_fd, [listen_fd, activity_fd])
        init.close()
        # The change of user has cleared it. As after an exec, the user may read this process's /proc and debug it.
        prctl(PR_SET_DUMPABLE, 1)
        as_execd.forget_host_name()
        process_tree.adopt_kernels()
        as_execd.show([sys.executable, os.path.join(_HERE, "exec_main.py")], environment)

        notebook_server.load_after_fork(
            self.server, self.plan.after_fork, self.plan.imported_after_fork, application
        )

        def serving() -> None:
            with contextlib.suppress(OSError), control:  # the supervisor may have ended meanwhile
                control.send({"serves": True})

        try:
            notebook_server.serve(self.server, application, serving)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def _enter(slot: Mapping[str, object], init: Channel, print_fd: int, fds: List[int]) -> None:
    """Makes this process one of the slot's when init has built the root: its namespaces, descriptors and user."""
    joined = init.receive()
    if joined is None:
        os._exit(0)
    for name in JOINED:
        fd = joined.take(name)
        ns.setns(fd)
        os.close(fd)
    place_fds(print_fd, fds)
    for number in range(LISTEN_FD, LISTEN_FD + len(fds)):
        os.set_inheritable(number, False)
    uid, syscall_filter = fields.integer(slot, "uid", 0, UID_MAX), fields.text(slot, "syscall_filter")
    run(plan.last(uid, syscall_filter, plan.FORKING, fields.text(slot, "apparmor")))
    # SIGPIPE and SIGXFSZ stay ignored, as in every Python, so that a closed connection does not end the server.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.umask(0o022)
    os.chdir(fields.text(slot, "directory"))


def main() -> None:
    """Serves the zygote service."""
    os.set_inheritable(CONTROL_FD, False)
    control = Channel.from_fd(CONTROL_FD)
    # The numbers that a slot's descriptors will have are occupied, so that no other file gets them.
    while os.open(os.devnull, os.O_RDWR) < CONFIG_FD:
        pass
    if len(sys.argv) > 1 and sys.argv[-1].startswith(AGAIN_OPTION):
        again = json.loads(sys.argv.pop()[len(AGAIN_OPTION):])
        nowhere = again.pop("nowhere")
        os.set_inheritable(nowhere, False)
        wanted = ZygotePlan(**again)
    else:
        request = control.receive()
        if request is None:
            return
        nowhere = request.take("nowhere")
        after_fork = dict.fromkeys(fields.texts(request.body, "extensions_after_fork"), "")
        left_out = cast(Dict[str, str], dict(fields.mapping(request.body, "left_out")))
        wanted = ZygotePlan(fields.texts(request.body, "preload"), after_fork, left_out)
    try:
        zygote = Zygote(control, nowhere, wanted)
    except Inherited as error:
        if wanted.without(error):
            print(f"zygote: {error}; started again without that", flush=True)
            for fd in (CONTROL_FD, nowhere):
                os.set_inheritable(fd, True)
            again = json.dumps({"nowhere": nowhere, **wanted.saved()})
            os.execv(sys.executable, [sys.executable, *sys.argv, AGAIN_OPTION + again])
        control.send(Failure(INHERITED_STEP, 0, str(error)).save())
        raise
    except Exception as error:  # the image's code may raise anything, and the operator has to read it
        control.send(Failure.of(error, "initialise").save())
        raise
    control.send({"ready": True, "notes": [note[:NOTE_MAX_CHARACTERS] for note in wanted.notes()[:NOTES_MAX]]})
    zygote.serve()


if __name__ == "__main__":
    main()
