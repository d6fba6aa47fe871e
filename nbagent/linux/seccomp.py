# SPDX-License-Identifier: BSD-3-Clause
"""System call filters: compiled on the host by libseccomp, loaded in the slot by prctl(2).

`compile_filter` needs Debian's python3-seccomp and runs in the supervisor. `load` needs only the C library, because
it runs under an image's own Python.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Tuple  # python3-seccomp has no types

from nbagent.linux.libc import call

# (index of an argument, mask, value of the argument under the mask), all of which have to hold.
Conditions = Tuple[Tuple[int, int, int], ...]
Group = Tuple[Optional[int], Tuple[Tuple[str, Conditions], ...]]

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
# struct sock_filter, and the two instructions of it that are replaced.
_INSTRUCTION = struct.Struct("=HBBI")
_BPF_RET, _BPF_JA = 0x06, 0x05
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# An errno that no call has; the largest that libseccomp takes.
_LEFT_TO_MAIN = 4094


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def compile_filter(
    allowed: Iterable[str],
    refused: Mapping[str, int],
    otherwise: int,
    equal: Mapping[tuple[str, int], Iterable[int]],
    without: Mapping[str, int],
    groups: Sequence[Group] = (),
) -> bytes:
    """A BPF program for this machine's native architecture.

    `allowed` calls are permitted and `refused` ones fail with the given errno. All others, and those of other
    architectures, fail with the errno `otherwise`, or are permitted when that is 0. `equal` permits a call when the
    argument with that index (from 0) has one of the values; several entries for one call are alternatives. `without`
    permits a call when its first argument has none of the bits. `groups` precede all of these: each has an errno and
    rules, and the first group with a rule for a call decides; the errno None leaves the decision to the other
    parameters. A call that this libseccomp has no name for gets no rule, and so fails with `otherwise`.
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
    main = _exported(program, rules)
    # libseccomp has no order among the rules of one program, so each group is a program of its own.
    joined = main
    for number, calls in reversed(groups):
        action = seccomp.ERRNO(_LEFT_TO_MAIN if number is None else number)
        group = seccomp.SyscallFilter(defaction=seccomp.ALLOW)
        group.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.ALLOW)
        earlier = _exported(group, [
            (name, action, [seccomp.Arg(index, seccomp.MASKED_EQ, mask, value) for index, mask, value in conditions])
            for name, conditions in calls
        ])
        joined = _before(earlier, joined, len(joined) - len(main))
    return joined


def _exported(program: Any, rules: Iterable[tuple[str, Any, Sequence[Any]]]) -> bytes:
    import seccomp

    for name, action, arguments in rules:
        # Negative: unknown to this libseccomp, or not a call of this architecture.
        if seccomp.resolve_syscall(seccomp.Arch(), name) >= 0:
            program.add_rule(action, name, *arguments)
    with open(os.memfd_create("nbagent-filter", os.MFD_CLOEXEC), "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def _before(group: bytes, rest: bytes, main_offset: int) -> bytes:
    """`group` and then `rest`: where `group` permits a call, it jumps to `rest` instead, and where it returns
    `_LEFT_TO_MAIN`, to `main_offset` in `rest`."""
    instructions = list(_INSTRUCTION.iter_unpack(group))
    targets = {_ALLOW: 0, _ERRNO | _LEFT_TO_MAIN: main_offset // _INSTRUCTION.size}
    for index, (code, _, _, value) in enumerate(instructions):
        if code == _BPF_RET and value in targets:
            instructions[index] = (_BPF_JA, 0, 0, len(instructions) - index - 1 + targets[value])
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions) + rest


def load(program: bytes) -> None:
    """Applies a filter to this thread and all its descendants; it cannot be removed. Needs no_new_privs.

    Raises OSError.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.cast(buffer, ctypes.c_void_p)
    filter_program = _Program(len(program) // _INSTRUCTION.size, pointer)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(filter_program), 0, 0)
