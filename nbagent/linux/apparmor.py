# SPDX-License-Identifier: BSD-3-Clause
"""AppArmor: whether the kernel has a profile, and the change of the calling thread to it.

Standard library only, and little of it, because it is memory of every slot; Python 3.9 and up.
"""

from __future__ import annotations

import errno
import os
from typing import Optional, Union

Root = Union[str, "os.PathLike[str]"]
# In the kernel's documents of its policy, a profile is a directory with its name and the number of its version.
_PROFILES = "sys/kernel/security/apparmor/policy/profiles"
_CURRENT = "/proc/thread-self/attr/apparmor/current"


def is_enabled(root: Root = "/") -> bool:
    """Whether AppArmor is built into the kernel and was not disabled at boot."""
    return _text(os.path.join(root, "sys/module/apparmor/parameters/enabled")) == "Y"


def mode_of(profile: str, root: Root = "/") -> Optional[str]:
    """The mode of a profile that the kernel has, for example "enforce"; None if it has none of this name."""
    directory = os.path.join(root, _PROFILES)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return None
    for name in names:
        if name.rpartition(".")[0] == profile:
            return _text(os.path.join(directory, name, "mode"))
    return None


def change_profile(profile: str) -> None:
    """Changes the calling thread to a profile, which its children inherit. Raises OSError; FileNotFoundError when the
    kernel does not have the profile.

    With no_new_privs, the kernel permits a thread without a profile to change to one, and no other change.
    """
    command = f"changeprofile {profile}".encode()
    with open(_CURRENT, "wb", buffering=0) as file:
        # The kernel responds with 0 if the file is not that of the calling process.
        if file.write(command) != len(command):
            raise OSError(errno.EIO, f"{_CURRENT} was not written")


def _text(path: str) -> Optional[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None
