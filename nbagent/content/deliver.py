# SPDX-License-Identifier: BSD-3-Clause
"""Delivers the content of a claim into a running slot: one process that enters the slot and becomes its user.

    python3 -I -m nbagent.content.deliver CONTROL_FD

Over the control channel (nbagent.wire.channel) it receives {"order": Order}, with a pidfd of the slot's first process,
"init", and, for a claim with files, a sealed memfd with their bytes, "content". It sends {"begun": true} when it runs,
then one response, and exits: {"files": int, "entries": int}, or a failure of the step ENTER, WRITE or UNPACK.

Its first instruction runs in the slot's scope already, so that all memory it touches is charged to the slot. Before it
enters, it imports all it will need and reads its order. The process that enters exits at once; its child is in the
slot's pid namespace too, where the slot's init will reap it, and gets the slot's user, limits and filter by the last
steps of the same plan. Only then it touches a file or the network.

It exposes nothing to the slot: it has no descriptor of the host but this channel and the claim's own content, and no
environment, and it is not dumpable from before it enters to its end, so that no process with the slot's id can trace it
or read its /proc. In turn its response is untrusted, because it is a process of the slot that sends it.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple

from nbagent.content.beneath_writer import BeneathWriter
from nbagent.core import proxies
from nbagent.linux import namespaces as ns
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.sandbox import plan
from nbagent.sandbox.spec import HOST_IDS
from nbagent.untrusted.refusal import Refused
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message, report_failure
from nbagent.wire.failure import Failure, StepFailed

NAMESPACES = plan.NAMESPACES | ns.CLONE_NEWUSER
ENTER, WRITE, UNPACK = "enter", "write", "unpack"
# 100 files whose paths of 1,000 bytes JSON escapes threefold.
ORDER_MAX_BYTES = 1 << 20


class Order(NamedTuple):
    """The content to deliver, and the user: `uid` in the slot, whose first process on the host is `pid`.

    `files` are pairs of a path and a size in bytes; `allowed` are prefixes of URLs. `timeout_s` is for all of it; the
    supervisor ends the slot a little later. `proxy` is an HTTP proxy for all addresses but those in the networks
    `direct`.
    """

    uid: int
    pid: int
    syscall_filter: str
    files: List[Tuple[str, int]]
    archive: Optional[str]
    allowed: List[str]
    archive_bytes: int
    archive_entries: int
    timeout_s: float
    proxy: Optional[str] = None
    direct: Sequence[str] = ()
    apparmor: str = ""

    def save(self) -> Dict[str, object]:
        """The order as JSON."""
        return self._asdict()

    @classmethod
    def restore(cls, saved: Mapping[str, object]) -> Order:
        """The order from JSON of the supervisor, which is trusted. Raises TypeError when a field is missing."""
        return cls(**saved)  # type: ignore[arg-type]


Fetch = Callable[[BeneathWriter, Order], int]


def main() -> NoReturn:
    """Runs in the slot's scope, as root of the host; never returns."""
    control = Channel.from_fd(int(sys.argv[1]), ORDER_MAX_BYTES)
    report_failure(control, ENTER, lambda: _outside(control))


def _outside(control: Channel) -> NoReturn:
    control.send({"begun": True})
    # When memory runs out, this process is to be killed rather than the slot's.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if (request := control.receive()) is None:  # the supervisor has ended
        os._exit(1)
    order = Order.restore(fields.mapping(request.body, "order"))
    fetch = _fetcher() if order.archive is not None else None
    prctl(PR_SET_DUMPABLE, 0)
    pidfd = request.take("init")
    # The supervisor sends the process, and must not be able to get into namespaces of the host's other users.
    if (owner := ns.owner_of_user_namespace(order.pid)) not in HOST_IDS:
        raise PermissionError(errno.EPERM, f"process {order.pid} is in a user namespace of user id {owner}")
    ns.enter(pidfd, order.pid, NAMESPACES)
    os.close(pidfd)
    # No import from here on, because it would load the image's modules.
    sys.path.clear()
    sys.path_importer_cache.clear()
    if os.fork() == 0:
        report_failure(control, ENTER, lambda: _inside(control, order, request, fetch))
    os._exit(0)


def _inside(control: Channel, order: Order, request: Message, fetch: Optional[Fetch]) -> NoReturn:
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    for step in plan.last(order.uid, order.syscall_filter, apparmor=order.apparmor):
        step.do()
    # The kernel clears it with the change of user, but not where fs.suid_dumpable is 1.
    prctl(PR_SET_DUMPABLE, 0)
    os.umask(0o022)
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, order.timeout_s)
    path = _home_of(order.uid)
    os.chdir(path)
    with BeneathWriter(path) as home:
        with _step(WRITE):
            _write(home, order, request)
        with _step(UNPACK):
            entries = fetch(home, order) if fetch is not None else 0
    control.send({"files": len(order.files), "entries": entries})
    os._exit(0)


def _write(home: BeneathWriter, order: Order, request: Message) -> None:
    offset = 0
    for path, size in order.files:
        home.write(tuple(path.split("/")), [os.pread(request.fds["content"], size, offset)])
        offset += size
    request.close()


def _fetcher() -> Fetch:
    """A function that fetches and unpacks an archive, with everything it needs imported and loaded."""
    import ssl

    from nbagent.content import download, unpack

    # The host's certificates, because the operator decides which are trusted.
    context = ssl.create_default_context()

    def fetch(home: BeneathWriter, order: Order) -> int:
        limits = unpack.UnpackLimits(order.archive_bytes, order.archive_entries)
        proxy = proxies.parse(order.proxy) if order.proxy is not None else None
        with download.get(str(order.archive), order.allowed, context, proxy, order.direct) as body:
            return unpack.unpack(body, home, limits)

    return fetch


def _home_of(uid: int) -> str:
    """The home directory of a user of the slot, from a file that root of the slot wrote (steps.Identity)."""
    with open("/etc/passwd", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            columns = line.rstrip("\n").split(":")
            if len(columns) == 7 and columns[2] == str(uid):
                return columns[5]
    raise Refused(f"no user {uid} in the slot")


def _on_alarm(number: int, frame: object) -> None:
    raise Refused("content was not delivered in time")


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    """Raises what is raised within as a failure of the step `name`."""
    try:
        yield
    except Refused as error:
        raise StepFailed(Failure(name, 0, str(error))) from error
    except Exception as error:
        raise StepFailed(Failure.of(error, name)) from error


if __name__ == "__main__":
    main()
