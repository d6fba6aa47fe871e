# SPDX-License-Identifier: BSD-3-Clause
"""The program that refuses module requests of slots: the hook's number, its instructions, and the finding of doctor.

tests/integration/test_limits.py tries it on the kernels of Debian 12 and 13.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbagent import modules
from nbagent.doctor.kernel import MODULES_UNIT, check_module_requests
from nbagent.image import ids
from nbagent.linux import bpf


def information(*types: tuple[int, int, str]) -> bytes:
    """Type information with types of these kinds, numbers of members and names."""
    names, described = b"\0", b""
    for kind, members, name in types:
        described += struct.pack("=III", len(names), kind << 24 | members, 0)
        described += bytes(4 * (bpf._MORE.get(kind, 0) + members * bpf._MORE_OF_EACH_MEMBER.get(kind, 0)))
        names += name.encode() + b"\0"
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(described), len(described), len(names))
    return header + described + names


def test_the_number_of_a_function_counts_types_of_all_sizes() -> None:
    others = [(kind, 3 if kind in bpf._MORE_OF_EACH_MEMBER else 0, f"t{kind}") for kind in range(1, 20)]
    # A variable of the same name is no function.
    found = information(*others, (14, 0, "bpf_lsm_hook"))
    with pytest.raises(LookupError, match="no function bpf_lsm_hook"):
        bpf.function_id(found, "bpf_lsm_hook")
    with pytest.raises(LookupError, match="no bpf_lsm"):
        bpf.function_id(found, "bpf_lsm")
    assert bpf.function_id(information(*others, (12, 1, "bpf_lsm_hook"), *others), "bpf_lsm_hook") == 20
    with pytest.raises(ValueError, match="this architecture"):
        bpf.function_id(bytes(reversed(found[:2])) + found[2:], "bpf_lsm_hook")


@pytest.mark.skipif(not Path(bpf.TYPES).exists(), reason="this kernel has no type information")
def test_the_kernels_own_types_have_the_hook() -> None:
    assert bpf.function_id(Path(bpf.TYPES).read_bytes(), f"bpf_lsm_{modules.HOOK}") > 1


def result(code: bytes, uid: int, gid: int) -> int:
    """The result of the instructions for a process, as the kernel computes it."""
    register, at = 0, 0
    while True:
        operation, registers, jump, constant = struct.unpack_from("=BBhi", code, 8 * at)
        assert registers == 0
        at += 1
        if operation == 0x85:
            assert constant == 15  # bpf_get_current_uid_gid
            register = gid << 32 | uid
        elif operation == 0x04:
            register = (register + constant) & 0xFFFFFFFF
        elif operation == 0x36:
            at += jump if register & 0xFFFFFFFF >= constant else 0
        elif operation == 0xB7:
            register = constant
        else:
            assert operation == 0x95
            return register


def test_ids_of_images_are_refused_and_no_others() -> None:
    first, last = ids.BASES.start, ids.BASES[-1] + ids.COUNT - 1
    code = bpf._refusal(first, len(ids.BASES) * ids.COUNT)
    for uid, expected in ((0, 0), (1000, 0), (first - 1, 0), (first, -1), (first + 70000, -1), (last, -1),
                          (last + 1, 0), (0xFFFFFFFE, 0)):
        assert result(code, uid, first) == expected, hex(uid)


def kernel(root: Path, security_modules: str) -> Path:
    path = root / bpf.SECURITY_MODULES.lstrip("/")
    path.parent.mkdir(parents=True)
    path.write_text(security_modules)
    return root


def test_doctor_finds_a_host_whose_slots_can_have_modprobe_started(tmp_path: Path) -> None:
    without = check_module_requests(kernel(tmp_path / "without", "capability,apparmor"), lambda _: "inactive")
    assert without.status == "warn" and "add bpf to lsm=" in without.mend
    root = kernel(tmp_path / "with", "lockdown,capability,apparmor,bpf\n")
    assert check_module_requests(root, lambda unit: "active" if unit == MODULES_UNIT else "failed").status == "ok"
    failed = check_module_requests(root, lambda _: "failed")
    assert failed.status == "warn" and f"systemctl restart {MODULES_UNIT}" in failed.mend
    (root / "run/systemd").mkdir(parents=True)
    (root / "run/systemd/container").write_text("systemd-nspawn")
    assert check_module_requests(root, lambda _: "inactive").status == "ok"


def test_a_kernel_without_such_programs_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bpf, "is_security_module", lambda: False)
    assert modules.main() == 0
    assert "do not include bpf" in capsys.readouterr().err
