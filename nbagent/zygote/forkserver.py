# SPDX-License-Identifier: BSD-3-Clause
"""A slot's fork server: the process that the slot's server and its kernels are forked from.

It is the zygote's child, in the slot's namespaces and as its user. It forks the server, before either has the slot's
secrets, and from then on waits on a channel and forks a kernel for each order; so a kernel has everything loaded that
the zygote had. It runs no code of the user's itself, and holds no descriptor of the server's.

    server, `ForkServerClient`              fork server, `_ForkServer`          kernel
    order, "fds": ["channel"]  ───orders──▶ fork ─────────────────────────────▶ `kernel.run`
                               ◀──channel── {"pid": int, "fds": ["pidfd"]}, or a failure
                               ◀──channel────────────────────────────────────── {"bound": true}
                               ◀──channel── {"exited": status}    ◀────ends────
    closes the channel         ───────────▶ reaps, so that the pid is not reused before

It ends when the server has ended, and its kernels end with it (PR_SET_PDEATHSIG), as ordinary kernels end with their
server; it reports the server's exit status to the slot's init. When the fork server is killed, the server goes on as a
child of init, and kernels start the ordinary way from then on.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import traceback
from typing import Any, Callable, Dict, Mapping, NoReturn, Optional

from nbagent.linux.process import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl
from nbagent.wire import fields
from nbagent.wire.aio import readable
from nbagent.wire.channel import Channel
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

# An order has the kernel's whole environment in it.
ORDER_MAX_BYTES = 1 << 20
PID_MAX = 1 << 22  # the kernel's PID_MAX_LIMIT
# Forking takes milliseconds; a machine that swaps may take longer.
FORK_TIMEOUT_S = 10.0
BOUND_TIMEOUT_S = 5.0

# Runs a kernel by its order, and calls the function when the kernel listens.
Run = Callable[[Mapping[str, Any], Callable[[], None]], NoReturn]


class ForkFailed(Exception):
    """The fork server forked no kernel; the text has the reason."""


class ForkedProcess:
    """A forked kernel, with what jupyter_client's provisioner uses of subprocess.Popen."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, pidfd: int, channel: Channel, bound: bool) -> None:
        self.pid, self.returncode = pid, None  # type: int, Optional[int]
        self._pidfd, self._channel, self._bound = pidfd, channel, bound

    def poll(self) -> Optional[int]:
        """The exit status, negative for a signal; None while it runs."""
        while self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            try:
                message = self._channel.receive()
                if message is None:
                    # The fork server was killed, and by PR_SET_PDEATHSIG the kernel with it.
                    self._ended(-signal.SIGKILL)
                elif "exited" in message.body:
                    self._ended(fields.integer(message.body, "exited", -signal.NSIG, 255))
            except MalformedMessage:
                self._ended(-signal.SIGKILL)
        return self.returncode

    async def bound(self) -> None:
        """Waits until the kernel listens, or has ended; BOUND_TIMEOUT_S at most.

        libzmq repeats a connect that was refused only 100 ms later.
        """
        if self._bound:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(readable(self._channel.fileno()), BOUND_TIMEOUT_S)
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
    """The server's side of a fork server, which is its parent."""

    exclusive = False

    def __init__(self, pid: int, orders: Channel) -> None:
        self.pid, self._orders = pid, orders

    @property
    def alive(self) -> bool:
        """Whether the fork server runs."""
        return os.getppid() == self.pid

    async def fork(self, order: Mapping[str, Any]) -> ForkedProcess:
        """Forks a kernel. Raises ForkFailed, after FORK_TIMEOUT_S at the latest."""
        channel, peer = Channel.pair()
        try:
            with peer:
                self._orders.send(order, {"channel": peer.fileno()})
            return await self._forked(channel)
        except BaseException as error:
            # At the channel's end the fork server kills a kernel that it may have forked.
            channel.close()
            if isinstance(error, (OSError, asyncio.TimeoutError, StepFailed, MalformedMessage)):
                text = str(error) or f"no response within {FORK_TIMEOUT_S:g} s"
                raise ForkFailed(f"the fork server: {text}") from error
            raise

    async def _forked(self, channel: Channel) -> ForkedProcess:
        bound = False
        while True:
            await asyncio.wait_for(readable(channel.fileno()), FORK_TIMEOUT_S)
            message = channel.receive()
            if message is None:
                raise ForkFailed("the fork server has ended")
            with message:
                message.raise_failure()
                if "pid" in message.body:
                    pid = fields.integer(message.body, "pid", 1, PID_MAX)
                    return ForkedProcess(pid, message.take("pidfd"), channel, bound)
                # On a busy machine the kernel's message arrives before the fork server's.
                bound = bound or "bound" in message.body


def split_off_server(run: Run, init: Channel, begin: Callable[[], None]) -> ForkServerClient:
    """Forks the server off this process, which becomes its fork server; returns in the server only.

    `run` runs a kernel by its order; it never returns. `init` receives {"program": pid} of the server, and
    {"exited": status} when that has ended, negative for a signal. The fork server calls `begin` before it takes
    orders. In a process with one thread and no running loop.
    """
    orders, peer = Channel.pair(ORDER_MAX_BYTES)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        peer.close()
        orders.socket.setblocking(False)
        os.setsid()
        return ForkServerClient(parent, orders)
    orders.close()
    # No exception may reach the zygote's frames.
    try:
        server = _ForkServer(peer, init, pid)
        begin()
        server.serve(run)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class _Kernel:
    """A child of the fork server: `channel` leads to the server, which closes it when it has reaped the kernel."""

    def __init__(self, pid: int, pidfd: int, channel: Channel) -> None:
        self.pid, self.pidfd, self.channel, self.ended = pid, pidfd, channel, False


class _ForkServer:
    """The loop of the fork server."""

    def __init__(self, orders: Channel, init: Channel, server: int) -> None:
        self.orders, self.init, self.server = orders, init, server
        self.server_pidfd = os.pidfd_open(server)
        self._report({"program": server})
        self.kernels: Dict[int, _Kernel] = {}
        self.poll = select.poll()

    def serve(self, run: Run) -> NoReturn:
        """Forks and reaps until the server has ended."""
        gc.disable()
        give_up_descriptors(self.orders.fileno(), self.init.fileno(), self.server_pidfd)
        # These signals, of systemd or a terminal, are for the server, which ends its kernels first.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.poll.register(self.orders, select.POLLIN)
        self.poll.register(self.server_pidfd, select.POLLIN)
        while True:
            for fd, _events in self.poll.poll():
                if fd == self.server_pidfd:
                    self._report({"exited": os.waitstatus_to_exitcode(os.waitpid(self.server, 0)[1])})
                    os._exit(0)
                if fd == self.orders.fileno():
                    self._take_order(run)
                elif fd in self.kernels:  # an event before this one may have removed it
                    self._reap(self.kernels[fd], fd)

    def _report(self, message: Dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # init has ended
            self.init.send(message)

    def _take_order(self, run: Run) -> None:
        order = self.orders.receive()
        if order is None:  # the server ends
            self.poll.unregister(self.orders)
            return
        channel = Channel.from_fd(order.take("channel"))
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            with channel, contextlib.suppress(OSError):
                channel.send(Failure.of(error, "fork").save())
            return
        if pid == 0:
            _become_kernel(parent, order.body, channel, run)
        kernel = _Kernel(pid, os.pidfd_open(pid), channel)
        for fd in (kernel.pidfd, channel.fileno()):
            self.kernels[fd] = kernel
            self.poll.register(fd, select.POLLIN)
        with contextlib.suppress(OSError):
            channel.send({"pid": pid}, {"pidfd": kernel.pidfd})

    def _reap(self, kernel: _Kernel, fd: int) -> None:
        if fd == kernel.pidfd and not kernel.ended:
            kernel.ended = True
            self.poll.unregister(fd)
            # The pid is not reaped, and so not reused, until the server has read that the kernel has ended.
            found = os.waitid(os.P_PID, kernel.pid, os.WEXITED | os.WNOWAIT)
            assert found is not None
            status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            with contextlib.suppress(OSError):
                kernel.channel.send({"exited": status})
        elif fd == kernel.channel.fileno():
            if not kernel.ended:  # the server has ended, or has abandoned the order
                signal.pidfd_send_signal(kernel.pidfd, signal.SIGKILL)
            os.waitpid(kernel.pid, 0)
            for number in (kernel.pidfd, fd):
                del self.kernels[number]
                with contextlib.suppress(KeyError):
                    self.poll.unregister(number)
            kernel.channel.close()
            os.close(kernel.pidfd)


def _become_kernel(parent: int, order: Mapping[str, Any], channel: Channel, run: Run) -> NoReturn:
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The change of user has cleared it. The user may debug a kernel, and the server reads its memory in /proc.
        prctl(PR_SET_DUMPABLE, 1)
        if os.getppid() != parent:  # it ended before PR_SET_PDEATHSIG was set
            os._exit(1)
        give_up_descriptors(channel.fileno())

        def bound() -> None:
            with contextlib.suppress(OSError):
                channel.send({"bound": True})
            channel.close()

        run(order, bound)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def give_up_descriptors(*kept: int) -> None:
    """Replaces every descriptor above the standard streams, but those `kept`, by /dev/null.

    Their numbers stay occupied, because objects from before the fork may still close them, and must not close another
    file then.
    """
    null = os.open("/dev/null", os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd != null and fd not in kept:
            with contextlib.suppress(OSError):
                os.fstat(fd)
                os.dup2(null, fd, inheritable=False)
    os.close(null)
