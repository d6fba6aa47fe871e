"""A slot's seed: the process that the slot's server and its kernels are forked from.

It is what the zygote has forked, in the slot's namespaces and as its user. It forks the server, before either has the
slot's secrets, and from then on waits on a socket and forks a kernel for each order; so a kernel has everything
loaded that the zygote had. It runs no code of the user's itself, and holds no descriptor of the server's.

    server, `ForkServerClient`                      seed, `_ForkServer`                 kernel
    order + a channel   ───SEQPACKET──▶ fork ──────────────────────────▶ `kernel.run`
                        ◀───channel──── {"pid"} and a pidfd
                        ◀───channel──────────────────────────── {"bound": true}
                        ◀───channel──── {"exited": status}   ◀───ends───
    closes the channel  ──────────────▶ reaps: until then the pid is nobody else's

It ends when the server has ended, and its kernels end with it (PR_SET_PDEATHSIG), as ordinary kernels end with their
server; how the server ended it tells the slot's init. When the seed dies alone, the server stays, a child of
init now, and kernels start the ordinary way from then on.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import signal
import socket
import traceback
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional

from nbagent.linux.process import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl

ORDER_MAX_BYTES = 1 << 20
# Forking takes milliseconds; a machine that swaps may take its time.
FORK_TIMEOUT_S = 10.0
BOUND_TIMEOUT_S = 5.0

# A kernel: its order, and what to call when it listens.
Run = Callable[[Mapping[str, Any], Callable[[], None]], NoReturn]


class ForkFailed(Exception):
    """The seed forked no kernel; the text says why."""


class ForkedProcess:
    """A forked kernel, with what jupyter_client's provisioner uses of subprocess.Popen."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, pidfd: int, channel: socket.socket, bound: bool) -> None:
        self.pid, self.returncode = pid, None  # type: int, Optional[int]
        self._pidfd, self._channel, self._bound = pidfd, channel, bound

    def poll(self) -> Optional[int]:
        """The exit status, negative for a signal; None while it runs."""
        while self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            said = self._channel.recv(ORDER_MAX_BYTES)
            # Without a word the seed has died, and by PR_SET_PDEATHSIG the kernel with it.
            heard = json.loads(said) if said else {"exited": -signal.SIGKILL}
            if "exited" in heard:
                self._ended(heard["exited"])
        return self.returncode

    async def bound(self) -> None:
        """Waits until the kernel listens, or has ended; BOUND_TIMEOUT_S at most.

        Who connects before finds nobody, and libzmq tries again 100 ms later.
        """
        if self._bound:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await _heard(self._channel, BOUND_TIMEOUT_S)
        self.poll()

    def wait(self, timeout: Optional[float] = None) -> int:
        """Waits for the end and gives the exit status. Raises TimeoutError after `timeout` seconds."""
        while (status := self.poll()) is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise TimeoutError(f"kernel {self.pid} runs after {timeout} s")
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal to the kernel alone; nothing when it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, status: int) -> None:
        self.returncode = status
        self._channel.close()
        os.close(self._pidfd)


class ForkServerClient:
    """The server's side of a seed, which is its parent."""

    exclusive = False

    def __init__(self, pid: int, orders: socket.socket) -> None:
        self.pid, self._orders = pid, orders

    @property
    def alive(self) -> bool:
        """Whether there is still a seed."""
        return os.getppid() == self.pid

    async def fork(self, order: Mapping[str, Any]) -> ForkedProcess:
        """Forks a kernel. Raises ForkFailed, after FORK_TIMEOUT_S at the latest."""
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answer: Dict[str, Any] = {}
        fds: List[int] = []
        try:
            with theirs:
                socket.send_fds(self._orders, [json.dumps(order).encode()], [theirs.fileno()])
            # On a busy machine the kernel says that it listens before the seed says which it is.
            while not {"pid", "failed"} & answer.keys():
                await _heard(channel, FORK_TIMEOUT_S)
                said, more, _flags, _address = socket.recv_fds(channel, ORDER_MAX_BYTES, 1)
                answer.update(json.loads(said or '{"failed": "the seed has died"}'))
                fds += more
            if "failed" in answer:
                raise ForkFailed(answer["failed"])
        except (OSError, asyncio.TimeoutError) as error:
            # It ends what it may have forked when it finds nobody at the channel.
            channel.close()
            text = str(error) or f"within {FORK_TIMEOUT_S:g} s"
            raise ForkFailed(f"no answer from the seed: {text}") from error
        except BaseException:
            channel.close()
            raise
        return ForkedProcess(answer["pid"], fds[0], channel, "bound" in answer)


async def _heard(channel: socket.socket, timeout_s: float) -> None:
    """Returns when there is something to receive. Raises asyncio.TimeoutError."""
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(channel, heard.set)
    try:
        await asyncio.wait_for(heard.wait(), timeout_s)
    finally:
        loop.remove_reader(channel)


def split_off_server(run: Run, init: socket.socket, begin: Callable[[], None]) -> ForkServerClient:
    """Forks the server off this process, which becomes its seed; returns in the server only.

    `run` is what a kernel does with its order; it never returns. `init` hears {"program": pid} of the server, and
    {"exited": status} when that has ended, negative for a signal. `begin` is what the seed does then, before it takes
    orders. In a process with one thread and no running loop.
    """
    orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    seed = os.getpid()
    pid = os.fork()
    if pid == 0:
        theirs.close()
        orders.setblocking(False)
        os.setsid()
        return ForkServerClient(seed, orders)
    orders.close()
    # Nothing may go up into the frames below.
    try:
        keeper = _ForkServer(theirs, init, pid)
        begin()
        keeper.serve(run)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class _Kernel:
    """A child of the seed: `channel` says when it has ended, and hears when nobody asks for it any more."""

    def __init__(self, pid: int, pidfd: int, channel: socket.socket) -> None:
        self.pid, self.pidfd, self.channel, self.ended = pid, pidfd, channel, False


class _ForkServer:
    """What the seed does."""

    def __init__(self, orders: socket.socket, init: socket.socket, server: int) -> None:
        self.orders, self.init, self.server = orders, init, server
        self.server_pidfd = os.pidfd_open(server)
        self._tell({"program": server})
        self.kernels: Dict[int, _Kernel] = {}
        self.poll = select.poll()

    def serve(self, run: Run) -> NoReturn:
        """Forks and reaps until the server has ended."""
        gc.disable()
        give_up_descriptors(self.orders.fileno(), self.init.fileno(), self.server_pidfd)
        # Whom systemd asks to end, and a terminal, is the server: it ends its kernels first.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.poll.register(self.orders, select.POLLIN)
        self.poll.register(self.server_pidfd, select.POLLIN)
        while True:
            for fd, _events in self.poll.poll():
                if fd == self.server_pidfd:
                    self._tell({"exited": os.waitstatus_to_exitcode(os.waitpid(self.server, 0)[1])})
                    os._exit(0)
                if fd == self.orders.fileno():
                    self._take_order(run)
                elif fd in self.kernels:  # it may have gone by what was seen just before
                    self._reap(self.kernels[fd], fd)

    def _tell(self, news: Dict[str, int]) -> None:
        with contextlib.suppress(OSError):  # an init that has ended is told nothing
            self.init.send(json.dumps(news).encode())

    def _take_order(self, run: Run) -> None:
        said, fds, _flags, _address = socket.recv_fds(self.orders, ORDER_MAX_BYTES, 1)
        if not said:  # the server ends
            self.poll.unregister(self.orders)
            return
        channel = socket.socket(fileno=fds[0])
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            channel.send(json.dumps({"failed": str(error)}).encode())
            channel.close()
            return
        if pid == 0:
            _become_kernel(parent, json.loads(said), channel, run)
        kernel = _Kernel(pid, os.pidfd_open(pid), channel)
        for fd in (kernel.pidfd, channel.fileno()):
            self.kernels[fd] = kernel
            self.poll.register(fd, select.POLLIN)
        with contextlib.suppress(OSError):
            socket.send_fds(channel, [json.dumps({"pid": pid}).encode()], [kernel.pidfd])

    def _reap(self, kernel: _Kernel, fd: int) -> None:
        if fd == kernel.pidfd and not kernel.ended:
            kernel.ended = True
            self.poll.unregister(fd)
            # The pid stays taken until whoever might signal it knows.
            found = os.waitid(os.P_PID, kernel.pid, os.WEXITED | os.WNOWAIT)
            assert found is not None
            status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            with contextlib.suppress(OSError):
                kernel.channel.send(json.dumps({"exited": status}).encode())
        elif fd == kernel.channel.fileno():
            if not kernel.ended:  # nobody is left who could ask it to end
                signal.pidfd_send_signal(kernel.pidfd, signal.SIGKILL)
            os.waitpid(kernel.pid, 0)
            for number in (kernel.pidfd, fd):
                del self.kernels[number]
                with contextlib.suppress(KeyError):
                    self.poll.unregister(number)
            kernel.channel.close()
            os.close(kernel.pidfd)


def _become_kernel(parent: int, order: Mapping[str, Any], channel: socket.socket, run: Run) -> NoReturn:
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The change of user took it away. A kernel is the user's own: to debug, and for the server to weigh in /proc.
        prctl(PR_SET_DUMPABLE, 1)
        if os.getppid() != parent:  # it ended before the kernel could hear of it
            os._exit(1)
        give_up_descriptors(channel.fileno())

        def bound() -> None:
            with contextlib.suppress(OSError):
                channel.send(json.dumps({"bound": True}).encode())
            channel.close()

        run(order, bound)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def give_up_descriptors(*kept: int) -> None:
    """Lets go of every descriptor above the standard streams but those `kept`.

    Their numbers are taken by /dev/null: objects from before the fork may still close them one day, and must
    not close another file then.
    """
    null = os.open("/dev/null", os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd != null and fd not in kept:
            with contextlib.suppress(OSError):
                os.fstat(fd)
                os.dup2(null, fd, inheritable=False)
    os.close(null)
