"""System call filters: made on the host by libseccomp, loaded in the slot by prctl(2).

`compile_filter` needs Debian's python3-seccomp and runs in the supervisor; `load` needs nothing but
the C library, and runs wherever a slot starts.
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
    """A filter as the kernel takes it, for this machine's own architecture.

    `allowed` may be called; `refused` fail with the errno given; everything else, other architectures' calls too,
    fails with `otherwise`, or is allowed where that is 0. `equal`: allowed when the argument of that number, from 0, is
    one of these; one that fits is enough. `without`: allowed when none of these bits is set in the first argument. A
    name that this libseccomp does not know is left out, and so fails with `otherwise`.
    """
    import seccomp

    default = seccomp.ERRNO(otherwise) if otherwise else seccomp.ALLOW
    made = seccomp.SyscallFilter(defaction=default)
    made.set_attr(seccomp.Attr.ACT_BADARCH, default)
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
            made.add_rule(action, name, *arguments)
    with open(os.memfd_create("nbagent-filter", os.MFD_CLOEXEC), "w+b") as file:
        made.export_bpf(file)
        file.seek(0)
        return file.read()


def load(program: bytes) -> None:
    """Applies a filter to this process and all its descendants for good. Needs no_new_privs.

    Raises OSError.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.cast(buffer, ctypes.c_void_p)
    filter_program = _Program(len(program) // _INSTRUCTION_BYTES, pointer)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(filter_program), 0, 0)
