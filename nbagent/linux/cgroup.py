# SPDX-License-Identifier: BSD-3-Clause
"""Accounting of a cgroup (memory, processor time, tasks, OOM kills), for cgroup v1 and v2.

Reading a cgroup's files wakes none of its processes, so a thousand slots can be sampled without cost to them.
`Cgroup.reclaim` and `MigrationPrimer` write to cgroup files; neither changes a limit.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_FILE_MAX_BYTES = 8192


@dataclass(frozen=True)
class Usage:
    """The resource use of one cgroup at one moment."""

    memory_bytes: int
    swapped_bytes: int
    cpu_s: float
    tasks: int
    oom_kills: int
    tasks_refused: int


@dataclass(frozen=True)
class Cgroup:
    """The directories of one cgroup, by controller; with cgroup v2 all three are the same.

    `cpu` is always in the v2 hierarchy, because cpu.stat counts there even without the cpu controller, while
    systemd creates no cgroup in v1's cpuacct hierarchy where that is mounted separately.
    """

    memory: str
    cpu: str
    pids: str

    @property
    def unified(self) -> bool:
        """Whether all controllers of this cgroup are in the v2 hierarchy."""
        return self.memory == self.cpu

    def usage(self) -> Usage:
        """The use at this moment; all zero when the cgroup was removed."""
        unified = self.unified
        return Usage(
            memory_bytes=self.memory_bytes(),
            # v1 counts swap only with memsw accounting; the agent swaps out slots with v2 only (`reclaim`).
            swapped_bytes=_number(f"{self.memory}/memory.swap.current") if unified else 0,
            cpu_s=self.cpu_s(),
            tasks=_number(f"{self.pids}/pids.current"),
            oom_kills=_keyed(f"{self.memory}/{'memory.events' if unified else 'memory.oom_control'}", b"oom_kill"),
            tasks_refused=_keyed(f"{self.pids}/pids.events", b"max"),
        )

    def memory_bytes(self) -> int:
        """The memory that counts towards the limit, with that of the cgroups below; 0 when the cgroup was removed."""
        return _number(f"{self.memory}/{'memory.current' if self.unified else 'memory.usage_in_bytes'}")

    def parent(self) -> Cgroup:
        """The cgroup above: for a slot's scope, the slice of all slots."""
        return Cgroup(*(os.path.dirname(path) for path in (self.memory, self.cpu, self.pids)))

    def unreclaimable_bytes(self) -> int:
        """The memory with that of the cgroups below, less page cache that the kernel can drop at once."""
        cache = b"inactive_file" if self.unified else b"total_inactive_file"
        return max(0, self.memory_bytes() - _keyed(f"{self.memory}/memory.stat", cache))

    def cpu_s(self) -> float:
        """The processor time used so far; 0 when the cgroup was removed."""
        return _keyed(f"{self.cpu}/cpu.stat", b"usage_usec") / 1e6

    def peak_bytes(self) -> int:
        """The most memory at one time; 0 when the cgroup was removed, or by a kernel before 5.19 with cgroup v2."""
        return _number(f"{self.memory}/{'memory.peak' if self.unified else 'memory.max_usage_in_bytes'}")

    def memory_pressure(self) -> float:
        """Percent of the last ten seconds in which a process of this cgroup waited for memory (PSI); with cgroup v1 a
        process of the host. 0 without PSI."""
        return pressure("memory", f"{self.memory}/memory.pressure" if self.unified else None)

    def may_swap(self) -> bool:
        """Whether memory.swap.max lets the kernel swap out memory of this cgroup."""
        try:
            return self.unified and _read(f"{self.memory}/memory.swap.max").strip() != b"0"
        except OSError:
            return False

    def reclaim(self, size_bytes: int) -> bool:
        """Reclaims memory of this cgroup (swap, page cache); returns False when the kernel reclaimed less.

        Blocks until the reclaim is complete. Raises OSError; FileNotFoundError with cgroup v1, before Linux 5.19
        (which has no memory.reclaim), and when the cgroup was removed.
        """
        fd = os.open(f"{self.memory}/memory.reclaim", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(size_bytes).encode())
        except BlockingIOError:  # EAGAIN: 16 rounds of reclaim did not free size_bytes (MAX_RECLAIM_RETRIES)
            return False
        finally:
            os.close(fd)
        return True


def pressure(kind: str, file: str | None = None) -> float:
    """Percent of the last ten seconds in which a task waited for "cpu", "memory" or "io": of the host, or by `file`.

    0 when the kernel does not measure it (CONFIG_PSI, psi=0), or the cgroup was removed.
    """
    try:
        # some avg10=1.23 avg60=0.50 avg300=0.10 total=12345
        first = _read(file or f"/proc/pressure/{kind}").split(b"\n", 1)[0]
        return float(first.split()[1].removeprefix(b"avg10="))
    except (OSError, ValueError, IndexError):
        return 0.0


def of_process(pid: int, root: Path = ROOT) -> Cgroup:
    """The cgroup of the process `pid`. Raises OSError when the process does not exist."""
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
    """The systemd unit of a process, which is the last component of its cgroup path; "" at the root. Raises OSError."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    named = [line for line in lines if line.split(":", 2)[1] == "name=systemd"]
    for line in named or [line for line in lines if line.startswith("0::")]:
        return line.rsplit("/", 1)[-1]
    return ""


class MigrationPrimer:
    """Takes the RCU grace period of a cgroup migration in advance, so that PID 1 does not wait for it.

    A write to cgroup.procs takes cgroup_threadgroup_rwsem for writing. After a pause, percpu_down_write() waits for
    an RCU grace period (5 to 10 ms), during which PID 1 handles nothing else; writes that follow soon do not wait.
    `prime` therefore starts a migration of this process into its own cgroup, which changes nothing. A thread blocked
    in splice(2) from a pipe to cgroup.procs does it, because that needs neither the GIL nor any Python code.
    """

    def __init__(self, root: Path = ROOT) -> None:
        """Raises OSError when this process cannot write to the cgroup.procs of its own cgroup."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        tree = root if len(lines) == 1 else root / "unified"
        self._procs = os.open(f"{tree}{own}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self._trigger_read, self._trigger_write = os.pipe()
        os.set_blocking(self._trigger_write, False)
        threading.Thread(target=self._run, name="migration-primer", daemon=True).start()

    def prime(self) -> None:
        """Starts the migration and returns without waiting for it."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._trigger_write, b"0")  # cgroup.procs takes "0" as the writing process

    def _run(self) -> None:
        # cgroup files support splice(2) since Linux 5.12; with an older kernel migrations are not primed.
        with contextlib.suppress(OSError):
            while os.splice(self._trigger_read, self._procs, 1):
                pass


# os.open() and os.read() instead of a file object, because a thousand slots have five thousand of these files.
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
