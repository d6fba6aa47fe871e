# SPDX-License-Identifier: BSD-3-Clause
"""Programs that a build runs, its progress on standard error, and its failure."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

# Program on this machine -> the Debian package that contains it.
TOOLS = {"mmdebstrap": "mmdebstrap", "unshare": "util-linux", "zstd": "zstd"}

_started_s = time.monotonic()


def fail(message: str) -> NoReturn:
    raise SystemExit(f"images/build: {message}")


def progress(text: str) -> None:
    sys.stderr.write(f"[{time.monotonic() - _started_s:6.1f} s] {text}\n")
    sys.stderr.flush()


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
    """Run a program with its output on standard error; the build fails if the program fails."""
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=env, check=False).returncode
    if status:
        fail(f"{command[0]} ended with status {status}")


def install_tools() -> None:
    """Install by apt the programs and modules that this machine lacks."""
    missing = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    for module in ("pip", "brotli"):
        if importlib.util.find_spec(module) is None:
            missing.append(f"python3-{module}")
    if missing:
        progress(f"installing {' '.join(missing)}")
        run(["apt-get", "-qq", "update"])
        run(["apt-get", "-qq", "install", "--no-install-recommends", *missing])
        importlib.invalidate_caches()
