# SPDX-License-Identifier: BSD-3-Clause
"""Machine-wide kernel limits that would bound the number of slots of a host: raised while a host is up, restored
after the last.

They are raised and never lowered. They belong to no namespace, so that a host cannot set them for itself.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from testhost_driver import state

WANTED = {
    "kernel/pid_max": 4_194_304,
    "kernel/threads-max": 1_000_000,
    "fs/inotify/max_user_instances": 65_536,
    "fs/inotify/max_user_watches": 4_194_304,
    "fs/aio-max-nr": 1_048_576,
    "kernel/keys/maxkeys": 200_000,
    "kernel/keys/maxbytes": 20_000_000,
    "vm/max_map_count": 1_048_576,
}


def raise_all() -> None:
    with state.locked(state.directory() / "locks" / ".sysctls"):
        before = _saved()
        for name, wanted in WANTED.items():
            path = Path("/proc/sys") / name
            with contextlib.suppress(OSError, ValueError):
                value = int(path.read_text())
                if value < wanted:
                    path.write_text(str(wanted))
                    before.setdefault(name, value)
        _note().write_text(json.dumps({"boot_id": state.boot_id(), "values": before}))


def restore() -> None:
    """Call when no host is left."""
    with state.locked(state.directory() / "locks" / ".sysctls"):
        for name, value in _saved().items():
            with contextlib.suppress(OSError):
                (Path("/proc/sys") / name).write_text(str(value))
        _note().unlink(missing_ok=True)


def _note() -> Path:
    return state.directory() / "sysctls.json"


def _saved() -> dict[str, int]:
    try:
        raw = json.loads(_note().read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return dict(raw["values"]) if raw["boot_id"] == state.boot_id() else {}
