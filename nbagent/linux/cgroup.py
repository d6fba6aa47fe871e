"""What a cgroup has used and was refused: memory, processor time, tasks, OOM kills; version 1 and 2 alike.

Reads the kernel's files and nothing else: a read wakes nobody, so a thousand slots may be
looked at without one of them noticing. What it writes, by `reclaim` and `MigrationPrimer`, changes no limit.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_FILE_MAX_BYTES = 4096


@dataclass(frozen=True)
class Usage:
    """What the processes of one cgroup use at one moment."""

    memory_bytes: int
    swapped_bytes: int
    cpu_s: float
    tasks: int
    oom_kills: int
    tasks_refused: int


@dataclass(frozen=True)
class Cgroup:
    """Where the controllers of one cgroup are; in version 2 all are the same directory.

    `cpu` is always a directory of version 2: its cpu.stat counts there without a controller too,
    while systemd leaves version 1's cpuacct alone where that is mounted by itself.
    """

    memory: str
    cpu: str
    pids: str

    @property
    def unified(self) -> bool:
        """Whether it is of version 2."""
        return self.memory == self.cpu

    def usage(self) -> Usage:
        """What it uses now. A cgroup that is gone uses nothing."""
        unified = self.unified
        return Usage(
            memory_bytes=_number(f"{self.memory}/{'memory.current' if unified else 'memory.usage_in_bytes'}"),
            # Version 1 has it only where the kernel counts memory and swap together, and nothing is swapped there.
            swapped_bytes=_number(f"{self.memory}/memory.swap.current") if unified else 0,
            cpu_s=self.cpu_s(),
            tasks=_number(f"{self.pids}/pids.current"),
            oom_kills=_keyed(f"{self.memory}/{'memory.events' if unified else 'memory.oom_control'}", b"oom_kill"),
            tasks_refused=_keyed(f"{self.pids}/pids.events", b"max"),
        )

    def cpu_s(self) -> float:
        """The processor time it has used; 0 where it is gone."""
        return _keyed(f"{self.cpu}/cpu.stat", b"usage_usec") / 1e6

    def may_swap(self) -> bool:
        """Whether any of its memory may be swapped out."""
        try:
            return self.unified and _read(f"{self.memory}/memory.swap.max").strip() != b"0"
        except OSError:
            return False

    def reclaim(self, size_bytes: int) -> bool:
        """Has the kernel swap out, or drop from its cache, so much of its memory; False when less was to be had.

        Blocks until that is done. Raises OSError: of version 1, before Linux 5.19, and gone are FileNotFoundError.
        """
        fd = os.open(f"{self.memory}/memory.reclaim", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(size_bytes).encode())
        except BlockingIOError:  # EAGAIN: the kernel gave up after sixteen rounds that freed nothing more
            return False
        finally:
            os.close(fd)
        return True


def of_process(pid: int, root: Path = ROOT) -> Cgroup:
    """The cgroup that the process `pid` is in. Raises OSError when the process is gone."""
    paths: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path.lstrip("/")
    if "memory" not in paths:
        unified = f"{root}/{paths['']}"
        return Cgroup(unified, unified, unified)
    return Cgroup(
        memory=f"{root}/memory/{paths['memory']}",
        cpu=f"{root}/unified/{paths['']}",
        pids=f"{root}/pids/{paths['pids']}",
    )


def unit_of_process(pid: int) -> str:
    """The unit systemd put the process in: the last part of its cgroup. Raises OSError."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    named = [line for line in lines if line.split(":", 2)[1] == "name=systemd"]
    for line in named or [line for line in lines if line.startswith("0::")]:
        return line.rsplit("/", 1)[-1]
    return ""


class MigrationPrimer:
    """Makes the next move of a process into a cgroup quick, by waiting here for what it would wait for.

    The first move for some time waits for an RCU grace period, 5 to 10 ms, in which PID 1 does nothing; those that
    follow soon do not (percpu_down_write(9) of cgroup_threadgroup_rwsem). This moves the caller to where it is, in a
    thread that waits inside splice(2) for when it is wanted, and so begins without having to run any Python.
    """

    def __init__(self, root: Path = ROOT) -> None:
        """Raises OSError where this process may not write to its cgroup.procs."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        tree = root if len(lines) == 1 else root / "unified"
        self._procs = os.open(f"{tree}{own}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self._wanted, self._want = os.pipe()
        os.set_blocking(self._want, False)
        threading.Thread(target=self._run, name="hastener", daemon=True).start()

    def prime(self) -> None:
        """Begins now; does not wait."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._want, b"0")

    def _run(self) -> None:
        # Where the kernel cannot do that (before Linux 5.12), moves take as long as they take.
        with contextlib.suppress(OSError):
            while os.splice(self._wanted, self._procs, 1):
                pass


# As plain as can be, as a thousand slots have five thousand of these files.
def _read(file: str) -> bytes:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _FILE_MAX_BYTES)
    finally:
        os.close(fd)


def _number(file: str) -> int:
    try:
        return int(_read(file))
    except (OSError, ValueError):
        return 0


def _keyed(file: str, key: bytes) -> int:
    try:
        for line in _read(file).splitlines():
            name, _, value = line.partition(b" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
