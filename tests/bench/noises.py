# SPDX-License-Identifier: BSD-3-Clause
"""Loads of one user of a host, for neighbour.py: `python3 noises.py NAME SECONDS`, run inside that user's server.

Each process sets alarm(2), which a fork does not inherit, so that it ends even if its parent was killed. Files and
sockets are bounded here, memory and processes by the limits of the server's cgroup. Standard library only.
"""

import contextlib
import errno
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable

AT = "/tmp/noise"
FILES, FILE_BYTES = 2_000, 64 << 10
NAMES = 200_000
SOCKETS = 10_000
WORKERS = 4
FILL_BYTES = 2 << 30  # more than MemoryMax= of all sides

deadline_s = 0.0


def left_s() -> int:
    return max(1, round(deadline_s - time.monotonic()))


def fork(work: Callable[[], object], count: int) -> None:
    """Runs `work` in `count` processes; returns when they have ended."""
    for _ in range(count):
        if not os.fork():
            start_alarm()
            with contextlib.suppress(OSError, MemoryError):
                work()
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def start_alarm() -> None:
    signal.alarm(left_s())


def compute() -> None:
    """Four processes that compute."""
    def work() -> None:
        while True:
            sum(range(100_000))

    fork(work, WORKERS)


def fork_bomb() -> None:
    """Each process forks until fork(2) fails, and then computes."""
    while True:
        try:
            if not os.fork():
                start_alarm()
        except OSError:
            sum(range(100_000))


def full_pids() -> None:
    """As many sleeping processes as TasksMax= permits, and failing forks."""
    while True:
        try:
            if not os.fork():
                start_alarm()
                time.sleep(left_s())
                os._exit(0)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise


def memory() -> None:
    """Four processes at a time that allocate until the OOM killer of their cgroup ends one."""
    while time.monotonic() < deadline_s:
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        start_alarm()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        fork(lambda: bytearray(b"x" * (FILL_BYTES // WORKERS)) and time.sleep(left_s()), WORKERS)
        os._exit(0)


def page_cache() -> None:
    """The files of the image are evicted from the page cache and read again."""
    paths = []
    for top, _, names in os.walk(os.path.dirname(os.__file__)):
        paths += [os.path.join(top, name) for name in names]

    def work() -> None:
        while True:
            for path in paths:
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    file.read(1 << 20)

    fork(work, 2)


def dentries() -> None:
    """Names that do not exist are looked up, and files are created and removed."""
    def work() -> None:
        own = f"{AT}/{os.getpid()}"
        os.mkdir(own)
        for number in range(NAMES // 2):
            with contextlib.suppress(FileNotFoundError):
                os.stat(f"{own}/none-{number}")
        while True:
            for number in range(FILES):
                os.close(os.open(f"{own}/{number}", os.O_CREAT | os.O_WRONLY))
            for number in range(FILES):
                os.unlink(f"{own}/{number}")

    fork(work, 2)


def sync() -> None:
    """Four processes that write and synchronise files, one file system and all of them."""
    def work() -> None:
        block = os.urandom(FILE_BYTES)
        with open(f"{AT}/{os.getpid()}", "wb") as file:
            while True:
                os.pwrite(file.fileno(), block, 0)
                os.fsync(file.fileno())
                os.sync()

    fork(work, WORKERS)


def cgroup(name: str) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{name}/cgroup") as file:
        return file.read()
    return ""


def journal() -> None:
    """Lines into the standard output and error of each process of the server's cgroup, and to syslog if it is there."""
    line = b"A" * 2000 + b"\n"
    outputs = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        # Users of systemd-run have one user id, so that the output of other users' kernels could be opened too.
        if cgroup(name) != cgroup("self"):
            continue
        for number in (1, 2):
            with contextlib.suppress(OSError):
                path = f"/proc/{name}/fd/{number}"
                if os.readlink(path).startswith("pipe:") and int(name) != os.getpid():
                    outputs.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.setblocking(False)
    while True:
        for output in outputs:
            with contextlib.suppress(OSError):
                os.write(output, line)
        with contextlib.suppress(OSError):
            log.sendto(b"<13>noise: " + line, "/dev/log")


def sockets() -> None:
    """Ten thousand sockets in ten processes, each of which sends, and opens its sockets again."""
    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        while True:
            pairs = []
            with contextlib.suppress(OSError):
                for _ in range(SOCKETS // 20):
                    pairs.append(socket.socketpair())
            for _ in range(20):
                for one, other in pairs:
                    one.send(b"x" * 512)
                    other.recv(512)
            for pair in pairs:
                for end in pair:
                    end.close()

    fork(work, 10)


NOISES = {
    work.__name__.replace("_", "-"): work
    for work in (compute, fork_bomb, page_cache, dentries, sync, journal, full_pids, memory, sockets)
}


def main() -> None:
    global deadline_s
    name, seconds = sys.argv[-2:]
    deadline_s = time.monotonic() + float(seconds)
    shutil.rmtree(AT, ignore_errors=True)
    os.mkdir(AT)
    start_alarm()
    NOISES[name]()


if __name__ == "__main__":
    main()
