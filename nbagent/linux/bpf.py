# SPDX-License-Identifier: BSD-3-Clause
"""BPF: a program at a hook of the kernel's security modules, loaded by bpf(2) as numbers, without a compiler or libbpf.

The kernel checks the program before it loads it. A program that a link attaches to a hook stays for as long as the link
has a descriptor or a name in the file system bpf.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from nbagent.linux.libc import call

SECURITY_MODULES = "/sys/kernel/security/lsm"
TYPES = "/sys/kernel/btf/vmlinux"
# "Dual BSD/GPL" is a licence that the kernel accepts for programs at these hooks.
_LICENCE = b"Dual BSD/GPL"

# The numbers of bpf(2) by architecture.
_SYSCALLS = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _OBJ_PIN, _RAW_TRACEPOINT_OPEN = 5, 6, 17
_PROG_TYPE_LSM, _LSM_MAC = 29, 27
_ATTRIBUTES_BYTES = 128
_LOG_BYTES = 1 << 16

# An instruction: operation, registers (source << 4 | destination), jump, constant. Names as in the kernel's documents.
_INSTRUCTION = struct.Struct("=BBhi")
_CALL, _EXIT = 0x85, 0x95
_MOV64_K, _ADD32_K, _JGE32_K = 0xB7, 0x04, 0x36
_GET_CURRENT_UID_GID = 15  # returns the group id << 32 | the user id, both as the host's

# The type information of the kernel, BTF: a header, types, and names. A type is three numbers of 32 bits, and more by
# its kind, for some kinds by the number of its members too.
_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_FUNC = 12
_MORE = {1: 1, 3: 3, 14: 1, 17: 1}
_MORE_OF_EACH_MEMBER = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}


def is_security_module(path: str = SECURITY_MODULES) -> bool:
    """Whether the kernel calls programs at the hooks of its security modules."""
    try:
        with open(path, encoding="ascii") as file:
            return "bpf" in file.read().strip().split(",")
    except FileNotFoundError:
        return False


def refuse_to_users(hook: str, first_uid: int, count: int, pin: str) -> None:
    """Has a hook of the security modules refuse, by EPERM, processes with the given user ids of the host.

    `pin` is the name of the link in the file system bpf; one that exists is replaced. Raises OSError, and LookupError
    when the kernel has no such hook.
    """
    with open(TYPES, "rb") as file:
        function = function_id(file.read(), f"bpf_lsm_{hook}")
    program = _load(_refusal(first_uid, count), function)
    try:
        link = _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, program))
    finally:
        os.close(program)
    try:
        _pin(link, pin)
    finally:
        os.close(link)


def function_id(types: bytes, name: str) -> int:
    """The number of a function in type information. Raises LookupError without it, ValueError for another format."""
    magic, _, _, header_bytes, types_start, types_bytes, names_start, names_bytes = _HEADER.unpack_from(types)
    if magic != _MAGIC:
        raise ValueError("no type information of this architecture")
    names = types[header_bytes + names_start:header_bytes + names_start + names_bytes]
    wanted = names.find(b"\0" + name.encode() + b"\0") + 1
    if not wanted:
        raise LookupError(f"the kernel has no {name}")
    start = header_bytes + types_start
    words = memoryview(types)[start:start + types_bytes].cast("I")
    at, number, end = 0, 0, len(words)
    while at < end:
        info = words[at + 1]
        kind = info >> 24 & 0x1F
        number += 1
        if kind == _FUNC and words[at] == wanted:
            return number
        at += 3 + _MORE.get(kind, 0)
        if kind in _MORE_OF_EACH_MEMBER:
            at += _MORE_OF_EACH_MEMBER[kind] * (info & 0xFFFF)
    raise LookupError(f"the kernel has no function {name}")


def _refusal(first_uid: int, count: int) -> bytes:
    """Instructions: -EPERM for user ids from `first_uid` on, 0 for others."""
    instructions = (
        (_CALL, 0, 0, _GET_CURRENT_UID_GID),
        # Of 32 bits, so that lower ids become large numbers and the group id is dropped.
        (_ADD32_K, 0, 0, -first_uid),
        (_JGE32_K, 0, 2, count),
        (_MOV64_K, 0, 0, -errno.EPERM),
        (_EXIT, 0, 0, 0),
        (_MOV64_K, 0, 0, 0),
        (_EXIT, 0, 0, 0),
    )
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


def _load(instructions: bytes, function: int) -> int:
    """The descriptor of a loaded program for the hook with this number. Raises OSError with the kernel's reason."""
    code, licence = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(_LICENCE)
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attributes = struct.pack(
        "=IIQQIIQII16sIIIIQIIQII", _PROG_TYPE_LSM, len(instructions) // _INSTRUCTION.size, ctypes.addressof(code),
        ctypes.addressof(licence), 1, _LOG_BYTES, ctypes.addressof(log), 0, 0, b"nbagent", 0, _LSM_MAC,
        0, 0, 0, 0, 0, 0, 0, function,
    )
    try:
        return _bpf(_PROG_LOAD, attributes)
    except OSError as error:
        reason = log.value.decode(errors="replace").strip().replace("\n", "; ")
        raise OSError(error.errno, f"{error.strerror}: {reason}" if reason else error.strerror) from None


def _pin(fd: int, path: str) -> None:
    new = f"{path}-new"  # the file system bpf refuses names with a dot
    if os.path.lexists(new):
        os.unlink(new)
    name = ctypes.create_string_buffer(os.fsencode(new))
    _bpf(_OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0))
    os.rename(new, path)


def _bpf(command: int, attributes: bytes) -> int:
    number = _SYSCALLS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, "bpf(2): not known on this architecture")
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    size = ctypes.c_size_t(_ATTRIBUTES_BYTES)
    try:
        return call("syscall", ctypes.c_long(number), ctypes.c_int(command), ctypes.byref(buffer), size)
    except OSError as error:
        raise OSError(error.errno, f"bpf(2): {os.strerror(error.errno or 0)}") from None
