# SPDX-License-Identifier: BSD-3-Clause
"""`python3 -m nbagent.modules`: nbagent-modules.service, which has the kernel load no module for a process of an image.

For a program in an unknown format the kernels of Debian 12 and 13 start modprobe(8), as root and in no slot's cgroup,
and no filter of system calls sees the content of a program. A hook of the kernel's security modules is called before
each such start, whatever the reason is. The program at the hook remains when this one has ended, by its name.
"""

from __future__ import annotations

import sys

from nbagent.core import paths
from nbagent.image import ids
from nbagent.linux import bpf

HOOK = "kernel_module_request"


def main() -> int:
    """The exit status; 0 also when the kernel has no such programs."""
    if not bpf.is_security_module():
        sys.stderr.write("the kernel's security modules do not include bpf, so slots can have modprobe started\n")
        return 0
    try:
        bpf.refuse_to_users(HOOK, ids.BASES.start, len(ids.BASES) * ids.COUNT, str(paths.MODULE_REQUESTS))
    except (OSError, LookupError, ValueError) as error:
        sys.stderr.write(f"slots can have modprobe started, because the program of {HOOK} was not loaded: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
