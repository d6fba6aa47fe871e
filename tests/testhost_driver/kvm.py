# SPDX-License-Identifier: BSD-3-Clause
"""Whether KVM boots a kernel here. Found by booting one with a deadline, once per boot of the machine.

On a nested paravirtual hypervisor /dev/kvm may accept KVM_CREATE_VM and still hang every stock kernel, so the
presence of the device node proves nothing.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from testhost_driver import state

PROBE_TIMEOUT_S = 15.0
REACHED = b"Run /init as init process"  # the last line that the kernel prints before user space


def works(tree: Path, say: Callable[[str], None]) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    note = state.directory() / "kvm.json"
    with state.locked(state.directory() / "locks" / ".kvm"):
        try:
            known = json.loads(note.read_text())
            if known["boot_id"] == state.boot_id():
                return bool(known["works"])
        except (FileNotFoundError, ValueError, KeyError):
            pass
        say(f"trying whether KVM boots a kernel here (once, at most {PROBE_TIMEOUT_S:.0f} s)")
        found = _boots(tree)
        say("KVM works" if found else "KVM does not boot a kernel here; emulating instead")
        note.write_text(json.dumps({"boot_id": state.boot_id(), "works": found}))
        return found


def _boots(tree: Path) -> bool:
    argv = [
        "qemu-system-x86_64",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "512M",
        "-smp",
        "1",
        "-nodefaults",
        "-display",
        "none",
    ]
    argv += ["-no-reboot", "-kernel", str(tree / "vmlinuz"), "-initrd", str(tree / "initrd.img")]
    argv += ["-append", "console=ttyS0 panic=-1 mitigations=off", "-serial", "stdio"]
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    said = b""
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as qemu:
        assert qemu.stdout is not None
        try:
            while REACHED not in said:
                readable, _w, _x = select.select([qemu.stdout], [], [], max(0.0, deadline - time.monotonic()))
                received = os.read(qemu.stdout.fileno(), 65536) if readable else b""
                if not received:  # the deadline, or the end of QEMU
                    return False
                said += received
            return True
        finally:
            qemu.kill()
