# SPDX-License-Identifier: BSD-3-Clause
"""The state of the driver: one directory for each host, with `state.json` and the host's disk.

The state records what was created, and does not prove that it still runs: a pid is valid only together with its
start time, and the whole state only in the boot of the machine that wrote it. Build results are not part of it,
because they outlive hosts (see `rootfs`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from testhost_driver import entry
from testhost_driver.errors import BadArgument

DRIVERS = ("nspawn", "vm")
SUITES = ("bookworm", "trixie")
NAME = re.compile(r"[a-z0-9-]{1,16}")


def directory() -> Path:
    return Path(entry.state_directory())


def host_directory(name: str) -> Path:
    return directory() / "hosts" / name


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that a later command can distinguish from another one with the same pid."""

    pid: int
    start_ticks: int  # /proc/PID/stat field 22, in clock ticks after the machine's boot


@dataclasses.dataclass(frozen=True)
class Forward:
    """127.0.0.1:`machine_port` here reaches 127.0.0.1:`host_port` inside the host."""

    host_port: int
    machine_port: int
    proxy: Process


@dataclasses.dataclass(frozen=True)
class HostState:
    name: str
    driver: str
    suite: str
    memory_bytes: int | None
    cpus: int | None
    boot_id: str
    tree: str  # the cached root filesystem below the host's own layer; it must not be pruned while the host runs
    up: bool = False
    monitor: Process | None = None  # systemd-nspawn, or QEMU
    leader: Process | None = None  # nspawn only: the host's PID 1, as seen from here
    tunnel: Process | None = None  # vm only: the ssh master
    accel: str = ""  # vm only: kvm or tcg
    forwards: tuple[Forward, ...] = ()

    @property
    def directory(self) -> Path:
        return host_directory(self.name)

    def save(self) -> None:
        path = self.directory / "state.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        temporary.rename(path)


def load(name: str) -> HostState | None:
    """The state of a host; None when there is none or it cannot be read, as after an unclean end."""
    try:
        raw = json.loads((host_directory(name) / "state.json").read_text())
        for key in ("monitor", "leader", "tunnel"):
            raw[key] = Process(**raw[key]) if raw[key] else None
        raw["forwards"] = tuple(
            Forward(f["host_port"], f["machine_port"], Process(**f["proxy"])) for f in raw["forwards"]
        )
        return HostState(**raw)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None


def names() -> list[str]:
    """Every host that left a directory, healthy or not."""
    try:
        return sorted(entry.name for entry in (directory() / "hosts").iterdir() if NAME.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadArgument(f"host name {name!r}: 1 to 16 of a-z, 0-9 and '-'")
    return name


def make_directory(name: str) -> Path:
    path = host_directory(name)
    path.mkdir(parents=True, mode=0o700)
    directory().chmod(0o700)
    return path


def remove_directory(name: str) -> None:
    """The last step of `down`. The last host's removal also removes the empty parent directory."""
    shutil.rmtree(host_directory(name), ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory() / "hosts").rmdir()


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `path` as a lock file. The last holder removes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        # The previous holder may have unlinked the file meanwhile; a lock on it then excludes no other process.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                break
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if shared:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(fd)


def host_lock(name: str) -> contextlib.AbstractContextManager[None]:
    """One `up`, `down` or `forward` of a name at a time."""
    return locked(directory() / "locks" / name)
