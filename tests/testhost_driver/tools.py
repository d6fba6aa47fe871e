# SPDX-License-Identifier: BSD-3-Clause
"""The programs that the driver itself needs on this machine, installed by apt-get when they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from testhost_driver import state
from testhost_driver.errors import HostError

# Package, and a program that exists when the package is installed.
COMMON = {"mmdebstrap": "mmdebstrap", "iproute2": "ip", "util-linux": "nsenter", "tar": "tar"}
NEEDED = {
    "nspawn": COMMON | {"systemd-container": "systemd-nspawn"},
    "vm": COMMON
    | {
        "qemu-system-x86": "qemu-system-x86_64",
        "qemu-utils": "qemu-img",
        "openssh-client": "ssh",
        "e2fsprogs": "mke2fs",
    },
}


def ensure(driver: str, say: Callable[[str], None]) -> None:
    missing = [package for package, program in NEEDED[driver].items() if shutil.which(program) is None]
    if not missing:
        return
    if os.geteuid() != 0:
        raise HostError("test hosts need root")
    say(f"installing {', '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
    with state.locked(state.directory() / "locks" / ".apt"):
        # The package lists of a fresh machine are old or absent; an update takes seconds, so it runs only after a
        # failed installation.
        for argv in (install, ["apt-get", "update", "-q"], install):
            done = subprocess.run(argv, check=False, env=environment, capture_output=True, text=True)
            if done.returncode == 0 and argv is install:
                return
    raise HostError(f"{' '.join(install)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
