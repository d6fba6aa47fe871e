"""The zygote: a notebook server that is ready in all but name, and forks slots.

    python3 -I zygote.py [--private-memory]

Runs inside an image, under the image's own Python, in a root of its own, as root of the image's user namespace
with the few capabilities that a fork of a slot takes (nbagent.sandbox.plan). At CONTROL_FD it hears the keeper:
first {"preload": [modules]}, with a pid namespace beside it in which nothing can be born any more; answered by
{"ready": true} when all is imported, initialised and rehearsed. Each packet after that is a slot
(nbagent.runtime.zygote_service, `program`), with descriptors beside it: the pid namespace, the socket to the
slot's first process, the slot's control socket, the pipe that says that the child is in its scope, the listening
socket, the activity page, the configuration and the end of a pipe to print to; answered by
{"forked": true} with a pidfd, or by {"ended": true} when there is nothing left to point at.

It has one thread, no event loop and the descriptors it had at first, and checks that before each fork. Nothing of
a slot is known to it but what it is told above; the token is in the configuration, which it does not read. What the
server was initialised with in the place of a slot's secrets and address is found by looking at all objects,
and replaced in the child.

Standard library, the image's JupyterLab and IPython; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any, Dict, List, NoReturn, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
gc.disable()

from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION, share_memory

# Before the imports below, so that the modules they load are in the shared memory.
memory = share_memory(PRIVATE_MEMORY_OPTION not in sys.argv)

from nbagent.linux import namespaces as ns
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime.slot_process import PACKET_MAX_BYTES, place_fds, report_failure, run
from nbagent.sandbox import plan
from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD
from nbagent.zygote import entropy, forkserver, kernel, notebook_server, provisioner

CONTROL_FD = LISTEN_FD
# In the place of a slot's own, of the same form, so that whatever is made of them is of the right form too.
BASE_URL = "/user/zygote-000000000000/"
TOKEN = "zygote-token-" + "0" * 32
REQUEST_FDS = 8


class Unclean(Exception):
    """A state from which no fork may be made."""


class PlaceholderSubstitution:
    """Where in the objects of this process the values of `names` are, as they are or as a part of a text."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._found: List[Tuple[Any, Any]] = []
        for known in gc.get_objects():
            if isinstance(known, dict):
                items: Any = list(known.items())
            elif isinstance(known, list):
                items = list(enumerate(known))
            else:
                continue
            if known is self.__dict__ or known is globals():
                continue
            self._found += [
                (known, key) for key, value in items
                if isinstance(value, str) and any(name in value for name in names)
            ]

    def fill(self, *values: str) -> None:
        """Puts `values` there instead, in the order of the names."""
        for known, key in self._found:
            text = known[key]
            for name, value in zip(self._names, values):  # noqa: B905  strict= is of 3.10
                text = text.replace(name, value)
            known[key] = text


class Zygote:
    """The state that every slot begins with."""

    def __init__(self, control: socket.socket, nowhere: int, preload: List[str]) -> None:
        self.control, self.nowhere = control, nowhere
        self.server = notebook_server.initialise(BASE_URL, TOKEN)
        kernel.prepare(self.server, memory, preload)
        notebook_server.close_loop(self.server)
        entropy.find_generators()
        # OpenSSL loads what it needs for its generator when that is first used: 4 ms and 1,000 pages of every child's.
        entropy.reseed()
        gc.collect()
        self.places = PlaceholderSubstitution(BASE_URL, TOKEN)
        self.fds = _open_fds()
        memory.freeze()

    def serve(self) -> None:
        """Forks on request, until the keeper is gone."""
        # Nobody waits for what it forks: a slot's own init hears of its end.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            payload, fds, _, _ = socket.recv_fds(self.control, PACKET_MAX_BYTES, REQUEST_FDS)
            if not payload:
                return
            try:
                self.check(fds)
                pid = self._fork(json.loads(payload), fds)
            except (OSError, Unclean) as error:
                self.control.send(json.dumps({"failed": str(error)}).encode())
                continue
            finally:
                for fd in fds:
                    os.close(fd)
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:  # nobody wants the slot any more, and it has noticed already
                self.control.send(json.dumps({"ended": True}).encode())
                continue
            try:
                socket.send_fds(self.control, [json.dumps({"forked": True}).encode()], [pidfd])
            finally:
                os.close(pidfd)

    def check(self, given: List[int]) -> None:
        """Raises Unclean unless there is one thread, and no descriptor but those of the start and of the request."""
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise Unclean(f"{threads} threads, where a fork copies one")
        strange = _open_fds() - self.fds - set(given)
        if strange:
            raise Unclean(f"open descriptors that were not there at first: {sorted(strange)}")

    def _fork(self, asked: Dict[str, Any], fds: List[int]) -> int:
        pidns, *others = fds
        # For its children; there is no way back from it but to one like it, which keeps nothing of the slot.
        ns.join(pidns)
        pid = os.fork()
        if pid == 0:
            os.close(pidns)
            os.close(self.nowhere)
            # Its number stays taken, as the next two, until the slot's descriptors are placed.
            self.control.detach()
            os.dup2(ACTIVITY_FD, CONTROL_FD, inheritable=False)
            self._child(asked, others)
        ns.join(self.nowhere)
        return pid

    def _child(self, asked: Dict[str, Any], fds: List[int]) -> NoReturn:
        sibling, control = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd) for fd in fds[:2])
        # Before the slot's scope is around it, it touches nothing.
        if not os.read(fds[2], 2):
            os._exit(0)
        os.close(fds[2])
        report_failure(control, lambda: self._slot(asked, sibling, control, fds[3:]))

    def _slot(
        self, asked: Dict[str, Any], sibling: socket.socket, control: socket.socket, fds: List[int]
    ) -> NoReturn:
        listen_fd, activity_fd, config_fd, print_fd = fds
        os.setsid()

        def be_a_seed() -> None:
            control.close()
            for fd in (listen_fd, activity_fd, config_fd):
                os.close(fd)
            _enter(asked, sibling, print_fd, [])

        # Before anybody has the server's secrets, which are none of a kernel's.
        provisioner.use(forkserver.split_off_server(kernel.run, sibling, be_a_seed))
        # While the root is built: all that needs none.
        entropy.reseed()
        os.environ.clear()
        os.environ.update(asked["environment"])
        settings = notebook_server.read_settings(config_fd)
        self.places.fill(settings["base_url"], settings["token"])
        application = notebook_server.reinitialise(self.server, BASE_URL, settings["base_url"])
        _enter(asked, sibling, print_fd, [listen_fd, activity_fd])
        sibling.close()
        # The change of user took it away. It is the user's own, as after an exec: its /proc, and to debug.
        prctl(PR_SET_DUMPABLE, 1)
        # The one of the zygote's own run is in the zygote's root.
        os.makedirs(self.server.runtime_dir, mode=0o700, exist_ok=True)

        def serving() -> None:
            with contextlib.suppress(OSError), control:  # a supervisor that has ended meanwhile is told nothing
                control.send(json.dumps({"serves": True}).encode())

        try:
            notebook_server.serve(self.server, application, serving)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def _enter(asked: Dict[str, Any], sibling: socket.socket, print_fd: int, fds: List[int]) -> None:
    """Makes this process one of the slot's as soon as its root is there: its namespaces, descriptors and user."""
    _, joined, _, _ = socket.recv_fds(sibling, PACKET_MAX_BYTES, 8)
    if not joined:
        os._exit(0)
    for fd in joined:
        ns.join(fd)
        os.close(fd)
    place_fds(print_fd, fds)
    for number in range(LISTEN_FD, LISTEN_FD + len(fds)):
        os.set_inheritable(number, False)
    run(plan.last(asked["uid"], asked["syscall_filter"], plan.FORKING))
    # SIGPIPE and SIGXFSZ stay ignored, as in every Python: a browser that goes away ends no server.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.umask(0o022)
    os.chdir(asked["directory"])


def _open_fds() -> frozenset[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found.add(int(name))
    return frozenset(found)


def main() -> None:
    """Serves the keeper."""
    control = socket.socket(fileno=CONTROL_FD)
    control.set_inheritable(False)
    # The numbers that a slot's descriptors will have are free for them.
    while os.open(os.devnull, os.O_RDWR) < CONFIG_FD:
        pass
    payload, (nowhere,), _, _ = socket.recv_fds(control, PACKET_MAX_BYTES, 1)
    try:
        zygote = Zygote(control, nowhere, json.loads(payload)["preload"])
    except Exception as error:  # of an image: whatever it is, the operator has to read it
        control.send(json.dumps({"failed": {"step": "initialise", "text": repr(error)}}).encode())
        raise
    control.send(json.dumps({"ready": True}).encode())
    zygote.serve()


if __name__ == "__main__":
    main()
