"""Brings what a claim brings into a running slot: one process that enters the slot and becomes its user.

    python3 -I -m nbagent.content.deliver CONTROL_FD PIDFD ORDER_FD

PIDFD is the slot's first process, ORDER_FD an `Order` as JSON. Over CONTROL_FD (SOCK_SEQPACKET) it answers
once and ends:

    {"done": {"files": int, "entries": int}}
    {"failed": {"part": "enter" | "files" | "archive", "text": str}}

Its first instruction runs in the slot's scope already, so all it touches is charged to the slot. Before it
enters it imports all it will ever need and reads its order. The process that enters ends at once; its child is
in the slot's pid namespace too, where the slot's init will reap it, and becomes what each of the slot's
processes is by the last steps of the same plan. Only then it touches a file or the network.

To the slot it shows nothing: no descriptor of the host but this socket, no environment, and it is not dumpable
from before it enters to its end, so that nothing with the slot's id can trace it or look into /proc/PID. The
other way round its answer is no more than what the slot says of itself.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, NoReturn, Optional

from nbagent.content.beneath_writer import BeneathWriter, Refused
from nbagent.linux import namespaces as ns
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.sandbox import plan

NAMESPACES = plan.NAMESPACES | ns.CLONE_NEWUSER


class Order(NamedTuple):
    """What is to be brought, and as whom: `uid` in the slot, whose first process on the host is `pid`.

    `files` are pairs of path and base64; `allowed` are URLs' beginnings.
    `timeout_s` is for all of it; the supervisor ends the slot a little later.
    """

    uid: int
    pid: int
    syscall_filter: str
    files: List[List[str]]
    archive: Optional[str]
    allowed: List[str]
    archive_bytes: int
    archive_entries: int
    timeout_s: float

    def save(self) -> Dict[str, Any]:
        """The order as JSON."""
        return self._asdict()

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Order:
        """The order out of JSON. Raises TypeError when it is not one."""
        return cls(**saved)


def main() -> NoReturn:
    """Runs in the slot's scope, as root of the host; never returns."""
    control = socket.socket(fileno=int(sys.argv[1]))
    _guarded(control, "enter", lambda: _outside(control, int(sys.argv[2]), int(sys.argv[3])))


def _outside(control: socket.socket, pidfd: int, order_fd: int) -> NoReturn:
    # When memory ends, rather the claim than what is in the slot.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    with open(order_fd, "rb") as order_file:
        order = Order.restore(json.load(order_file))
    fetch = _fetcher() if order.archive is not None else None
    prctl(PR_SET_DUMPABLE, 0)
    ns.enter(pidfd, order.pid, NAMESPACES)
    os.close(pidfd)
    # What is not imported by now must never be: it would be the image's.
    sys.path.clear()
    sys.path_importer_cache.clear()
    if os.fork() == 0:
        _guarded(control, "enter", lambda: _inside(control, order, fetch))
    os._exit(0)


def _inside(control: socket.socket, order: Order, fetch: Any) -> NoReturn:
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    for step in plan.last(order.uid, order.syscall_filter):
        step.do()
    # The kernel has seen to it with the new id already, unless fs.suid_dumpable is 1.
    prctl(PR_SET_DUMPABLE, 0)
    os.umask(0o022)
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, order.timeout_s)
    path = _home_of(order.uid)
    os.chdir(path)
    with BeneathWriter(path) as home:
        _guarded(control, "files", lambda: _bring(control, home, order, fetch))


def _bring(control: socket.socket, home: BeneathWriter, order: Order, fetch: Any) -> NoReturn:
    for path, data in order.files:
        home.write(tuple(path.split("/")), [base64.b64decode(data)])
    entries = 0
    if fetch is not None:
        with _reported(control, "archive"):
            entries = fetch(home, order)
    control.send(json.dumps({"done": {"files": len(order.files), "entries": entries}}).encode())
    os._exit(0)


def _fetcher() -> Any:
    """A function that brings an archive, with everything it needs imported and loaded."""
    import ssl

    from nbagent.content import download, unpack

    # The host's certificates, as whom to trust is the operator's word.
    context = ssl.create_default_context()

    def fetch(home: BeneathWriter, order: Order) -> int:
        limits = unpack.UnpackLimits(order.archive_bytes, order.archive_entries)
        with download.get(str(order.archive), order.allowed, context) as body:
            return unpack.unpack(body, home, limits)

    return fetch


def _home_of(uid: int) -> str:
    """The home directory of a user of the slot, by a file that root of the slot wrote (steps.Identity)."""
    with open("/etc/passwd", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.rstrip("\n").split(":")
            if len(fields) == 7 and fields[2] == str(uid):
                return fields[5]
    raise Refused(f"no user {uid} in the slot")


def _late(number: int, frame: object) -> None:
    raise Refused("not there in time")


def _guarded(control: socket.socket, part: str, action: Any) -> NoReturn:
    """Runs `action`, which does not return; whatever it raises goes back to the supervisor."""
    with _reported(control, part):
        action()
    os._exit(1)


@contextlib.contextmanager
def _reported(control: socket.socket, part: str) -> Any:
    """Reports what is raised as a failure of `part`, and ends the process."""
    try:
        yield
    except BaseException as error:  # the process ends here; nothing may be lost
        text = str(error) if isinstance(error, (Refused, OSError)) else repr(error)
        with contextlib.suppress(OSError):
            control.send(json.dumps({"failed": {"part": part, "text": text[:1000]}}).encode())
        os._exit(1)


if __name__ == "__main__":
    main()
