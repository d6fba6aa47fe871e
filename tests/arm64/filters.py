# SPDX-License-Identifier: BSD-3-Clause
"""Computes what the system call filters of this machine's architecture do with a call: filters.py exec|fork < CALLS

CALLS are lines of JSON: the name of a call, its arguments, and the architecture, or "foreign". Prints for each "allow",
an errno, or "unknown" for a call that this architecture does not have. The programs are interpreted and not loaded,
because QEMU refuses that.
"""

import base64
import json
import struct
import sys

import seccomp

from nbagent.supervisor import sandbox_specs

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Of another architecture: 32-bit arm.
FOREIGN = 0x40000028


def run(program: bytes, number: int, architecture: int, arguments: list[int]) -> int:
    """The value that a classic BPF program returns for struct seccomp_data; see linux/filter.h."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        code, true, false, value = instructions[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= value
        elif code == 0x05:  # BPF_JMP | BPF_JA
            at += value
        elif code in (0x15, 0x25, 0x35, 0x45):  # BPF_JMP | BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET | BPF_K
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value,
                     0x45: bool(accumulator & value)}[code]
            at += true if holds else false
        elif code == 0x06:  # BPF_RET | BPF_K
            return value
        else:
            raise AssertionError(f"instruction {code:#x}")


def result(filters: list[bytes], name: str, arguments: list[int], machine: str) -> str:
    """As the kernel combines several filters: a refusal precedes a permission."""
    number = seccomp.resolve_syscall(seccomp.Arch(), name)
    if number < 0:
        return "unknown"
    architecture = FOREIGN if machine == "foreign" else AUDIT_ARCH[machine]
    values = [run(program, number, architecture, arguments) for program in filters]
    refused = [value for value in values if value != ALLOW]
    return str(min(refused) - ERRNO) if refused else "allow"


def main() -> None:
    programs = {"exec": lambda: [sandbox_specs.syscall_filter()],
                "fork": lambda: [sandbox_specs.forking_filter(), sandbox_specs.forked_filter()]}
    filters = [base64.b64decode(program) for program in programs[sys.argv[1]]()]
    for line in sys.stdin:
        name, arguments, machine = json.loads(line)
        print(result(filters, name, arguments, machine))


if __name__ == "__main__":
    main()
