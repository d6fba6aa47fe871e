# SPDX-License-Identifier: BSD-3-Clause
"""Parts that depend on the architecture, with Debian's Python for arm64 under QEMU's user emulation: `make test-arm64`.

The emulator passes system calls on to this machine's kernel, so that neither arm64's kernel nor a slot is tested.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import machine
import pytest

from nbagent.sandbox import syscalls

# Tests of modules that know numbers or structures of the kernel, and that start few processes, because the emulated
# interpreter needs seconds to start.
UNIT_TESTS = ("limits_page", "network_rules", "network_watch")
AF_INET, AF_INET6, AF_ALG, AF_NETLINK, AF_PACKET, AF_VSOCK = 2, 10, 38, 16, 17, 40
CLONE_NEWUSER, SIGCHLD = 0x10000000, 17
CALLS = [
    *([name, []] for name in (
        *syscalls.ALLOWED, *syscalls.REFUSED, "setns", "unshare", "mount", "io_uring_setup", "keyctl", "userfaultfd",
        "clone3", "mbind", "io_setup", "seccomp", "pivot_root",
    )),
    ["clone", [SIGCHLD]], ["clone", [CLONE_NEWUSER | SIGCHLD]],
    *(["socket", [family, kind, protocol]]
      for family in (1, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_ALG, AF_VSOCK)
      for kind in (1, 2, 3, 5) for protocol in (0, 1, 6, 17, 132, 136, 262)),
    *(["setsockopt", [3, level, option]] for level in (0, 1, 6, 17, 41) for option in range(80)),
    *(["personality", [value]] for value in (0, 8, 0x20000, 0x40000)),
    *(["fadvise64", [3, 0, 0, advice]] for advice in range(6)),
    *(["prctl", [option]] for option in range(60)),
    *(["prlimit64", [0, resource, address]] for resource in range(16) for address in (0, 1, 1 << 40)),
    *(["ioctl", [0, request]] for request in (0x5412, 0x541C, 0x5401, 0x5413)),
]


@pytest.fixture(scope="session")
def root() -> Path:
    return machine.build()


def run(root: Path, *argv: str, text: str = "") -> str:
    done = subprocess.run(machine.command(root, *argv), input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_all_modules_are_imported_and_those_of_images_too(root: Path) -> None:
    assert run(root, "uname", "-m") == "aarch64\n"
    printed = run(root, "python3", "tests/arm64/imports.py")
    assert re.fullmatch(r"2\d\d modules\n", printed), printed


def test_unit_tests_pass(root: Path) -> None:
    tests = [f"tests/unit/test_{name}.py" for name in UNIT_TESTS]
    printed = run(root, "python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert re.search(r"[1-9]\d+ passed", printed), printed


def test_zygotes_share_memory(root: Path) -> None:
    printed = run(root, "python3", "-I", "tests/memory_checks.py", "/src", "frozen_objects_keep_their_reference_counts",
                  "relocated_code_behaves_the_same", "recording_finds_code_and_its_threads")
    assert printed.count(" ok") == 3, printed


@pytest.mark.parametrize("launch", ["exec", "fork"])
def test_system_call_filters_do_the_same_as_on_this_machine(root: Path, launch: str) -> None:
    script = "tests/arm64/filters.py"

    def lines(architecture: str) -> str:
        return "".join(f"{json.dumps([*call, architecture])}\n" for call in CALLS)

    environment = os.environ | {"PYTHONPATH": str(machine.TOP), "PYTHONDONTWRITEBYTECODE": "1"}
    here = subprocess.run(
        [sys.executable, machine.TOP / script, launch], input=lines(platform.machine()), capture_output=True,
        text=True, check=True, env=environment,
    ).stdout.split()
    there = run(root, "python3", script, launch, text=lines("aarch64")).split()
    assert len(here) == len(there) == len(CALLS)
    pairs = list(zip(CALLS, here, there, strict=True))
    assert [pair for pair in pairs if pair[1] != pair[2] and "unknown" not in pair[1:]] == []
    # Older calls, such as open(2) and fork(2), do not exist on arm64.
    assert sum(there_ == "allow" for _, _, there_ in pairs) > 200
    foreign = run(root, "python3", script, launch, text=lines("foreign")).split()
    assert not set(foreign) & {"allow"}
