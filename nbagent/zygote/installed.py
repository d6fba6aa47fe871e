# SPDX-License-Identifier: BSD-3-Clause
"""The packages that a user has installed over those that a fork of the zygote has loaded, or in their place.

A forked kernel keeps the modules that the zygote has imported. So a kernel that would import another file for one of
them, or execute a new .pth file, is started by exec. `note` runs before the user can install anything. It covers the
user's own site-packages and the image's, which in images like docker-stacks belong to the user.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
import time
from typing import Set

# The names of the directories that pip installs packages to.
_NAMES = ("site-packages", "dist-packages")

# The clock of times in inodes, which is late by a tick of the kernel: CLOCK_REALTIME_COARSE of linux/time.h.
_INODE_CLOCK = 5

# Before `note` nothing is regarded as changed.
_noted_ns = sys.maxsize


def note() -> None:
    """Notes the time from which on the image's packages are compared."""
    global _noted_ns
    _noted_ns = time.clock_gettime_ns(_INODE_CLOCK)


def over_loaded() -> bool:
    """Whether a new Python would load other files than this process for a module, or files at its start."""
    own = site.getusersitepackages()
    places = {path for path in sys.path if path.endswith(_NAMES)} - {own}
    return _is_shadowed(own) or any(_is_changed(place) for place in places)


def _loaded() -> Set[str]:
    return {name.partition(".")[0] for name in sys.modules} | {"sitecustomize", "usercustomize"}


def _is_shadowed(own: str) -> bool:
    """Whether the user's site-packages, which come before the image's, have a loaded module or a .pth file."""
    try:
        names = os.listdir(own)
    except OSError:
        return False
    if not names:
        return False
    loaded = _loaded()
    return any(name.endswith(".pth") or name.partition(".")[0] in loaded for name in names)


def _is_changed(place: str) -> bool:
    """Whether a .pth file or the file or directory of a loaded module was made, replaced or removed since `note`."""
    try:
        # pip adds or renames an entry of the directory for each package, and the kernel sets the time of that.
        if os.stat(place).st_ctime_ns < _noted_ns:
            return False
        changed = {
            entry.name for entry in os.scandir(place) if entry.stat(follow_symlinks=False).st_ctime_ns >= _noted_ns
        }
    except OSError:
        return False
    loaded = _loaded()
    if any(name.endswith(".pth") or name.partition(".")[0] in loaded for name in changed):
        return True
    for name in loaded & set(sys.modules):
        with contextlib.suppress(AttributeError, TypeError):
            file = str(sys.modules[name].__file__)
            if file.startswith(place + "/") and not os.path.exists(file):
                return True
    return False
