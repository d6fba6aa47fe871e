# SPDX-License-Identifier: BSD-3-Clause
"""System call filters: compiled on the host by libseccomp, loaded in the slot by prctl(2).

`compile_filter` needs Debian's python3-seccomp and runs in the supervisor. `load` needs only the C library, because
it runs under an image's own Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Mapping

from nbagent.linux.libc import call

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
_INSTRUCTION_BYTES = 8


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def compile_filter(
    allowed: Iterable[str],
    refused: Mapping[str, int],
    otherwise: int,
    equal: Mapping[tuple[str, int], Iterable[int]],
    without: Mapping[str, int],
) -> bytes:
    """A BPF program for this machine's native architecture.

    `allowed` calls are permitted and `refused` ones fail with the given errno. All others, and those of other
    architectures, fail with the errno `otherwise`, or are permitted when that is 0. `equal` permits a call when the
    argument with that index (from 0) has one of the values; several entries for one call are alternatives. `without`
    permits a call when its first argument has none of the bits. A call that this libseccomp has no name for gets no
    rule, and so fails with `otherwise`.
    """
    import seccomp

    default = seccomp.ERRNO(otherwise) if otherwise else seccomp.ALLOW
    program = seccomp.SyscallFilter(defaction=default)
    program.set_attr(seccomp.Attr.ACT_BADARCH, default)
    rules = [
        *((name, seccomp.ALLOW, ()) for name in allowed),
        *((name, seccomp.ERRNO(errno), ()) for name, errno in refused.items()),
        *(
            (name, seccomp.ALLOW, (seccomp.Arg(number, seccomp.EQ, value),))
            for (name, number), values in equal.items() for value in values
        ),
        *((name, seccomp.ALLOW, (seccomp.Arg(0, seccomp.MASKED_EQ, bits, 0),)) for name, bits in without.items()),
    ]
    for name, action, arguments in rules:
        with contextlib.suppress(RuntimeError):
            program.add_rule(action, name, *arguments)
    with open(os.memfd_create("nbagent-filter", os.MFD_CLOEXEC), "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def load(program: bytes) -> None:
    """Applies a filter to this thread and all its descendants; it cannot be removed. Needs no_new_privs.

    Raises OSError.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.cast(buffer, ctypes.c_void_p)
    filter_program = _Program(len(program) // _INSTRUCTION_BYTES, pointer)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(filter_program), 0, 0)
