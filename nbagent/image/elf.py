# SPDX-License-Identifier: BSD-3-Clause
"""Compares the processor that an image's program was built for with this host's, by the headers of ELF files.

Without the comparison an image of another architecture would be unpacked, and each of its slots would fail at execve(2)
with "Exec format error".
"""

from __future__ import annotations

import os
import platform
import struct
import sys
from typing import BinaryIO

from nbagent.core.errors import ImageInvalid
from nbagent.image.jupyter import resolved
from nbagent.image.manifest import Program
from nbagent.untrusted.tree import Tree

# e_ident (class and byte order), e_type and e_machine.
_HEADER_BYTES = 20
# Of e_machine, named as uname(2) does.
_MACHINES = {3: "i686", 21: "ppc64le", 22: "s390x", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_SHELL = "/bin/sh"


def check_machine(tree: Tree, program: Program) -> None:
    """Raises ImageInvalid if the program, or the shell if that is a script, is for another processor than this Python.

    An image is not refused for want of an ELF file, because not every program is one.
    """
    with open(sys.executable, "rb") as own:
        expected = _machine(own)
    for path in (program.python or program.command[0], _SHELL):
        found = _machine_of(tree, path)
        if found is not None:
            if found != expected:
                raise ImageInvalid(
                    f"the image is for {_name(found)}, but this host is {platform.machine()}: {path} cannot be executed"
                )
            return


def _machine_of(tree: Tree, path: str) -> tuple[int, int, int] | None:
    parts = resolved(tree, path) if path.startswith("/") else None
    file = tree.open_regular(parts) if parts is not None else None
    if file is None:
        return None
    with file:
        return _machine(file)


def _machine(file: BinaryIO) -> tuple[int, int, int] | None:
    """Class, byte order and machine of an ELF file; None for any other."""
    header = os.pread(file.fileno(), _HEADER_BYTES, 0)
    if len(header) < _HEADER_BYTES or not header.startswith(b"\x7fELF"):
        return None
    (machine,) = struct.unpack_from(">H" if header[5] == 2 else "<H", header, 18)
    return header[4], header[5], machine


def _name(machine: tuple[int, int, int]) -> str:
    return _MACHINES.get(machine[2], f"another processor (ELF machine {machine[2]})")
