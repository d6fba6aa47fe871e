# SPDX-License-Identifier: BSD-3-Clause
"""Reads the host for checks: files, systemd, the ruleset and the resolver."""

from __future__ import annotations

import pwd
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

TIMEOUT_S = 3.0
# journald writes to a disk.
SYNC_TIMEOUT_S = 10.0
UNKNOWN_STATE = "not known, because systemd does not respond"


def addresses_of(name: str) -> list[str]:
    """The addresses of `name`, from the system's resolver. Raises OSError."""
    return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def has_user(name: str) -> bool:
    """Whether the host has a user of this name."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def manager_responds() -> bool:
    """Whether PID 1 responds."""
    return bool(_systemctl("show", "-P", "Version"))


def systemctl_version() -> str:
    """The output of `systemctl --version`; empty if systemctl fails."""
    return _systemctl("--version")


def unit_state(unit: str) -> str:
    """The output of `systemctl is-active` for a unit."""
    return _systemctl("is-active", unit) or UNKNOWN_STATE


def unknown_state(_: str) -> str:
    """The state of a unit while PID 1 does not respond, which each systemctl would find out in TIMEOUT_S."""
    return UNKNOWN_STATE


def unit_properties(units: Sequence[str], properties: Sequence[str]) -> list[dict[str, str]]:
    """The properties of those units that are loaded; none while PID 1 does not respond. Units can be patterns."""
    text = _systemctl("show", "-p", ",".join(properties), *units)
    return [dict(line.split("=", 1) for line in unit.splitlines()) for unit in text.split("\n\n") if unit]


def sync_journal() -> None:
    """Lets journald write all entries to its files. Raises OSError and subprocess.SubprocessError."""
    done = subprocess.run(
        ["journalctl", "--sync"], capture_output=True, text=True, timeout=SYNC_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.strip().partition("\n")[0])


def bounding_set(unit: str) -> str:
    """The CapabilityBoundingSet= of a unit; of an instance, if it is a template."""
    return _systemctl("show", "-P", "CapabilityBoundingSet", unit.replace("@.", "@doctor."))


def ruleset() -> tuple[str, str]:
    """The outputs of `nft --json list ruleset` and `nft --handle list ruleset`. Raises PermissionError without root."""
    return _nft("--json"), _nft("--handle")


def _nft(option: str) -> str:
    done = subprocess.run(
        ["/usr/sbin/nft", option, "list", "ruleset"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip().partition("\n")[0])
    return done.stdout


def _systemctl(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["systemctl", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""

    def read() -> Iterator[tuple[str, int]]:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            yield name, int(value.split()[0]) * 1024

    return {"SwapTotal": 0} | dict(read())


def below(root: Path, path: Path) -> Path:
    """`path` of the host whose root directory is `root`."""
    return root / path.relative_to("/")


def text_of(path: Path, default: str) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return default
